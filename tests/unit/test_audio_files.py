"""Which audio a command reads: folders, links, names of every kind, manifests; and what becomes of each row."""

import errno
import json
import os
import unicodedata

import numpy as np
import pytest
import soundfile

from ichigo_jax.data import audio_files
from ichigo_jax.data.audio_files import Outcome, for_each_clip, list_audio, read_manifest, with_other_names
from ichigo_jax.data.row_files import find_row_files, read_first_rows
from ichigo_jax.errors import InputError

COMPOSED, DECOMPOSED = "Dvořák č. 1.wav", unicodedata.normalize("NFD", "Dvořák č. 1.wav")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def names(rows, folder):
    return [os.path.relpath(row["path"], folder) for row in rows]


def outcomes(rows):
    def lengths(clips):
        return ({"length": len(clip)} for clip in clips)

    return list(for_each_clip(rows, lengths, max_seconds=10, max_bytes=1 << 20))


@pytest.fixture
def clips(tmp_path):
    """Clips of 100, 200, 300 and 400 samples, so that a result tells of which clip it is."""
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", np.full(100 * (number + 1), 0.1), 16000)
    return tmp_path


class TestFolders:
    def test_everything_that_looks_like_audio_is_listed(self, tmp_path):
        seen = "a.oga b.m4a c.WEBM d.aac e.amr f.wma g.mp4 h.mka i.caf j.w64 k.aifc l.SND m.opus n.rf64 o.Wave".split()
        touch(tmp_path, *seen, "notes.txt", "cover.jpg")
        assert names(list_audio([tmp_path]), tmp_path) == seen

    def test_hidden_files_and_folders_are_passed_over(self, tmp_path):
        touch(tmp_path, "x.wav", "._x.wav", ".hidden/y.wav", "deep/.z.flac", "deep/z.flac", "__MACOSX/._x.wav")
        assert names(list_audio([tmp_path]), tmp_path) == ["deep/z.flac", "x.wav"]
        assert names(list_audio([tmp_path / ".hidden", tmp_path / "._x.wav"]), tmp_path) == [".hidden/y.wav", "._x.wav"], "named"

    def test_links_are_followed_and_loops_end(self, tmp_path):
        touch(tmp_path, "in/one.wav", "elsewhere/two.wav", "elsewhere/deeper/three.wav")
        (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
        (tmp_path / "elsewhere" / "deeper" / "up").symlink_to("..")
        (tmp_path / "in" / "copy.wav").symlink_to("one.wav")
        expected = ["copy.wav", "linked/deeper/three.wav", "linked/two.wav", "one.wav"]
        assert names(list_audio([tmp_path / "in"]), tmp_path / "in") == expected
        whole = names(list_audio([tmp_path]), tmp_path)
        assert whole == ["elsewhere/deeper/three.wav", "elsewhere/two.wav", "in/copy.wav", "in/one.wav"], "each file once"

    def test_a_link_that_leads_nowhere_is_that_rows_error(self, clips):
        (clips / "gone.wav").symlink_to("nowhere")
        (clips / "loop.wav").symlink_to("loop.wav")
        (clips / "loop").symlink_to("loop")
        found = outcomes(list_audio([clips]))
        assert [outcome.error is None for outcome in found] == [True] * 4 + [False] * 2
        assert all(name in outcome.error for name, outcome in zip(("gone.wav", "loop.wav"), found[4:]))

    def test_a_folder_that_cannot_be_listed_is_told_of(self, clips, monkeypatch):
        touch(clips, "locked/x.wav")
        for name in ("scandir", "listdir"):
            real = getattr(os, name)

            def refusing(path, real=real):
                if str(path).endswith("locked"):
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
                return real(path)

            monkeypatch.setattr(os, name, refusing)
        found = outcomes(list_audio([clips]))
        (fault,) = [outcome.error for outcome in found if outcome.error]
        assert len(found) == 5 and "locked: cannot be read: Permission denied" in fault
        with pytest.raises(InputError, match="locked: cannot be listed: Permission denied"):
            find_row_files(str(clips))

    def test_manifests_in_a_folder_are_told_of(self, clips):
        write_rows(clips / "train.jsonl", {"path": "0.wav"})
        told = []
        assert len(list_audio([clips], told.append)) == 4
        assert len(told) == 1 and "train.jsonl" in told[0] and "not read" in told[0]
        list_audio([clips, clips / "train.jsonl"], told.append)
        assert len(told) == 1, "it was read"
        (clips / "lists").mkdir()
        write_rows(clips / "lists" / "a.JSONL", {"path": "x"})
        with pytest.raises(InputError, match="no audio files found.*a.JSONL"):
            list_audio([clips / "lists"])

    def test_rows_of_data_sets(self, tmp_path):
        touch(tmp_path, "_SUCCESS", ".part-0.parquet.crc", ".part-0.parquet", "_temporary/0/part-0.parquet", "part-0.PARQUET")
        touch(tmp_path / "more", "a.jsonl", ".b.jsonl", "._a.jsonl")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "linked").symlink_to(tmp_path / "more")
        assert [file.name for file in find_row_files(str(tmp_path))] == ["a.jsonl", "part-0.PARQUET"]
        assert [file.name for file in find_row_files(str(tmp_path / "data"))] == ["a.jsonl"]
        write_rows(tmp_path / "B.JSONL", {"text": "x"})
        assert read_first_rows(str(tmp_path / "B.JSONL"), ["text"], 1) == [{"text": "x"}]


