"""The bytes of a sound file, and the parts of it that a decoder takes one by one."""

from __future__ import annotations

import bisect
import dataclasses
import io
import itertools
import os
from collections.abc import Sequence

WINDOW = 1 << 20  # bytes that a walk through a file reads at a time
_NEARBY = 1 << 12  # bytes that are read around a header, since the next header is often among them


class SourceFile:
    """Bytes of an open file, read where they are asked for and never as a whole.

    Reading leaves the file's own position alone, so that a decoder can use the same descriptor. It is not mapped into memory:
    a bad disk would then end the process instead of raising ``OSError``.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self._window, self._start = b"", 0

    def read(self, start: int, size: int) -> bytes:
        """At most ``size`` bytes from ``start``; fewer at the end of the file."""
        offset = start - self._start
        if offset < 0 or offset + size > len(self._window):
            if size >= _NEARBY:
                return self._read(start, size)
            self._window, self._start, offset = self._read(start, _NEARBY), start, 0
        return self._window[offset : offset + size]

    def window(self, start: int, stop: int | None = None) -> bytes:
        """``WINDOW`` bytes from ``start``; fewer only before ``stop`` and at the end of the file."""
        return self._read(start, WINDOW if stop is None else min(WINDOW, stop - start))

    def find(self, needle: bytes, start: int) -> int:
        """Where ``needle`` begins, from ``start`` on; -1 where it does not occur."""
        size = _NEARBY  # and more from time to time, so that one that is near is cheap to find
        while len(window := self.read(start, size)) >= len(needle):
            at = window.find(needle)
            if at >= 0:
                return start + at
            start += len(window) - len(needle) + 1
            size = min(2 * size, WINDOW)
        return -1

    def _read(self, start: int, size: int) -> bytes:
        size = min(size, self.size - start)
        if size <= 0:
            return b""
        found = os.pread(self.descriptor, size, start)
        while len(found) < size and (more := os.pread(self.descriptor, size - len(found), start + len(found))):
            found += more
        return found


Piece = bytes | tuple[int, int]  # bytes that are given, or those of the file from a start to a stop


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a file that is a sound file of its own.

    Attributes:
      pieces: what it is put together from; None: the whole file as it stands.
      counted: whether its header counts its frames. Where it does not, it is decoded as far as it goes.
      skip: frames at its start that were put there to guide the decoder.
    """

    pieces: Sequence[Piece] | None = None
    counted: bool = True
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Sound:
    """All the sound of a file.

    Attributes:
      parts: in the order in which they are heard.
      doubts: what looks as if sound was lost before the file was written, in words that go on after "found".
    """

    parts: Sequence[Part] = (Part(),)
    doubts: Sequence[str] = ()


class Damage(Exception):
    """The file has lost sound; the message is an error's, without the file's name."""


class Unsupported(Exception):
    """The file holds a kind of sound that cannot be decoded; the message names the kind."""


class PartFile(io.RawIOBase):
    """A part as a file that can be read.

    A decoder calls it through C, where exceptions are lost, so ``fault`` keeps the first one for whoever asks afterwards.
    """

    def __init__(self, source: SourceFile, pieces: Sequence[Piece]):
        super().__init__()
        self._source, self._position = source, 0
        self._pieces = list(pieces)
        lengths = (len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)
        self._starts = [0, *itertools.accumulate(lengths)]
        self.size = self._starts.pop()
        self.fault: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def read_at(self, start: int, size: int) -> bytes:
        """At most ``size`` bytes from ``start``; fewer at the end of the part."""
        start, stop = min(start, self.size), min(start + size, self.size)
        return b"".join(
            piece if isinstance(piece, bytes) else self._source.read(piece[0], piece[1] - piece[0])
            for piece in self.pieces(start, stop)
        )

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """What lies between two positions in the part."""
        found: list[Piece] = []
        for index in range(max(0, bisect.bisect_right(self._starts, start) - 1), bisect.bisect_left(self._starts, stop)):
            begin, piece = self._starts[index], self._pieces[index]
            if isinstance(piece, bytes):
                found.append(piece[max(0, start - begin) : stop - begin])
            else:
                found.append((max(piece[0], piece[0] + start - begin), min(piece[1], piece[0] + stop - begin)))
        return found

    def readinto(self, buffer) -> int:
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and (found := self._next(len(view) - filled)):
            view[filled : filled + len(found)] = found
            filled += len(found)
        return filled

    def _next(self, size: int) -> bytes:
        """Bytes from the position to the end of a piece, at most ``size``; none at the end of the part."""
        at = self._position
        if not 0 <= at < self.size:
            return b""
        index = bisect.bisect_right(self._starts, at) - 1
        start, piece = self._starts[index], self._pieces[index]
        stop = self._starts[index + 1] if index + 1 < len(self._starts) else self.size
        size = min(size, stop - at)
        if isinstance(piece, bytes):
            found = piece[at - start : at - start + size]
        else:
            try:
                found = self._source.read(piece[0] + at - start, size)
            except OSError as error:
                self.fault = self.fault or error
                return b""
        self._position += len(found)
        return found
