"""What Orbax and TensorStore say of a disk that is full or cannot be written, as one line."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ichigo_jax import storage
from ichigo_jax.errors import InputError

_OF_SYSTEM = re.compile(r"\[os_error_code='(\d+)'")  # how TensorStore's chain of errors ends
_SAVING = ("future", "async_checkpointer", "checkpoint_manager", "checkpoint")  # Orbax's modules whose faults are raised as well


def reason(error: Exception) -> str:
    """The first line of an error, cut short; where the disk is behind it, what the system says of it."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    of_system = _OF_SYSTEM.search(text)
    return os.strerror(int(of_system[1])) if of_system else text[:300]


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """``storage.writing`` for a block that writes arrays: TensorStore's errors about the disk are no ``OSError``."""
    say_once()
    with storage.writing(path):
        try:
            yield
        except ValueError as error:
            if isinstance(error, InputError) or not _OF_SYSTEM.search(str(error)):
                raise
            raise OSError(reason(error)) from error


@functools.cache
def say_once() -> None:
    """Keeps the threads of Orbax and TensorStore from printing what they also raise: a full disk is some forty tracebacks."""

    class Repeated(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            of_saving = "orbax" in record.pathname and record.module in _SAVING
            no_metrics_yet = (
                record.msg == "Requested `tracked_metric`; did not provide metrics."
            )  # ``Checkpoints.rank`` adds them
            return not (of_saving and (record.exc_info or no_metrics_yet))

    logging.getLogger("absl").addFilter(Repeated())
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        # Of threads that still write when the first fault has ended the event loop that waited for them.
        of_writer = found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"
        if not (of_writer and threading.current_thread() is not threading.main_thread()):
            before(found)

    sys.unraisablehook = hook
