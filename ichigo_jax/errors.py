"""Errors that a user can act on, and how a command ends with them."""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import select
import sys
import unicodedata
import warnings
from collections.abc import Callable

from ichigo_jax import jaxlib_faults

BAD_INPUT, INTERRUPTED = 2, 130
READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended

# These come and go with a disk, a network or another machine, so the exit code is not the one that launchers take for final.
_PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
_NOT_SHOWN = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, surrogates, line and paragraph ends
_SURROGATES = re.compile("[\ud800-\udfff]")


class InputError(ValueError):
    """Something the user gave (a file, a flag, a config field) cannot be used.

    The message is one line that says what was found, what was expected and what to do. Commands print it and exit
    with code 2; library callers catch it as a ``ValueError``.
    """


class InputWarning(UserWarning):
    """Something the user gave is used although it looks wrong.

    The message is one line that names it. Commands print it on standard error, once.
    """


def show_input_warnings() -> None:
    """From now on an ``InputWarning`` is shown as its one line, without the place in the code where it was raised."""
    others = warnings.showwarning

    def show(message, category, *place) -> None:
        if issubclass(category, InputWarning):
            _tell(f"warning: {message}")
        else:
            others(message, category, *place)

    warnings.showwarning = show


def check_jaxlib() -> None:
    """Makes sure that JAX computes right results on this machine; to be called before JAX looks for devices.

    Raises:
      InputError: a build of jaxlib that computes wrong ones, and it is too late to set the flag that mends it.
    """
    if (fault := jaxlib_faults.avoid()) is not None:
        raise InputError(fault)


class ReaderGone(BrokenPipeError):
    """Whoever read a command's output has gone away, as ``| head`` does: no fault, but there is nobody to write for."""


def one_line(text: object) -> str:
    """``text`` as one line that every terminal can show: ``"a\\nb"`` becomes ``"a\\\\nb"``.

    File names may hold line ends, terminal codes and bytes that are not Unicode; all of them are escaped.
    """
    return "".join(_escaped(char) if unicodedata.category(char) in _NOT_SHOWN else char for char in str(text))


def unicode_only(text: str) -> str:
    """``text`` with what is not Unicode in it escaped, as files need it that others read: the byte 0xff becomes ``\\xff``."""
    return _SURROGATES.sub(lambda found: _escaped(found[0]), text)


def system_fault(error: OSError) -> str:
    """What the system said, without Python's ``[Errno 13]`` and without the name: ``"Permission denied"``."""
    return error.strerror or str(error) or type(error).__name__


def command(main: Callable[..., int | None]) -> Callable[..., None]:
    """Turns ``main`` into a command, which ends with one line on standard error where a traceback would help nobody.

    ``InputError`` gives exit code 2, and so does a file or a disk that the system refuses; 1 where that may pass by itself.
    When whoever reads the output goes away (``| head``), the command ends quietly, as other Unix programs do.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to stop
        show_input_warnings()
        try:
            try:
                check_jaxlib()
                code = main(*args, **kwargs)
            except SystemExit as stop:  # --help
                code = stop.code
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk or a reader that left can still be told of
        except InputError as error:
            _tell(f"error: {error}")
            code = BAD_INPUT
        except ReaderGone:
            code = READER_GONE
        except OSError as error:
            if error.errno is None:  # raised by a library, not by the system: its traceback is needed
                raise
            if isinstance(error, BrokenPipeError) and _output_has_no_reader():
                _discard_output()
                sys.exit(READER_GONE)
            name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            _tell(f"error: {name}{system_fault(error)}")
            code = 1 if error.errno in _PASSING or isinstance(error, ConnectionError) else BAD_INPUT
            _discard_output()
        except KeyboardInterrupt:
            _tell("interrupted")
            code = INTERRUPTED
        sys.exit(code or 0)

    return run


def _tell(message: str) -> None:
    print(one_line(message), file=sys.stderr)


def _output_has_no_reader() -> bool:
    """Whether standard output is a pipe that nobody reads; a pipe or connection of another kind may break as well."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def _discard_output() -> None:
    """Points standard output at nothing: Python writes out what is left at its end, which would fail once more."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: a test's or a notebook's, or none
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def _escaped(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # how Python keeps a byte of a file name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")
