"""faster-whisper folders (CTranslate2): the same arrays as from the same weights in OpenAI's format, and all that is refused."""

import shutil

import numpy as np
import pytest
from ctranslate2_files import model_bytes, openai_state, stored_as, string, variable, whisper_variables, write_whisper

from converters import ctranslate2, torch_files, whisper
from converters.__main__ import main
from converters.recognise import recognise
from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import load_arrays
from ichigo_jax.text.train_tokenizer import train_whisper_tokenizer
from ichigo_jax.text.whisper import WhisperText

DIMS = dict(
    n_mels=80, n_audio_ctx=40, n_audio_state=32, n_audio_head=4, n_audio_layer=2,
    n_vocab=300, n_text_ctx=12, n_text_state=32, n_text_head=2, n_text_layer=3,
)  # fmt: skip
KINDS = ["float32", "float16", "bfloat16", "int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16"]


@pytest.fixture(scope="module")
def state():
    """A ``model_state_dict`` of random arrays."""
    package = pytest.importorskip("whisper")
    model = package.model.Whisper(package.model.ModelDimensions(**DIMS))
    random = np.random.default_rng(0)
    return {key: random.normal(size=value.shape).astype(np.float32) for key, value in model.state_dict().items()}


@pytest.fixture
def variables(state):
    return whisper_variables(state, DIMS)


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def refused(folder, capsys):
    """The one line that the import of a folder ends with; nothing is written."""
    target = folder.parent / "never"
    before = sorted(folder.parent.iterdir())
    assert run("import", folder, target) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sorted(folder.parent.iterdir()) == before
    assert str(folder) in error
    return error


def dequantized(stored):
    """Arrays that the integers stand for, computed as CTranslate2 does."""
    found = {}
    for name, array in stored.items():
        if name.endswith("_scale"):
            continue
        scale = stored.get(f"{name}_scale")
        if scale is not None:
            array = array.astype(np.float32) / np.reshape(scale, np.shape(scale) + (1,) * (array.ndim - 1))
        found[name] = array
    return found


# ---- the same arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_arrays_of_the_openai_checkpoint_with_its_weights(kind, state, variables, tmp_path):
    stored = stored_as(variables, kind)
    write_whisper(tmp_path / "ct2", stored)
    weights = openai_state(dequantized(stored), DIMS)  # the checkpoint of the very numbers that the folder stands for
    assert weights.keys() == state.keys()
    torch_files.save(tmp_path / "openai.pt", {"dims": DIMS, "model_state_dict": weights})

    assert run("import", tmp_path / "openai.pt", tmp_path / "expected") == 0
    assert run("import", tmp_path / "ct2", tmp_path / "found") == 0
    assert read_json(tmp_path / "found" / "config.json") == read_json(tmp_path / "expected" / "config.json")
    expected, found = load_arrays(tmp_path / "expected"), load_arrays(tmp_path / "found")
    assert found.keys() == expected.keys()
    for path in expected:
        assert found[path].dtype == expected[path].dtype, path
        np.testing.assert_array_equal(found[path], expected[path], err_msg=str(path))
    if kind.startswith("int"):  # and the numbers are those before quantising, as near as the bits allow
        original = state["decoder.blocks.1.cross_attn.value.weight"]
        array = found["decoder", "blocks", "cross_attention", "value"][1].reshape(32, 32).T
        assert np.abs(array - original).max() <= np.abs(original).max() / (127 if "8" in kind else 1024) * 0.51 + 2e-3


def test_import_says_what_became_of_the_integers(variables, tmp_path, capsys):
    write_whisper(tmp_path / "ct2", stored_as(variables, "int8_float16"))
    assert run("inspect", tmp_path / "ct2") == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["format"] == "ctranslate2" and lines["kind"] == "whisper" and lines["mels"] == "80"
    assert lines["dtype"] == "float16, float32 (float32 from int8)"
    assert lines["audio"] == "2 layers, width 32, 4 heads, 40 positions"
    assert lines["text"] == "3 layers, width 32, 2 heads, 12 positions"
    assert run("import", tmp_path / "ct2", tmp_path / "a") == 0
    assert "int8 weights written as float32; --dtype bfloat16" in capsys.readouterr().out
    assert run("import", tmp_path / "ct2", tmp_path / "b", "--dtype", "bfloat16") == 0
    assert "written as float32" not in capsys.readouterr().out
    provenance = read_json(tmp_path / "a" / "provenance.json")
    assert provenance["source_format"] == "ctranslate2" and set(provenance["source_sha256"]) == {"model.bin", "config.json"}


def test_a_folder_without_config_json_and_one_with_that_of_hugging_face(variables, tmp_path):
    folder = write_whisper(tmp_path / "ct2", variables)
    write_json(folder / "config.json", {"model_type": "whisper"})  # --copy_files takes it along
    assert recognise(folder).format == "ctranslate2"
    (folder / "config.json").unlink()
    assert run("import", folder, tmp_path / "model") == 0


