"""Data sets encoded once: what is kept on disk, what is recorded, and when it is made anew."""

import errno
import json
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ichigo_jax.data import encoded
from ichigo_jax.data.encoded import encode_rows
from ichigo_jax.data.faults import FaultLog
from ichigo_jax.data.row_files import find_row_files, read_first_rows
from ichigo_jax.data.row_formats import RowEncoder, RowFormat
from ichigo_jax.errors import InputError
from ichigo_jax.text import TextTokenizer, train_llama_tokenizer

INSTRUCTION = RowFormat("instruction", None, None, False)
ROWS = [{"tokens": [number % 8, 3], "answer": f"answer {number}"} for number in range(10)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    train_llama_tokenizer(["answer 1", "on"] * 3, folder, 300, sound_codes=8, durations=False)
    return TextTokenizer.from_folder(folder)


@pytest.fixture
def encoder(tokenizer):
    return RowEncoder(INSTRUCTION, tokenizer, 100, "answers")


def write_parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def run(path, encoder, workdir, **options):
    workdir.mkdir(exist_ok=True)
    faults = FaultLog(workdir / "skipped_rows.jsonl")
    return encode_rows(str(path), encoder, workdir / "encoded", faults, **{"processes": 1, **options})


def assert_equal_examples(found, rows, encoder):
    assert len(found) == len(rows)
    for index, row in enumerate(rows):
        expected, _ = encoder(row, index)
        np.testing.assert_array_equal(found[index].ids, expected.ids)
        np.testing.assert_array_equal(found[index].predicted, expected.predicted)
    assert found.lengths.tolist() == [len(found[index].ids) for index in range(len(rows))]


def test_examples_are_those_of_the_rows(tmp_path, encoder):
    path = write_parquet(tmp_path / "rows.parquet", ROWS, row_group_size=3)
    found = run(path, encoder, tmp_path / "run")
    assert_equal_examples(found, ROWS, encoder)
    assert found.summary == (10, 0, 0, 0)
    assert not (tmp_path / "run" / "skipped_rows.jsonl").exists()


def test_a_folder_is_its_files_in_order(tmp_path, encoder):
    write_parquet(tmp_path / "data" / "train-00001.parquet", ROWS[3:7])
    write_parquet(tmp_path / "data" / "train-00000.parquet", ROWS[:3])
    (tmp_path / "data" / "more.txt").write_text("not a row")
    lines = [json.dumps(row) for row in ROWS[7:]]
    (tmp_path / "data" / "zuletzt.jsonl").write_text("\n".join(lines))
    assert [file.name for file in find_row_files(str(tmp_path / "data"))][0] == "train-00000.parquet"
    assert_equal_examples(run(tmp_path / "data", encoder, tmp_path / "run"), ROWS, encoder)


def test_ids_and_mask_are_the_documented_arrays(tmp_path):
    np.array([~7, 8, 9, 5, 6], np.int32).tofile(tmp_path / "ids")
    np.save(tmp_path / "lengths.npy", np.array([[3, 0, 2], [0, -1, 0]], np.int32))
    found = encoded.EncodedExamples(tmp_path / "ids", tmp_path / "lengths.npy")
    assert [(list(ids), list(predicted)) for ids, predicted in (found[0], found[1])] == [
        ([7, 8, 9], [False, True, True]),
        ([5, 6], [True, True]),
    ]
    assert found.summary == (3, 1, 0, 0)
    (tmp_path / "ids").write_bytes(bytes(16))
    with pytest.raises(InputError, match="16 bytes found, expected 20; delete the file"):
        encoded.EncodedExamples(tmp_path / "ids", tmp_path / "lengths.npy")


def test_other_processes_make_the_same_in_the_same_order(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(encoded, "ROWS_PER_CHUNK", 3)
    monkeypatch.setattr(encoded, "CHUNKS_ALONE", 1)
    bad = {"tokens": [99], "answer": "on"}
    path = write_parquet(tmp_path / "rows.parquet", [*ROWS, bad, *ROWS])
    found = run(path, encoder, tmp_path / "run", processes=2)
    assert_equal_examples(found, [*ROWS, *ROWS], encoder)
    (fault,) = map(json.loads, (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines())
    assert fault["path"] == f"{path}: row 11" and "sound code 99" in fault["error"]


class Mortal(RowEncoder):
    """Encodes in the process that the tests run in; another one is killed by it, as by a system without memory."""

    def __call__(self, row, number):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(row, number)


def test_a_process_that_dies_is_told_of_in_one_line_and_nothing_is_kept(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encoded, "ROWS_PER_CHUNK", 3)
    monkeypatch.setattr(encoded, "CHUNKS_ALONE", 1)
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    with pytest.raises(InputError, match="one of 2 processes that encode rows has died"):
        run(path, Mortal(INSTRUCTION, tokenizer, 100, "answers"), tmp_path / "run", processes=2)
    assert list(tmp_path.glob("run/encoded/*")) == []
    assert len(run(path, RowEncoder(INSTRUCTION, tokenizer, 100, "answers"), tmp_path / "run")) == len(ROWS)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_that_cannot_be_read_is_told_of(tmp_path, encoder, monkeypatch, suffix):
    path = tmp_path / f"rows.{suffix}"
    write_parquet(path, ROWS)

    opened, unread = type(path).open, PermissionError(errno.EACCES, "Permission denied", str(path))

    def refused(file, *mode):
        if file == path:
            raise unread
        return opened(file, *mode)

    monkeypatch.setattr(type(path), "open", refused)
    monkeypatch.setattr(pq, "ParquetFile", refused)
    with pytest.raises(InputError, match=r"rows\..*Permission denied"):
        run(path, encoder, tmp_path / "run")


def test_bad_rows_are_recorded_once_and_skipped(tmp_path, encoder):
    lines = [json.dumps(ROWS[0]), "", '{"tokens": [1]}', "[1, 2", '{"tokens": [8], "answer": "on"}', json.dumps(ROWS[1])]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xff\n")
    for _ in range(2):
        found = run(path, encoder, tmp_path / "run")
        assert found.summary == (6, 4, 0, 0)
        np.testing.assert_array_equal(found[1].ids, encoder(ROWS[1], 0)[0].ids)
        faults = list(map(json.loads, (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()))
        assert [fault["path"] for fault in faults] == [f"{path}: row {row}" for row in (3, 4, 5, 7)]
        assert "no 'answer' found" in faults[0]["error"] and "expected a JSON object" in faults[1]["error"]
        for file in (tmp_path / "run" / "encoded").iterdir():
            file.unlink()  # encoded anew, but not recorded anew


def test_a_second_start_encodes_nothing(tmp_path, encoder, monkeypatch):
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    first = run(path, encoder, tmp_path / "run")
    monkeypatch.setattr(encoded, "read_chunks", None)  # would fail if it were read
    again = run(path, encoder, tmp_path / "run")
    np.testing.assert_array_equal(first.lengths, again.lengths)
    np.testing.assert_array_equal(first[4].ids, again[4].ids)


@pytest.mark.parametrize("change", ["rows", "time", "length", "predict", "format"])
def test_whatever_changes_the_examples_encodes_anew(tmp_path, tokenizer, change):
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    options = {"format": INSTRUCTION, "length": 100, "predict": "answers"}
    run(path, RowEncoder(tokenizer=tokenizer, **options), tmp_path / "run")
    if change == "rows":
        write_parquet(tmp_path / "rows.parquet", ROWS[:4])
    elif change == "time":
        os.utime(path, ns=(0, 0))
    else:
        other = {"length": 99, "predict": "all", "format": RowFormat("sound", None, None, False)}
        options[change] = other[change]
    encoder = RowEncoder(tokenizer=tokenizer, **options)
    found = run(path, encoder, tmp_path / "run")
    assert len(list((tmp_path / "run" / "encoded").glob("ids-*.bin"))) == 2
    assert_equal_examples(found, ROWS[:4] if change == "rows" else ROWS, encoder)


def test_what_was_cut_is_counted(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "rows.parquet", [{"tokens": [1, 2, 3, 4]}, {"tokens": [1]}])
    encoder = RowEncoder(RowFormat("sound", None, None, False), tokenizer, 6, "all")
    assert run(path, encoder, tmp_path / "run").summary == (2, 0, 1, 2)


def test_examples_travel_without_their_ids(tmp_path, encoder):
    path = write_parquet(tmp_path / "rows.parquet", ROWS * 500)
    found = run(path, encoder, tmp_path / "run")
    (ids,) = (tmp_path / "run" / "encoded").glob("ids-*.bin")
    sent = pickle.dumps(found)
    assert len(sent) < 20 * len(found) < ids.stat().st_size
    np.testing.assert_array_equal(pickle.loads(sent)[4321].ids, found[4321].ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ("text", "expected a parquet file"),
        ("damaged", "expected a parquet file"),
        ([{"tokens": [1]}], "found columns tokens; expected tokens, answer"),
        ([{"tokens": [9], "answer": "on"}], "no row can be used, the first because of .*row 1: sound code 9"),
    ],
)
def test_files_that_are_not_what_the_format_needs(tmp_path, encoder, content, message):
    path = tmp_path / "rows.parquet"
    if content == "text":
        path.write_text("hello")
    elif content == "damaged":
        write_parquet(path, ROWS)
        whole = path.read_bytes()
        path.write_bytes(whole[:4] + bytes(100) + whole[104:])
    elif content is not None:
        write_parquet(path, content)
    with pytest.raises(InputError, match=message):
        run(path, encoder, tmp_path / "run")
    assert list(tmp_path.glob("run/encoded/*")) == []


def test_a_folder_or_file_without_rows(tmp_path, encoder):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"expected files ending in .parquet or .jsonl"):
        run(tmp_path / "folder", encoder, tmp_path / "run")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no rows found"):
        run(tmp_path / "empty.jsonl", encoder, tmp_path / "run")


def test_first_rows(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", ROWS)
    assert read_first_rows(path, ("tokens", "answer"), 3) == ROWS[:3]
    assert len(read_first_rows(path, ("tokens", "answer"), 99)) == 10
    (tmp_path / "rows.jsonl").write_text('{"tokens": [1], "answer": "on"}\n{"tokens": [1]}\n')
    with pytest.raises(InputError, match="row 2 has no 'answer'"):
        read_first_rows(str(tmp_path / "rows.jsonl"), ("tokens", "answer"), 3)
    assert len(read_first_rows(str(tmp_path / "rows.jsonl"), ("tokens", "answer"), 1)) == 1
