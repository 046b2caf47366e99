"""Reads numbers and text of a binary file one after another and never past its end.

Counts and lengths come from the file, so each is compared with the bytes that are left before anything is read or allocated.
Everything is little-endian.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ichigo_jax.errors import InputError


def open_binary(file: Path) -> BinaryReader:
    """Opens a file at its start; use it in a ``with`` statement.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        return BinaryReader(file, open(file, "rb"), os.path.getsize(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


@dataclasses.dataclass
class BinaryReader:
    """An open file. ``what``, everywhere, says in an error what was to be read.

    Attributes:
      file: its name.
      stream: at the next byte.
      size: bytes in all.
    """

    file: Path
    stream: BinaryIO
    size: int

    def __enter__(self) -> BinaryReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    @property
    def position(self) -> int:
        """The next byte."""
        return self.stream.tell()

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return self.size - self.position

    def require(self, count: int, what: str) -> None:
        """Checks that ``count`` bytes are left.

        Raises:
          InputError: there are fewer.
        """
        if count > self.left:
            raise InputError(
                f"{self.file}: truncated: {what} takes {count} bytes from byte {self.position} on, {self.left} are left; "
                "download it anew"
            )

    def skip(self, count: int, what: str) -> int:
        """Passes over bytes; returns where they begin."""
        self.require(count, what)
        start = self.position
        self.stream.seek(count, os.SEEK_CUR)
        return start

    def numbers(self, codes: str, what: str) -> tuple:
        """Numbers by their codes of ``struct``."""
        size = struct.calcsize(f"<{codes}")
        self.require(size, what)
        return struct.unpack(f"<{codes}", self.stream.read(size))

    def number(self, code: str, what: str) -> int:
        """One number."""
        return self.numbers(code, what)[0]

    def array(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        """``count`` numbers."""
        self.require(count * dtype.itemsize, what)
        return np.frombuffer(self.stream.read(count * dtype.itemsize), dtype)

    def text(self, length: int, what: str) -> str:
        """Text in UTF-8.

        Raises:
          InputError: other bytes.
        """
        self.require(length, what)
        found = self.stream.read(length)
        try:
            return found.decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.file}: {found[:40]!r} found as {what}, expected UTF-8; download it anew") from None
