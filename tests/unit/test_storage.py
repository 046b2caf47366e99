"""Files whole or not at all, outputs that cannot be written, streams, JSON of every writer, and how commands end."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from ichigo_jax import errors, storage
from ichigo_jax.data.faults import FaultLog
from ichigo_jax.data.row_files import read_first_rows
from ichigo_jax.data.sources import source_names
from ichigo_jax.errors import InputError, one_line
from ichigo_jax.storage import (
    atomic_write,
    check_output,
    json_object,
    open_output,
    read_json,
    read_json_lines,
    write_json,
    write_json_line,
)

ROOT = Path(__file__).parents[2]
TEXTS = ["one\u2028two", "one\u2029two", "next\u0085line", "tab\x0bulator", "form\x0cfeed", "file\x1cseparator"]


def python(code, **options):
    """Runs code as the body of a command in another process."""
    program = "import os, sys\nfrom ichigo_jax import errors, storage\n@errors.command\ndef main():\n" + textwrap.indent(
        textwrap.dedent(code), "    "
    )
    return subprocess.run(
        ["bash", "-c", f"{options.pop('limits', '')} {sys.executable} - {options.pop('pipe', '')}; exit ${{PIPESTATUS[0]}}"],
        input=f"{program}\nmain()\n",
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


class TestJsonLines:
    @pytest.mark.parametrize("text", TEXTS)
    def test_only_newlines_end_lines(self, tmp_path, text):
        line = json.dumps({"path": "a", "text": text}, ensure_ascii=False).replace("\\u000b", "\x0b").replace("\\f", "\x0c")
        for name, ends in (("unix", "\n"), ("windows", "\r\n")):
            file = tmp_path / f"{name}.jsonl"
            file.write_bytes(ends.join([line, "", line]).encode("utf-8"))
            assert read_json_lines(file) == [{"path": "a", "text": text}] * 2
            assert read_first_rows(str(file), ["text"], 2) == [{"path": "a", "text": text}] * 2

    @pytest.mark.parametrize("data", [b'\xef\xbb\xbf{"path": "a"}\n', b'\xef\xbb\xbf\n{"path": "a"}', b'{"path": "a"}\r\n\r\n'])
    def test_a_mark_before_the_first_line_is_none_of_it(self, tmp_path, data):
        (tmp_path / "m.jsonl").write_bytes(data)
        assert read_json_lines(tmp_path / "m.jsonl") == [{"path": "a"}]
        assert read_first_rows(str(tmp_path / "m.jsonl"), ["path"], 5) == [{"path": "a"}]

    def test_json_files_with_a_mark(self, tmp_path):
        (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
        assert read_json(tmp_path / "config.json") == {"a": 1}

    @pytest.mark.parametrize(
        "line", [b"5", b"[]", b'{"a": ', b'{"a": "\xff"}', b"[" * 100_000, b'"x"', b"null", b"\xff\xfe{\0}\0"]
    )
    def test_what_is_no_object_is_named(self, tmp_path, line):
        (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
        with pytest.raises(InputError, match=r"m\.jsonl:2: expected a JSON object, found b"):
            read_json_lines(tmp_path / "m.jsonl")
        with pytest.raises(InputError, match="row 2: expected a JSON object, found b"):
            read_first_rows(str(tmp_path / "m.jsonl"), ["a"], 2)

    def test_nothing_on_a_line(self):
        assert json_object(b" \r\n") is None and json_object(b"{}") == {}

    @pytest.mark.parametrize("name", ["gone.jsonl", ".", "a" * 300])
    def test_files_that_cannot_be_read(self, tmp_path, name):
        for read in (read_json, read_json_lines):
            with pytest.raises(InputError, match="expected (a file of )?JSON"):
                read(tmp_path / name)

    def test_skipped_clips_are_remembered(self, tmp_path):
        log = tmp_path / "skipped.jsonl"
        log.write_bytes(
            json.dumps({"path": "a\u2028b", "error": "x"}, ensure_ascii=False).encode() + b'\n5\n{"path": ["c"]}\n{"path": "d'
        )
        faults = FaultLog(log)
        faults("a\u2028b", "again")
        faults("new", "x")
        assert log.read_text(encoding="utf-8").split("\n")[-2:] == ['{"path": "new", "error": "x"}', ""], "on a line of its own"
        FaultLog(log)("new", "again")
        written = log.read_text(encoding="utf-8")
        assert written.count("new") == 1 and "again" not in written


class TestJsonOutput:
    @pytest.mark.parametrize("value", ["\udcff", "\ud800 \u2028", "plain č"])
    def test_what_is_written_can_be_read(self, tmp_path, value):
        write_json(tmp_path / "a.json", {"x": value})
        assert read_json(tmp_path / "a.json") == {"x": value}
        with open_output(tmp_path / "a.jsonl") as file:
            write_json_line(file, {"x": value})
        assert read_json_lines(tmp_path / "a.jsonl") == [{"x": value}]

    def test_an_encoding_that_lacks_a_character(self, tmp_path):
        with (tmp_path / "a").open("w", encoding="latin-1") as file:
            write_json_line(file, {"x": "č"})
        assert json.loads((tmp_path / "a").read_text("latin-1")) == {"x": "č"}


class TestOutputs:
    def test_what_exists_is_refused_unless_replaced(self, tmp_path):
        file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
        file.write_text("mine")
        folder.mkdir()
        (folder / "kept").touch()
        link.symlink_to("nowhere")
        for target in (file, folder, link):
            with pytest.raises(InputError, match="exists already"):
                check_output(target)
            with pytest.raises(InputError, match="exists already"), atomic_write(target):
                raise AssertionError("nothing is written")
        check_output(file, replace=True)
        for refused in (lambda: check_output(folder, replace=True), lambda: write_json(folder, {})):
            with pytest.raises(InputError, match="found a folder, expected a file"):
                refused()
        assert file.read_text() == "mine" and (folder / "kept").exists()

    @pytest.mark.parametrize("below", ["x.parquet", "deep/x.parquet", "a/b/c"])
    def test_below_a_file(self, tmp_path, below):
        (tmp_path / "file").touch()
        for refused in (check_output, lambda target: write_json(target, {})):
            with pytest.raises(InputError, match=r"cannot be written: .*file is a file, expected a folder"):
                refused(tmp_path / "file" / below)

    def test_names_that_are_too_long(self, tmp_path):
        with pytest.raises(InputError, match="cannot be written: File name too long"):
            check_output(tmp_path / ("a" * 256))
        with pytest.raises(InputError, match="cannot be written: File name too long"):
            check_output(tmp_path / ("a" * 256) / "x")
        with pytest.raises(InputError, match="cannot be written: embedded null byte"):
            check_output(tmp_path / "a\0b")
        for name in ("a" * 255, "č" * 127):  # as long as a name may be
            write_json(tmp_path / name, {})
            assert read_json(tmp_path / name) == {}

    def test_a_disk_that_refuses(self, tmp_path, monkeypatch):
        for number, reason in ((errno.EROFS, "Read-only file system"), (errno.EACCES, "denied"), (errno.EDQUOT, "quota")):

            def refuse(number=number, reason=reason, **_):
                raise OSError(number, reason)

            monkeypatch.setattr(storage.files.tempfile, "TemporaryFile", refuse)
            with pytest.raises(InputError, match=f"x.json: cannot be written: {reason}"):
                check_output(tmp_path / "new" / "x.json")
        assert not list(tmp_path.iterdir()), "a check leaves nothing"

    def test_a_full_disk_is_one_line_and_nothing_is_left(self, tmp_path):
        code = f"storage.write_json({str(tmp_path / 'x.json')!r}, list(range(100_000)))"
        result = python(code, limits="ulimit -f 64;")
        assert (result.returncode, result.stdout) == (2, "")
        assert (
            result.stderr
            == f"error: {tmp_path / 'x.json'}: cannot be written: File too large; make room or choose another place\n"
        )
        assert not list(tmp_path.iterdir())

    def test_standard_output(self, tmp_path, capsys):
        for name in ("-", "/dev/stdout", "/dev/fd/1"):
            check_output(name)
            write_json(name, {"x": 1})
            assert json.loads(capsys.readouterr().out) == {"x": 1}
        write_json("/dev/stderr", {"x": 1})
        assert json.loads(capsys.readouterr().err) == {"x": 1}

    def test_what_standard_output_leads_to_is_not_replaced(self, tmp_path):
        target = tmp_path / "out"
        with target.open("w") as file:
            file.write("before\n")
            file.flush()
            number = file.fileno()
            for name in (f"/dev/fd/{number}", f"/proc/self/fd/{number}"):
                check_output(name)
                with open_output(name) as lines:
                    write_json_line(lines, {"x": 1})
        assert target.read_text() == 'before\n{"x": 1}\n{"x": 1}\n'
        with pytest.raises(InputError, match="/dev/fd/987: cannot be written"), open_output("/dev/fd/987"):
            pass

    def test_a_named_pipe(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        check_output(pipe)
        read = []
        reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
        reader.start()
        write_json(pipe, {"x": 1})
        reader.join(10)
        assert json.loads(read[0]) == {"x": 1} and pipe.is_fifo()


class TestHowCommandsEnd:
    def test_a_reader_that_goes_away_is_no_fault(self):
        for line in ("print(number, flush=True)", "print(number)", "storage.write_json_line(sys.stdout, {'number': number})"):
            result = python(f"for number in range(100_000):\n    {line}", pipe="| head -1")
            assert (result.returncode, result.stderr) == (errors.READER_GONE, "")
        result = python(
            "import argparse\nargparse.ArgumentParser(usage='x' * 1_000_000).parse_args(['--help'])", pipe="| head -c 1"
        )
        assert result.stderr == ""

    def test_a_reader_of_a_named_pipe_that_goes_away(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        reader = threading.Thread(target=lambda: (tmp_path / "pipe").open("rb").close())
        reader.start()
        code = f"with storage.open_output({str(tmp_path / 'pipe')!r}) as file:\n    while True: storage.write_json_line(file, 1)"
        result = python(code)
        reader.join(10)
        assert (result.returncode, result.stderr) == (errors.READER_GONE, "")

    @pytest.mark.parametrize("line", ["print('x' * 100)", "print('x', flush=True)", "print('x' * 1_000_000)"])
    def test_a_full_disk_behind_standard_output(self, line):
        result = python(line, pipe="> /dev/full")
        assert (result.returncode, result.stderr) == (2, "error: No space left on device\n")

    @pytest.mark.parametrize(
        "fault, code, line",
        [
            (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2, "a.txt: No such file or directory"),
            (IsADirectoryError(errno.EISDIR, "Is a directory", b"caf\xe9"), 2, "caf\\xe9: Is a directory"),
            (OSError(errno.EIO, "Input/output error", "a\nb"), 1, "a\\nb: Input/output error"),
            (OSError(errno.ESTALE, "Stale file handle"), 1, "Stale file handle"),
            (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "Connection reset by peer"),
            (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),  # of a connection, not of the output
            (InputError("a\u2028b\r.wav\x1b[2J: no\udcff"), 2, "a\\u2028b\\r.wav\\x1b[2J: no\\xff"),
        ],
    )
    def test_faults_of_the_system_are_one_line(self, capsys, fault, code, line):
        @errors.command
        def main():
            raise fault

        with pytest.raises(SystemExit) as stop:
            main()
        assert (stop.value.code, capsys.readouterr().err) == (code, f"error: {line}\n")

    def test_a_librarys_own_fault_keeps_its_traceback(self):
        @errors.command
        def main():
            raise OSError("no number of the system's")

        with pytest.raises(OSError, match="no number"):
            main()

    def test_a_terminal_that_lacks_a_character(self):
        result = python("print('č')", limits="PYTHONIOENCODING=latin-1")
        assert (result.returncode, result.stdout) == (0, "\\u010d\n")


def test_one_line():
    lines = [("a\nb", "a\\nb"), ("č 音 👍", "č 音 👍"), ("a\x85b", "a\\x85b"), ("\udce9", "\\xe9"), ("\ud800", "\\ud800")]
    for text, line in lines:
        assert one_line(text) == line


@pytest.mark.parametrize(
    "paths, names",
    [
        (["data/a.parquet", "data/b.parquet", "old/b.jsonl"], ["a", "b-1", "b-2"]),
        (["b-1.parquet", "data/b.parquet", "old/b.jsonl"], ["b-1-0", "b-1-1", "b-2"]),
        (["x/a", "y/a", "a-0", "a-0-0"], ["a-0-0-0", "a-1", "a-0-2", "a-0-0-3"]),
    ],
)
def test_no_two_sources_have_one_name(paths, names):
    assert source_names(paths) == names