class TestNamedOnce:
    def test_all_rows_of_a_manifest_stay(self, tmp_path):
        rows = [{"path": "a.wav", "answer": answer} for answer in ("yes", "of course", "yes")]
        found = list_audio([write_rows(tmp_path / "m.jsonl", *rows)])
        assert [row["answer"] for row in found] == ["yes", "of course", "yes"]

    def test_what_is_named_twice_is_taken_once(self, tmp_path, monkeypatch):
        touch(tmp_path, "in/a.wav", "in/b.wav")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to("in")
        other_ways = ["in/a.wav", "link/a.wav", "in/../in/b.wav"]
        for paths in (["in", "in/a.wav"], ["in/a.wav", "in"], ["in", tmp_path / "in"], ["link", "in"], other_ways):
            assert len(list_audio(paths)) == 2, paths
        manifest = write_rows(tmp_path / "m.jsonl", {"path": "in/a.wav", "text": "x"})
        assert list_audio([manifest, manifest, "m.jsonl"]) == [{"path": str(tmp_path / "in/a.wav"), "text": "x"}]

    def test_a_manifests_row_goes_before_a_bare_name(self, tmp_path):
        touch(tmp_path, "in/a.wav", "in/b.wav")
        manifest = write_rows(tmp_path / "m.jsonl", {"path": "in/a.wav", "text": "x"}, {"path": "in/a.wav", "text": "y"})
        for paths in ([manifest, tmp_path / "in"], [tmp_path / "in", manifest]):
            found = list_audio(paths)
            assert sorted(row.get("text", "") for row in found) == ["", "x", "y"]
            assert [row["path"] for row in found if "text" not in row] == [str(tmp_path / "in" / "b.wav")]


