"""What lies in and below a folder, and names that are spelled another way on disk."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection
from pathlib import Path

_LEFT_OVER = "_temporary"  # where Spark keeps what a job wrote that did not end


def files_below(folder: str | os.PathLike, suffixes: Collection[str]) -> tuple[list[Path], list[OSError]]:
    """The files in and below ``folder`` whose names end in one of ``suffixes``, in any case, sorted.

    Linked folders are followed; a folder that can be reached in several ways is gone through once. Hidden files and folders
    (``._one.wav``, which macOS adds to archives) are passed over. A link that leads nowhere is listed like any other file, so
    that whoever opens it tells of it.

    Args:
      folder: where to look; it may be hidden or a link itself.
      suffixes: lower case, with the dot.

    Returns:
      The files, and an error with its ``filename`` for each folder that cannot be listed.
    """
    found: list[Path] = []
    locked: list[OSError] = []
    seen: set[tuple[int, int]] = set()
    links = [Path(folder)]  # looked into last, so that a file is listed below its real folder where that is here as well
    while links:
        folders = [links.pop(0)]
        while folders:
            here = folders.pop()
            try:
                status = os.stat(here)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(here) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                locked.append(error)
                continue
            for entry in listed:
                if entry.name.startswith(".") or entry.name == _LEFT_OVER:
                    continue
                path = here / entry.name
                if _is_folder(entry):
                    (links if entry.is_symlink() else folders).append(path)
                elif path.suffix.lower() in suffixes:
                    found.append(path)
    return sorted(found), locked


def on_disk(path: str) -> str:
    """``path`` as the disk spells it: macOS takes ``é`` apart into two characters, and other systems do not.

    Each part of the path that is not there is looked for composed (NFC) and decomposed (NFD). A path that is not there in
    any spelling comes back as it is.
    """
    if path.isascii() or _exists(path):
        return path
    found = Path(Path(path).anchor)
    for part in Path(path).relative_to(found).parts:
        spellings = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        there = [found / spelling for spelling in spellings if _exists(found / spelling)]
        if not there:
            return path
        found = there[0]
    return str(found)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or a disk that is gone
        return False


def _exists(path: str | os.PathLike) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a name with a zero byte or half a character
        return False