@pytest.mark.parametrize("name", ["tokenizer.json alone", "with its settings"])
def test_the_tokenizer_of_the_folder_is_taken(name, variables, tmp_path):
    transformers = pytest.importorskip("transformers")
    train_whisper_tokenizer(["turn on the light"], tmp_path / "text", 260)
    folder = write_whisper(tmp_path / "ct2", variables)
    for file in ("tokenizer.json", "tokenizer_config.json")[: 1 if "alone" in name else 2]:
        shutil.copyfile(tmp_path / "text" / file, folder / file)
    assert run("import", folder, tmp_path / "model") == 0
    text = WhisperText.from_folder(tmp_path / "model" / "tokenizer")
    assert text.prompt == WhisperText.from_folder(tmp_path / "text").prompt
    # Without --format the export is one that can be written, and transformers takes it with its tokenizer.
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id == text.end
    assert tokenizer.convert_tokens_to_ids("<|startoftranscript|>") == text.start


def test_aliases_stand_for_any_variable_and_for_the_scale_of_integers(variables, tmp_path):
    """CTranslate2 stores equal arrays once; which of them are equal depends on the model."""
    weight, bias = "encoder/layer_1/ffn/linear_0/weight", "encoder/layer_1/ffn/linear_0/bias"
    same = {name: name.replace("layer_1", "layer_0") for name in (weight, bias)}
    for alias, name in same.items():
        variables[alias] = variables[name]
    whole = stored_as(variables, "int8")
    write_whisper(tmp_path / "whole", whole)
    fewer = {name: array for name, array in whole.items() if name not in (*same, f"{weight}_scale")}
    aliases = {**same, "decoder/projection/weight": "decoder/embeddings/weight"}
    write_whisper(tmp_path / "aliased", fewer, aliases=aliases)
    explicit = {**aliases, f"{weight}_scale": f"{same[weight]}_scale"}
    write_whisper(tmp_path / "explicit", fewer, aliases=explicit)
    assert ctranslate2.read_model(tmp_path / "explicit").faults == ()
    for name in ("whole", "aliased", "explicit"):
        assert run("import", tmp_path / name, tmp_path / f"{name}.model") == 0
    expected = load_arrays(tmp_path / "whole.model")
    for name in ("aliased", "explicit"):
        for path, array in load_arrays(tmp_path / f"{name}.model").items():
            np.testing.assert_array_equal(array, expected[path])


def test_an_alias_may_stand_for_an_alias(variables, tmp_path):
    first, second, third = "encoder/layer_0/ffn/linear_1/bias", "encoder/layer_1/ffn/linear_1/bias", "encoder/layer_norm/beta"
    variables[second] = variables[third] = variables[first]
    fewer = {name: array for name, array in variables.items() if name not in (second, third)}
    folder = write_whisper(tmp_path / "ct2", fewer, aliases={second: first, third: second})
    found = whisper.open_source(recognise(folder)).infos
    np.testing.assert_array_equal(found[third].read(), variables[first])


