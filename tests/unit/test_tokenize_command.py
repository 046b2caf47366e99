"""``tokenize`` and ``transcribe`` over real files, good and bad, of every kind that recorders write."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from flax import nnx
from reference_weights import filled
from test_speech_tokenizer import NANO, noise

from ichigo_jax import SpeechTokenizer, tokenize, transcribe
from ichigo_jax.inference.decoding_options import WHISPER_DEFAULTS
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerModel
from ichigo_jax.storage.model_folder import save_model
from ichigo_jax.text.train_tokenizer import train_whisper_tokenizer

RATE = 16000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    train_whisper_tokenizer(["turn on the light", "what is two plus two"], folder / "text", 270)
    state = nnx.to_pure_dict(nnx.state(filled(lambda rngs: SpeechTokenizerModel(NANO, rngs))))
    save_model(folder / "nano", "speech_tokenizer", NANO, state, {"source": "a test"}, folder / "text")
    return folder / "nano"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Good and bad files, in the order of their names; those that can be read have a number of codes."""
    folder = tmp_path_factory.mktemp("recordings")
    clip = noise(1, 9000)
    wide = np.interp(np.arange(54000) / 6, np.arange(9000), clip)

    def write(name, samples, rate=RATE, subtype="PCM_16"):
        soundfile.write(folder / name, samples, rate, subtype=subtype)

    write("a_8bit.wav", clip, subtype="PCM_U8")
    write("b_24bit.flac", clip, subtype="PCM_24")
    write("c_96khz.wav", wide, 96000, subtype="FLOAT")
    write("d_seven_channels.wav", np.stack([clip] * 7, axis=1), subtype="FLOAT")
    write("e_constant.wav", np.full(9000, 0.5))
    write("f_empty.wav", clip[:0])
    write("g_nan.wav", np.where(np.arange(9000) == 4321, np.nan, clip), subtype="FLOAT")
    (folder / "h_no_audio.mp3").write_text("this is no sound")
    write("i_too_short_for_a_code.wav", clip[:100])
    write("j_long.ogg", noise(2, 50_000), subtype="VORBIS")
    write("k.wav", clip, subtype="FLOAT")
    codes = {"a": 14, "b": 14, "c": 14, "d": 14, "e": 14, "i": 0, "j": 78, "k": 14}
    return folder, codes


def run(capsys, command, *arguments):
    with pytest.raises(SystemExit) as stop:
        command.main([str(argument) for argument in arguments])
    return (stop.value.code or 0, *capsys.readouterr())


def test_tokenize_tells_of_bad_files_and_goes_on(model, recordings, capsys, tmp_path):
    folder, codes = recordings
    arguments = ["--model", model, "--batch-size", 4, folder]
    code, out, err = run(capsys, tokenize, "--output", "-", *arguments)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [row["path"] for row in rows] == sorted(map(str, folder.iterdir())), "results in the order of the files"
    good = {row["path"].rpartition("/")[2][0]: row for row in rows if "tokens" in row}
    assert {name: len(row["tokens"]) for name, row in good.items()} == codes
    assert good["k"]["seconds"] == 0.5625 and good["c"]["seconds"] == 0.5625
    assert good["d"]["tokens"] == good["k"]["tokens"], "channels are averaged"
    assert len(set(good["e"]["tokens"][2:-2])) == 1, "nothing changes in a constant"
    expected = SpeechTokenizer.from_pretrained(model).encode([folder / "k.wav", folder / "j_long.ogg"])
    assert [good["k"]["tokens"], good["j"]["tokens"]] == [codes.tolist() for codes in expected]

    errors = {row["path"].rpartition("/")[2][0]: row["error"] for row in rows if "error" in row}
    assert errors.keys() == {"f", "g", "h"}
    for name, message in {"f": "found no samples", "g": "1 samples that are NaN", "h": "no audio that can be decoded"}.items():
        assert message in errors[name] and errors[name] in err
    assert "8 of 11 files" in err and "x real time" in err

    code, out, _ = run(capsys, tokenize, "--output", tmp_path / "tokens.parquet", *arguments)
    table = pq.read_table(tmp_path / "tokens.parquet").to_pylist()
    assert (code, out) == (1, "")
    assert [row["index"] for row in table] == [0, 1, 2, 3, 4, 8, 9, 10]
    assert [row["tokens"] for row in table] == [row["tokens"] for row in good.values()]


