"""The commands on manifests, outputs and flags that users get wrong: one row's error or one line, before any work."""

import json
import os
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from flax import nnx
from reference_weights import filled
from test_assistant import Ears
from test_generation import save_tiny_model
from test_speech_tokenizer import NANO, noise

from ichigo_jax import SpeechTokenizer, evaluate, generate, synthesize, tokenize, train_text_tokenizer, transcribe
from ichigo_jax.inference.decoding_options import WHISPER_DEFAULTS
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerModel
from ichigo_jax.storage import read_json
from ichigo_jax.storage.model_folder import save_model
from ichigo_jax.text.train_tokenizer import train_whisper_tokenizer
from ichigo_jax.text.whisper import language_code

NO_MODEL = "no-model-here"  # what fails before the model is loaded fails without one
LENGTHS = [3000, 4000, 5000, 6000]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    train_whisper_tokenizer(["turn on the light", "what is two plus two"], folder / "text", 270)
    state = nnx.to_pure_dict(nnx.state(filled(lambda rngs: SpeechTokenizerModel(NANO, rngs))))
    save_model(folder / "nano", "speech_tokenizer", NANO, state, {"source": "a test"}, folder / "text")
    return folder / "nano"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number, length in enumerate(LENGTHS):
        soundfile.write(folder / f"{number}.wav", noise(number, length), 16000)
    return folder


@pytest.fixture(scope="module")
def codes(model, clips):
    tokenizer = SpeechTokenizer.from_pretrained(model)
    return {str(clips / f"{number}.wav"): tokenizer.encode([clips / f"{number}.wav"])[0].tolist() for number in range(4)}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assistant")
    save_tiny_model(folder)
    return folder / "model"