def test_a_projection_of_its_own_must_be_the_embedding(variables, tmp_path, capsys):
    projection = variables["decoder/embeddings/weight"]
    same = write_whisper(tmp_path / "same", variables | {"decoder/projection/weight": projection}, aliases={})
    assert "decoder/projection/weight" not in whisper.open_source(recognise(same)).infos
    other = write_whisper(tmp_path / "other", variables | {"decoder/projection/weight": projection + 1}, aliases={})
    assert "Whisper's are tied" in refused(other, capsys)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_all_faults_of_names_and_shapes_are_told_together(variables, tmp_path, capsys):
    del variables["decoder/layer_norm/beta"]
    variables["extra"] = np.zeros(2, np.float32)
    variables["decoder/layer_1/ffn/linear_0/weight"] = variables["decoder/layer_1/ffn/linear_0/weight"][:, :20]
    attention = "encoder/layer_0/self_attention/linear_0"
    variables[f"{attention}/weight"] = variables[f"{attention}/weight"][:80]
    variables["decoder/layer_0/attention/linear_1/bias"] = np.ones(64, np.float32)
    variables["decoder/layer_2/ffn/layer_norm/beta"] = variables["decoder/layer_2/ffn/layer_norm/beta"].astype(np.float16)
    variables["decoder/activation"] = np.array(1, np.int8)
    variables["decoder/rotary"] = np.array(1, np.int8)
    doubled = variable("encoder/conv1/bias", variables["encoder/conv1/bias"])
    folder = write_whisper(tmp_path / "ct2", variables, others=[doubled], aliases={"a": "nothing"})
    error = refused(folder, capsys)
    for fault in (
        "decoder/layer_norm/beta is missing",
        "extra is unknown",
        "decoder/layer_1/ffn/linear_0/weight has shape [128, 20], expected [128, 32]",
        f"{attention}[value]/weight has shape [16, 32], expected [32, 32]",
        "decoder/layer_0/attention/linear_1[key]/bias has numbers that are not zero",
        "decoder/layer_2/ffn/layer_norm/beta has dtype float16, but the same weight of another layer has float32",
        "decoder/activation 1 cannot be expressed, expected 3",
        "decoder/rotary is unknown",
        "encoder/conv1/bias occurs more than once",
        "a stands for nothing, which is missing",
    ):
        assert fault in error, fault


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("decoder/embeddings/weight_scale"), "decoder/embeddings/weight_scale is missing"),
        (lambda v: v.update({"encoder/conv1/weight_scale": np.ones(31, np.float32)}), "has shape [31]"),
        (lambda v: v.update({"encoder/conv1/weight_scale": np.ones(32, np.int32)}), "dtype int32"),
        (lambda v: v["encoder/conv2/weight_scale"].__setitem__(3, 0), "encoder/conv2/weight_scale has numbers that are not"),
        (lambda v: v.update({"encoder/conv1/bias_scale": np.ones(32, np.float32)}), "encoder/conv1/bias_scale is unknown"),
        (lambda v: v.update({"encoder/layer_norm/beta": np.ones(32, np.int32)}), "encoder/layer_norm/beta has dtype int32"),
    ],
)
def test_scales_that_do_not_belong_to_their_integers(change, message, variables, tmp_path, capsys):
    stored = stored_as(variables, "int8")
    change(stored)
    assert message in refused(write_whisper(tmp_path / "ct2", stored), capsys)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["encoder/num_heads"], "encoder/num_heads is missing"),
        (["encoder/conv1/weight", "decoder/num_heads"], "encoder/conv1/weight is missing; decoder/num_heads is missing"),
        (["decoder/position_encodings/encodings"], "decoder/position_encodings/encodings is missing"),
        (["decoder/scale_embeddings"], "decoder/scale_embeddings is missing"),
    ],
)
def test_dimensions_that_cannot_be_told(missing, message, variables, tmp_path, capsys):
    for name in missing:
        del variables[name]
    error = refused(write_whisper(tmp_path / "ct2", variables), capsys)
    assert message in error and error.count(missing[0]) == 1


def test_every_truncated_file_is_refused(variables, tmp_path, capsys):
    folder = write_whisper(tmp_path / "ct2", variables)
    whole = (folder / "model.bin").read_bytes()
    for size in [0, 3, 5, 12, 21, 25, 30, 200, len(whole) // 2, len(whole) - 70, len(whole) - 30, len(whole) - 1]:
        (folder / "model.bin").write_bytes(whole[:size])
        assert "truncated" in refused(folder, capsys), size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(version=5), "version 5 found, expected a CTranslate2 file of version 6"),
        (dict(version=7), "version 7 found"),
        (dict(version=0x04034B50), "expected a CTranslate2 file"),  # a zip archive, as PyTorch writes them
        (dict(spec="TransformerSpec"), "CTranslate2's TransformerSpec found, expected WhisperSpec"),
        (dict(spec="Wav2Vec2Spec"), "Wav2Vec2Spec found"),
        (dict(revision=2), "WhisperSpec of revision 2 found, expected WhisperSpec of revision 3"),
        (dict(revision=4), "revision 4 found"),
        (dict(others=[variable("odd", np.zeros(4, np.float32), code=6)]), "odd has dtype code 6, expected 0 to 5"),
        (dict(others=[variable("odd", np.zeros(4, np.float32), code=4)]), "odd has 16 bytes, float16 of shape [4] takes 8"),
        (dict(others=[string("odd")[:-1] + b"x"]), "expected text that ends with a zero byte"),
    ],
)
def test_files_of_another_kind(options, message, variables, tmp_path, capsys):
    assert message in refused(write_whisper(tmp_path / "ct2", variables, **options), capsys)


def test_bytes_after_the_end(variables, tmp_path, capsys):
    folder = write_whisper(tmp_path / "ct2", variables)
    (folder / "model.bin").write_bytes(model_bytes(variables) + b"more")
    assert "4 bytes found after the last alias" in refused(folder, capsys)


def test_a_model_in_pieces_says_how_to_join_them(variables, tmp_path, capsys):
    folder = write_whisper(tmp_path / "ct2", variables)
    whole = (folder / "model.bin").read_bytes()
    (folder / "model.bin").unlink()
    (folder / "model.bin.part1").write_bytes(whole[:1000])
    (folder / "model.bin.part2").write_bytes(whole[1000:])
    error = refused(folder, capsys)
    assert "model.bin in pieces (model.bin.part1, model.bin.part2) found" in error and "cat model.bin.* > model.bin" in error


def test_flags_that_do_not_belong(variables, tmp_path, capsys):
    folder = write_whisper(tmp_path / "ct2", variables)
    assert run("import", folder, tmp_path / "model", "--base", folder) == 2
    assert "--base with whisper as ctranslate2 found" in capsys.readouterr().err
    with pytest.raises(InputError, match="expected WhisperSpec"):
        write_whisper(tmp_path / "other", variables, spec="Odd")
        recognise(tmp_path / "other")