def test_transcribe_tells_of_bad_files_and_goes_on(model, recordings, capsys, tmp_path):
    folder, _ = recordings
    output = tmp_path / "text.jsonl"
    code, out, err = run(capsys, transcribe, "--model", model, "--output", output, "--batch-size", 4, folder)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert (code, out) == (1, "") and "x real time" in err
    assert [row["path"] for row in rows] == sorted(map(str, folder.iterdir()))
    assert ["error" in row for row in rows] == [False] * 5 + [True] * 3 + [False] * 3
    expected = SpeechTokenizer.from_pretrained(model).transcribe([folder / "k.wav"])
    assert rows[-1] == {"path": str(folder / "k.wav"), "text": expected[0]}


def test_transcribe_takes_whispers_options(model, recordings, capsys):
    file = recordings[0] / "k.wav"
    options = ["--language", "auto", "--beam-size", 2, "--temperature", "0,0.5"]
    code, out, _ = run(capsys, transcribe, "--model", model, *options, file)
    row = json.loads(out)
    assert code == 0 and row.keys() == {"path", "text", "language"} and row["language"] == "en"
    tokenizer = SpeechTokenizer.from_pretrained(model)
    options = WHISPER_DEFAULTS.replace(language=None, beam_size=2, temperature=(0.0, 0.5))
    assert [row["text"]] == tokenizer.transcribe([file], options)

    code, _, err = run(capsys, transcribe, "--model", model, "--prompt", "earlier", file)
    assert code == 2 and "<|startofprev|>" in err, "this small vocabulary has no place for it"
    code, _, err = run(capsys, transcribe, "--model", model, "--language", "vi", file)
    assert code == 2 and "language 'vi' found" in err


def test_bounds_of_a_file_are_flags(model, recordings, capsys):
    folder, codes = recordings
    for flag, bound, message in [
        ("--max-seconds", 1, "expected at most 1 s"),
        ("--max-bytes", 100_000, "expected at most 100000"),
    ]:
        files = [folder / "j_long.ogg", folder / "k.wav"]
        code, out, err = run(capsys, tokenize, "--model", model, "--output", "-", flag, bound, *files)
        long, short = map(json.loads, out.splitlines())
        assert code == 1 and message in long["error"] and message in err
        assert len(short["tokens"]) == codes["k"]


def test_faults_of_the_user_are_one_line(model, recordings, capsys, tmp_path):
    folder, _ = recordings
    for arguments, message in [
        (["--model", model, "--output", "tokens.csv", folder], "expected a name ending in .parquet"),
        (["--model", model, "--output", "-", tmp_path / "none"], "no such file or folder"),
        (["--model", model, "--output", "-", "--batch-size", 0, folder], "batch size 0"),
        (["--model", folder, "--output", "-", folder], "no such file"),
        (["--model", model, "--output", "-", folder / "f_empty.wav"], "none of the 1 files could be read"),
    ]:
        code, _, err = run(capsys, tokenize, *arguments)
        assert code == 2 and message in err.splitlines()[-1]


def test_transcribe_leaves_what_is_there(model, recordings, capsys, tmp_path):
    output = tmp_path / "text.jsonl"
    output.write_text("mine")
    code, _, err = run(capsys, transcribe, "--model", model, "--output", output, recordings[0] / "k.wav")
    assert code == 2 and "exists already" in err and output.read_text() == "mine"
    code, _, err = run(capsys, transcribe, "--model", model, tmp_path / "none.wav")
    assert code == 2 and "no such file or folder" in err