class TestNames:
    @pytest.mark.parametrize("stored, given", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
    def test_composed_and_decomposed(self, tmp_path, stored, given):
        touch(tmp_path, f"{stored}/{given}/{stored}", "plain.wav")
        there = str(tmp_path / stored / given / stored)
        rows = [{"path": f"{given}/{given}/{given}"}, {"path": f"{stored}/{stored}/{stored}"}, {"path": f"{given}/gone.wav"}]
        found = read_manifest(write_rows(tmp_path / "m.jsonl", *rows))
        assert [row["path"] for row in found] == [there, there, str(tmp_path / given / "gone.wav")]
        assert list_audio([tmp_path / given / stored / given]) == [{"path": there}]

    def test_what_no_name_can_be_is_that_rows_error(self, clips):
        bad = ["a" * 300 + ".wav", "zero\0byte.wav", "half \ud800 a character.wav", "new\nline.wav"]
        manifest = write_rows(clips / "m.jsonl", {"path": "0.wav"}, *({"path": name} for name in bad), {"path": "3.wav"})
        found = outcomes(list_audio([manifest]))
        assert [outcome.results and outcome.results["length"] for outcome in found] == [100, None, None, None, None, 400]
        assert all("\n" not in outcome.error for outcome in found[1:5])
        assert "File name too long" in found[1].error
        for outcome in found:
            json.loads(json.dumps(outcome.path, ensure_ascii=False).encode("utf-8"))

    def test_names_that_are_not_unicode(self, clips):
        os.rename(clips / "1.wav", os.fsencode(clips) + b"/caf\xe9.wav")
        found = outcomes(list_audio([clips]))
        assert {os.path.basename(outcome.path): outcome.results["length"] for outcome in found} == {
            "0.wav": 100,
            "2.wav": 300,
            "3.wav": 400,
            "caf\\xe9.wav": 200,
        }


class TestManifest:
    @pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-Infinity", "-1", "-0.5"])
    def test_seconds_are_a_length(self, tmp_path, seconds):
        (tmp_path / "m.jsonl").write_text(f'{{"path": "a.wav", "seconds": 0}}\n{{"path": "b.wav", "seconds": {seconds}}}\n')
        with pytest.raises(InputError, match="m.jsonl: row 2 has seconds .*expected 0 or more"):
            read_manifest(tmp_path / "m.jsonl")

    def test_seconds_may_be_missing(self, tmp_path):
        rows = [{"path": "a.wav"}, {"path": "b.wav", "seconds": None}, {"path": "c.wav", "seconds": 1.5}]
        assert len(read_manifest(write_rows(tmp_path / "m.jsonl", *rows))) == 3


class TestOutcomes:
    FIELDS = [
        {"error": "no such file"},
        {"seconds": 7, "tokens": [1], "index": 3},
        {"results": 1, "row": 2, "text": "x", "language": "en"},
    ]

    @pytest.mark.parametrize("fields", FIELDS)
    def test_fields_of_a_row_are_the_users(self, clips, fields):
        rows = [{"path": str(clips / f"{number}.wav"), **(fields if number in (0, 2) else {})} for number in range(4)]
        rows.insert(1, {"path": str(clips / "gone.wav"), **fields})
        found = outcomes(rows)
        assert [outcome.results and outcome.results["length"] for outcome in found] == [100, None, 200, 300, 400]
        assert [outcome.row for outcome in found] == rows and [outcome.seconds is None for outcome in found][1]

    @pytest.mark.parametrize(
        "fault",
        [
            PermissionError(errno.EACCES, "Permission denied"),
            OSError(errno.EIO, "Input/output error"),
            OSError(errno.ESTALE, "Stale file handle"),
            OSError(errno.ENAMETOOLONG, "File name too long"),
            OSError(errno.ELOOP, "Too many levels of symbolic links"),
        ],
    )
    def test_what_the_system_refuses_is_one_rows_error(self, clips, monkeypatch, fault):
        real = audio_files.load_audio

        def load(path, *bounds):
            if path.endswith("2.wav"):
                raise fault
            return real(path, *bounds)

        monkeypatch.setattr(audio_files, "load_audio", load)
        found = outcomes(list_audio([clips]))
        assert [outcome.results and outcome.results["length"] for outcome in found] == [100, 200, None, 400]
        assert found[2].error == f"{clips / '2.wav'}: cannot be read: {fault.strerror}; expected an audio file"

    def test_other_names_for_fields_like_ours(self):
        own = ("seconds", "tokens")
        rows = [{"path": "a", "seconds": 1}, {"path": "b", "text": "x"}]
        assert with_other_names(rows, own) == [{"path": "a", "manifest_seconds": 1}, {"path": "b", "text": "x"}]
        rows = [{"path": "a", "seconds": 1}, {"path": "b", "manifest_seconds": 2, "manifest_tokens": 3}]
        assert with_other_names(rows, own) == [{"path": "a", "manifest_manifest_seconds": 1}, rows[1]], "none is lost"
        rows = [{"path": "a", "tokens": 1, "text": "x"}]
        assert with_other_names(rows, own) == [{"path": "a", "manifest_tokens": 1, "text": "x"}]

    def test_a_path_as_text(self):
        for path, text in {"a\udcff.wav": "a\\xff.wav", "a\nb.wav": "a\nb.wav", "\ud800": "\\ud800", "č.wav": "č.wav"}.items():
            assert Outcome({"path": path}).path == text