def manifest(folder, *rows, name="m.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def run(capsys, command, *arguments):
    with pytest.raises(SystemExit) as stop:
        command.main([str(argument) for argument in arguments])
    return (stop.value.code or 0, *capsys.readouterr())


def refused(capsys, command, *arguments):
    """The one line that a command ends with."""
    code, out, err = run(capsys, command, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
    return err


class TestTokenize:
    def test_the_programs_state_is_not_the_users(self, model, clips, codes, capsys, tmp_path):
        fields = {"error": "no such file", "seconds": 77, "tokens": "mine", "index": 9, "text": "x", "row": 1}
        rows = [{"path": str(clips / f"{number}.wav")} for number in range(4)]
        rows[1] |= fields
        rows.insert(2, {"path": "gone.wav", "speaker": "ann"})
        listed = manifest(tmp_path, *rows)
        code, out, _ = run(capsys, tokenize, "--model", model, "--output", "-", listed)
        lines = [json.loads(line) for line in out.splitlines()]
        assert code == 1 and ["error" in line for line in lines] == [False, False, True, False, False]
        assert {line["path"]: line["tokens"] for line in lines if "tokens" in line} == codes

        run(capsys, tokenize, "--model", model, "--output", tmp_path / "o.parquet", listed)
        table = pq.read_table(tmp_path / "o.parquet").to_pylist()
        assert {row["path"]: row["tokens"] for row in table} == codes and [row["index"] for row in table] == [0, 1, 3, 4]
        kept = {"error": "no such file", "manifest_seconds": 77, "manifest_tokens": "mine", "manifest_index": 9, "row": 1}
        assert table[1].items() >= kept.items() and table[1]["seconds"] == 0.25
        assert table[0]["manifest_seconds"] is None and table[0]["speaker"] is None, "the union of all rows' fields"

    def test_two_rows_of_one_clip_both_stay(self, model, clips, capsys, tmp_path):
        path = str(clips / "0.wav")
        listed = manifest(tmp_path, {"path": path, "answer": "yes"}, {"path": path, "answer": "of course"}, {"path": path})
        assert run(capsys, tokenize, "--model", model, "--output", tmp_path / "o.parquet", listed, path)[0] == 0
        table = pq.read_table(tmp_path / "o.parquet").to_pylist()
        assert [row["answer"] for row in table] == ["yes", "of course", None]

    @pytest.mark.parametrize(
        "values, found",
        [
            ((12, "ann"), "int (.*0.wav) and str"),
            (("ann", 12), "str (.*0.wav) and int"),
            (([1], ["a"]), "list"),
            (({"a": 1}, {"a": "x"}), "dict"),
            ((1, 2**70), "int"),
            (({}, {}), "dict"),
            (("a", "\ud800"), "str"),
            ((True, 3), "bool (.*0.wav) and int"),
        ],
    )
    def test_fields_of_several_types_are_found_before_the_work(self, clips, capsys, tmp_path, values, found):
        rows = [{"path": str(clips / f"{number}.wav"), "speaker": value} for number, value in enumerate(values)]
        line = refused(capsys, tokenize, "--model", NO_MODEL, "--output", tmp_path / "o.parquet", manifest(tmp_path, *rows))
        assert "field 'speaker' of the manifests: found " in line and found.split(" (")[0] in line

    def test_names_of_every_kind(self, model, clips, codes, capsys, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        for number, name in enumerate([b"caf\xe9.wav", b"new\nline.wav", "č\u2028.wav".encode()]):
            os.symlink(os.fsencode(clips / f"{number}.wav"), os.fsencode(folder) + b"/" + name)
        (folder / "line\nthat is no sound.wav").write_text("x")
        code, out, err = run(capsys, tokenize, "--model", model, "--output", "-", folder)
        lines = {row["path"].rpartition("/")[2]: row for row in map(json.loads, out.split("\n")[:-1])}
        assert code == 1 and lines.keys() == {"caf\\xe9.wav", "new\nline.wav", "č\u2028.wav", "line\nthat is no sound.wav"}
        assert lines["caf\\xe9.wav"]["tokens"] == codes[str(clips / "0.wav")]
        assert sum("that is no sound.wav" in line for line in err.split("\n")) == 1
        out.encode("utf-8")
        assert run(capsys, tokenize, "--model", model, "--output", tmp_path / "o.parquet", folder)[0] == 1
        assert len(pq.read_table(tmp_path / "o.parquet").to_pylist()) == 3

    def test_a_pipe(self, model, clips, codes, capsys, tmp_path):
        for name, read in (("lines", lambda data: json.loads(data)["tokens"]), ("t.parquet", None)):
            os.mkfifo(tmp_path / name)
            got = []
            reader = threading.Thread(target=lambda name=name, got=got: got.append((tmp_path / name).read_bytes()))
            reader.start()
            assert run(capsys, tokenize, "--model", model, "--output", tmp_path / name, clips / "0.wav")[0] == 0
            reader.join(10)
            if read is None:
                (tmp_path / "copy").write_bytes(got[0])
                assert pq.read_table(tmp_path / "copy").to_pylist()[0]["tokens"] == codes[str(clips / "0.wav")]
            else:
                assert read(got[0]) == codes[str(clips / "0.wav")]

    def test_dev_stdout(self, model, clips, codes, capsys):
        for command in (tokenize, transcribe):
            code, out, _ = run(capsys, command, "--model", model, "--output", "/dev/stdout", clips)
            assert code == 0 and [json.loads(line)["path"] for line in out.splitlines()] == list(codes)


def test_transcribes_own_output_is_a_manifest(model, clips, capsys, tmp_path):
    rows = [{"path": str(clips / f"{number}.wav")} for number in range(4)]
    plain = run(capsys, transcribe, "--model", model, manifest(tmp_path, *rows))[1]
    for fields in ({"error": "no such file"}, {"text": "mine", "language": "vi"}, {"seconds": 1, "error": None}):
        listed = manifest(tmp_path, rows[0], rows[1] | fields, rows[2], rows[3] | fields, name="again.jsonl")
        assert run(capsys, transcribe, "--model", model, listed)[1] == plain


class TestEvaluate:
    def rows(self, clips):
        rows = [{"path": str(clips / f"{number}.wav"), "text": "turn on", "answer": "yes", "kind": "a"} for number in range(4)]
        rows[1] |= {"error": "mine", "transcription": "mine", "reply": 3}
        rows[3] |= {"kind": None}
        return rows

    def test_one_bad_clip_of_a_speech_tokenizer(self, model, clips, capsys, tmp_path):
        rows = self.rows(clips)
        good = manifest(tmp_path, *rows)
        assert run(capsys, evaluate, "speech-tokenizer", "--model", model, "--output", tmp_path / "good.json", good)[0] == 0
        bad = manifest(tmp_path, rows[0], rows[1], {"path": "gone.wav", "text": "x"}, {"path": "a" * 300, "text": "x"}, *rows[2:])
        code, out, err = run(capsys, evaluate, "speech-tokenizer", "--model", model, "--output", tmp_path / "bad.json", bad)
        assert code == 1 and "gone.wav: no such file" in err and "unusable_clips           2\n" in out
        good, bad = read_json(tmp_path / "good.json"), read_json(tmp_path / "bad.json")
        assert bad["metrics"] == good["metrics"] | {"unusable_clips": 2} and bad["code_counts"] == good["code_counts"]
        assert ["error" in row for row in bad["rows"]] == [False, False, True, True, False, False]
        assert [row for row in bad["rows"] if "error" not in row] == good["rows"]
        assert good["rows"][1]["manifest_error"] == "mine" and good["rows"][1]["manifest_transcription"] == "mine"
        tokenizer = SpeechTokenizer.from_pretrained(model)
        assert [row["transcription"] for row in good["rows"]] == tokenizer.transcribe([row["path"] for row in rows])

    def test_bad_clips_of_an_assistant(self, language_model, clips, capsys, tmp_path, monkeypatch):
        class Heard(Ears):
            def encode(self, audio):
                return [np.full(1000 if len(clip) == LENGTHS[2] else 3, 3, np.int32) for clip in audio]

        monkeypatch.setattr(evaluate.SpeechTokenizer, "from_pretrained", lambda _: Heard())
        rows = self.rows(clips)
        listed = manifest(tmp_path, {"path": "gone.wav", "text": "x", "answer": "y", "kind": "b"}, *rows)
        arguments = [
            "assistant",
            "--model",
            language_model,
            "--speech-tokenizer",
            "ears",
            "--output",
            tmp_path / "o.json",
            listed,
        ]
        code, out, err = run(capsys, evaluate, *arguments)
        assert code == 1 and "2.wav: found a request of" in err and "unusable_clips           2\n" in out
        result = read_json(tmp_path / "o.json")
        assert ["error" in row for row in result["rows"]] == [True, False, False, True, False]
        assert result["metrics"].keys() == {"answers_exact", "wer", "answers_exact/a", "unusable_clips"}
        assert result["rows"][2]["manifest_reply"] == 3 and result["rows"][2]["reply"] == result["rows"][1]["reply"]

    def test_nothing_usable(self, model, capsys, tmp_path):
        listed = manifest(tmp_path, {"path": "gone.wav", "text": "x"})
        code, _, err = run(capsys, evaluate, "speech-tokenizer", "--model", model, "--output", tmp_path / "o.json", listed)
        assert code == 2 and "none of the 1 clips can be used" in err and not (tmp_path / "o.json").exists()

    def test_standard_output_holds_the_result_alone(self, model, clips, capsys, tmp_path):
        listed = manifest(tmp_path, {"path": str(clips / "0.wav"), "text": "half \ud800"})
        for name in ("-", "/dev/stdout"):
            code, out, err = run(capsys, evaluate, "speech-tokenizer", "--model", model, "--output", name, listed)
            assert code == 0 and json.loads(out)["metrics"]["unusable_clips"] == 0 and "wer" in err

    @pytest.mark.parametrize(
        "row, message",
        [
            ({"kind": 3}, "row 2 has kind 3, expected a string"),
            ({"kind": ["a"]}, "row 2 has kind ['a']"),
            ({"answer": 4}, "row 2 has no 'answer'"),
            ({"text": None}, "row 2 has no 'text'"),
            ({"seconds": float("nan")}, "row 2 has seconds nan"),
        ],
    )
    def test_rows_are_checked_before_the_work(self, clips, capsys, tmp_path, row, message):
        rows = self.rows(clips)[:1]
        listed = manifest(tmp_path, *rows, rows[0] | row)
        arguments = ["--model", NO_MODEL, "--speech-tokenizer", NO_MODEL, "--output", tmp_path / "o.json", listed]
        assert message in refused(capsys, evaluate, "assistant", *arguments)


class TestOutputsAreCheckedFirst:
    @pytest.mark.parametrize("where", ["there", "there/below", "a" * 300, "folder"])
    def test_before_anything_is_loaded(self, clips, capsys, tmp_path, where):
        (tmp_path / "there.parquet").touch()
        (tmp_path / "folder.parquet").mkdir()
        target = tmp_path / f"{where}.parquet"
        if where == "there/below":
            target = tmp_path / "there.parquet" / "below.parquet"
        expected = "exists already" if where in ("there", "folder") else "cannot be written"
        listed = manifest(tmp_path, {"path": str(clips / "0.wav"), "text": "x"})
        for command in (tokenize, transcribe):
            assert expected in refused(capsys, command, "--model", NO_MODEL, "--output", target, clips)
        assert expected in refused(capsys, synthesize, "--output", target, "--smoke")
        family = ["--family", "whisper", "--vocab-size", 270]
        assert expected in refused(capsys, train_text_tokenizer, *family, "--output", target, "no-manifest.jsonl")
        if where != "there":  # evaluate replaces its own file, as it always did
            expected = "found a folder" if where == "folder" else expected
            assert expected in refused(capsys, evaluate, "speech-tokenizer", "--model", NO_MODEL, "--output", target, listed)
        assert (tmp_path / "folder.parquet").is_dir()

    def test_inputs_before_the_model(self, capsys, tmp_path):
        for command in (tokenize, transcribe):
            line = refused(capsys, command, "--model", NO_MODEL, "--output", "-", tmp_path / "none")
            assert "no such file or folder" in line


class TestFlags:
    @pytest.mark.parametrize(
        "flags",
        [
            "--batch-size 0",
            "--batch-size x",
            "--max-seconds nan",
            "--max-seconds -1",
            "--max-bytes 0",
            "--max-bytes 1.5",
            "--nonsense",
        ],
    )
    def test_of_commands_over_files(self, clips, capsys, flags):
        for command in (tokenize, transcribe):
            line = refused(capsys, command, "--model", NO_MODEL, "--output", "-", *flags.split(), clips)
            assert flags.split()[0] in line and "--help" in line

    @pytest.mark.parametrize(
        "flags",
        [
            "--temperature nan",
            "--temperature 0,inf",
            "--temperature -1",
            "--temperature a",
            "--beam-size 0",
            "--language Klingon",
            "--language en-US",
            "--prompt caf\udce9",
        ],
    )
    def test_of_transcribe(self, clips, capsys, flags):
        line = refused(capsys, transcribe, "--model", NO_MODEL, *flags.split(), clips)
        assert flags.split()[0].strip("-").replace("-", "_") in line.replace("-", "_")

    @pytest.mark.parametrize(
        "flags",
        [
            "--temperature nan",
            "--temperature inf",
            "--temperature -0.1",
            "--top-p nan",
            "--top-p 0",
            "--top-p 1.5",
            "--min-p -1",
            "--top-k -1",
            "--top-k x",
            "--repetition-penalty 0",
            "--repetition-penalty inf",
            "--seed -1",
            "--seed 4294967296",
            "--seed 99999999999999999999999",
            "--max-new-tokens 0",
            "--system caf\udce9",
        ],
    )
    def test_of_generate(self, capsys, flags):
        line = refused(capsys, generate, "--model", NO_MODEL, "--prompt", "hi", *flags.split())
        assert flags.split()[0].strip("-").replace("-", "_") in line.replace("-", "_")

    def test_of_generate_at_their_ends(self, language_model, capsys):
        flags = ["--top-k", 10**30, "--seed", 2**32 - 1, "--temperature", 1, "--max-new-tokens", 2]
        assert run(capsys, generate, "--model", language_model, "--prompt", "hi", *flags)[0] == 0

    @pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
    def test_seeds_in_python(self, language_model, seed):
        with pytest.raises(ValueError, match=f"seed {seed} found, expected 0 to 4294967295"):
            LanguageModel.from_pretrained(language_model).generate([[1]], 2, seed=seed)


def test_languages_as_whisper_calls_them():
    names = {"Vietnamese": "vi", "mandarin": "zh", "Lao": "lo", "JW": "jw", "haw": "haw", "Cantonese": "yue", "FLEMISH": "nl"}
    for name, code in {**names, "xx": "xx", "abc": "abc"}.items():
        assert language_code(name) == code == WHISPER_DEFAULTS.replace(language=name).language
    for name in ("Klingon", "en-US", "", "e", "fr_FR"):
        with pytest.raises(ValueError, match=f"language '{name}' found, expected an abbreviation or name"):
            WHISPER_DEFAULTS.replace(language=name)


@pytest.mark.parametrize(
    "option", [{"temperature": (float("nan"),)}, {"temperature": (0.0, float("inf"))}, {"logprob_threshold": float("nan")}]
)
def test_decoding_options_are_numbers(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        WHISPER_DEFAULTS.replace(**option)
    with pytest.raises(ValueError, match="patience"):
        WHISPER_DEFAULTS.replace(beam_size=2, patience=float("inf"))


@pytest.mark.parametrize("language, code", [("EN", "en"), ("English", "en"), ("english ", "en")])
def test_languages_by_name(model, clips, capsys, language, code):
    plain = run(capsys, transcribe, "--model", model, "--language", code, clips / "0.wav")
    assert run(capsys, transcribe, "--model", model, "--language", language, clips / "0.wav")[:2] == plain[:2]


@pytest.mark.parametrize(
    "row, message",
    [({"text": 5}, "text 5"), ({"answer": ["a"], "text": "x"}, "answer ['a']"), ({"text": "\ud800"}, "text '\\ud800'")],
)
def test_texts_of_a_text_tokenizer(capsys, tmp_path, row, message):
    listed = manifest(tmp_path, {"text": "fine", "answer": None}, row)
    flags = ["--family", "whisper", "--vocab-size", 270, "--output", tmp_path / "o"]
    assert f"m.jsonl: row 2 has {message}, expected Unicode text" in refused(capsys, train_text_tokenizer, *flags, listed)
