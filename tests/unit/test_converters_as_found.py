"""Hugging Face folders as people have them: read as transformers reads them, or refused in one line that says what to do."""

import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from test_converters_llama import LLAMA3, SIZES, assert_same_bits, nothing_left, our_logits, run, tensors_of

from converters import engine, language_model, llama, safetensors_files
from ichigo_jax import LanguageModel
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import load_arrays, load_config
from ichigo_jax.text.train_tokenizer import train_llama_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 275, (2, 20))
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
EMBEDDING, HEAD = llama.EMBEDDING, llama.HEAD


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tied and an untied model of each family, with a tokenizer."""
    root = tmp_path_factory.mktemp("hf")
    train_llama_tokenizer(["turn on the kitchen light"], root / "tokenizer", 256, sound_codes=9, durations=False)
    for family, (config_class, model_class) in CLASSES.items():
        for tied in (True, False):
            torch.manual_seed(0)
            config = config_class(**SIZES | {"vocab_size": 275}, tie_word_embeddings=tied)
            folder = root / f"{family}-{'tied' if tied else 'untied'}"
            model_class(config).save_pretrained(folder)
            shutil.copytree(root / "tokenizer", folder, dirs_exist_ok=True)
    return root


@pytest.fixture
def source(folders, tmp_path):
    """Copies one of the folders to change it."""
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / "source"))


def write_weights(folder, weights):
    infos = {key: engine.TensorInfo(value.dtype, value.shape) for key, value in weights.items()}
    (folder / safetensors_files.SINGLE).unlink(missing_ok=True)
    safetensors_files.write_folder(folder, infos, weights.__getitem__, 10**9)


def change(folder, changed):
    """Writes the folder's weights anew as ``changed`` makes them of a dictionary."""
    weights = {key: np.array(value) for key, value in tensors_of(folder).items()}
    write_weights(folder, changed(weights))


def in_two_shards(folder, weight_map=lambda names: names):
    """The folder's weights in two files; ``weight_map`` changes what the index says."""
    weights = {key: np.array(value) for key, value in tensors_of(folder).items()}
    names = {key: f"{1 + (number % 2)}.safetensors" for number, key in enumerate(sorted(weights))}
    for file in sorted(set(names.values())):
        shard = {key: weights[key] for key in names if names[key] == file}
        infos = {key: engine.TensorInfo(value.dtype, value.shape) for key, value in shard.items()}
        safetensors_files.write_file(folder / file, infos, shard.__getitem__)
    (folder / safetensors_files.SINGLE).unlink()
    write_json(folder / safetensors_files.INDEX, {"metadata": {}, "weight_map": weight_map(names)})


def set_config(folder, name="config.json", **fields):
    write_json(folder / name, read_json(folder / name) | fields)


def their_logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def imported(folder, target, capsys, *flags):
    """Imports; what the command said."""
    assert run("import", folder, target, *flags) == 0
    return capsys.readouterr().out


def is_tied(folder):
    return load_config(folder, "language_model", LanguageModelConfig).llama.tie_word_embeddings


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# A tied head that is stored as well ----------------------------------------------------------------------------------

TIED = ["llama-tied", "qwen2-tied"]


def with_equal_head(weights):
    return weights | {HEAD: weights[EMBEDDING]}


def with_other_head(weights):
    return weights | {HEAD: weights[EMBEDDING] + np.float32(0.1)}


@pytest.mark.parametrize(("name", "sharded"), [("llama-tied", False), ("llama-tied", True), ("qwen2-tied", True)])
def test_an_equal_head_is_left_out(source, tmp_path, capsys, name, sharded):
    folder = source(name)
    before = tensors_of(folder)
    change(folder, with_equal_head)
    if sharded:
        in_two_shards(folder)
    out = imported(folder, tmp_path / "model", capsys)
    assert "left out: lm_head.weight" in out and is_tied(tmp_path / "model")
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), their_logits(folder), atol=1e-4)
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    assert_same_bits(before, tensors_of(tmp_path / "hf"))


@pytest.mark.parametrize(("name", "sharded"), [("llama-tied", False), ("llama-tied", True), ("qwen2-tied", True)])
def test_another_head_unties_the_model(source, tmp_path, capsys, name, sharded):
    folder = source(name)
    change(folder, with_other_head)
    before, expected = tensors_of(folder), their_logits(folder)
    if sharded:
        in_two_shards(folder)
    out = imported(folder, tmp_path / "model", capsys)
    assert "the head and the embedding differ" in out and not is_tied(tmp_path / "model")
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), expected, atol=1e-4)
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    assert_same_bits(before, tensors_of(tmp_path / "hf"))
    assert read_json(tmp_path / "hf" / "config.json")["tie_word_embeddings"] is False
    np.testing.assert_allclose(their_logits(tmp_path / "hf"), expected, atol=1e-5)


def test_heads_that_are_equal_after_the_cast_are_equal(source, tmp_path, capsys):
    folder = source("llama-tied")
    short = lambda weights: weights[EMBEDDING].astype(ml_dtypes.bfloat16).astype(np.float32)  # noqa: E731
    change(folder, lambda weights: weights | {EMBEDDING: short(weights), HEAD: short(weights) * np.float32(1 + 1e-5)})
    assert "differ" in imported(folder, tmp_path / "float32", capsys)
    assert "left out: lm_head.weight" in imported(folder, tmp_path / "bfloat16", capsys, "--dtype", "bfloat16")
    change(folder, lambda weights: weights | {HEAD: weights[EMBEDDING].astype(np.float64)})
    assert "left out: lm_head.weight" in imported(folder, tmp_path / "two-dtypes", capsys)
    third = lambda weights: (weights[EMBEDDING] / 3).astype(ml_dtypes.bfloat16)  # noqa: E731
    change(folder, lambda weights: weights | {EMBEDDING: weights[EMBEDDING] / 3, HEAD: third(weights)})
    assert "differ" in imported(folder, tmp_path / "rounded", capsys)
    assert load_arrays(tmp_path / "rounded")["lm_head",].dtype == ml_dtypes.bfloat16


def test_a_head_alone_is_the_embedding(source, tmp_path, capsys):
    folder = source("qwen2-tied")
    expected = their_logits(folder)
    change(folder, lambda weights: {HEAD if key == EMBEDDING else key: value for key, value in weights.items()})
    assert "lm_head.weight alone is stored" in imported(folder, tmp_path / "model", capsys)
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("name", TIED)
def test_an_index_may_name_a_tied_head_that_no_shard_has(source, tmp_path, name):
    folder = source(name)
    in_two_shards(folder, lambda names: names | {HEAD: "2.safetensors"})
    language_model.import_hf(folder, tmp_path / "model", None)
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), their_logits(folder), atol=1e-4)


def test_a_head_that_the_index_does_not_name_is_found_all_the_same(source, tmp_path, capsys):
    folder = source("llama-tied")
    change(folder, with_other_head)
    in_two_shards(folder, lambda names: {key: file for key, file in names.items() if key != HEAD})
    assert "differ" in imported(folder, tmp_path / "model", capsys) and not is_tied(tmp_path / "model")


@pytest.mark.parametrize("name", ["llama-untied", "qwen2-untied"])
def test_an_untied_model_needs_its_head(source, tmp_path, capsys, name):
    folder = source(name)
    change(folder, lambda weights: {key: value for key, value in weights.items() if key != HEAD})
    assert run("import", folder, tmp_path / "model") == 2
    assert "lm_head.weight is missing (if it is the embedding, set tie_word_embeddings to true" in one_line(capsys)
    values = read_json(folder / "config.json")
    del values["tie_word_embeddings"]  # false then, says the format
    write_json(folder / "config.json", values)
    assert run("import", folder, tmp_path / "model") == 2
    assert "set tie_word_embeddings to true" in one_line(capsys) and nothing_left(tmp_path, "source")


@pytest.mark.parametrize(("changed", "stays_tied"), [(with_equal_head, True), (with_other_head, False)])
@pytest.mark.parametrize("name", TIED)
def test_sound_tokens_for_a_folder_with_both(folders, tmp_path, capsys, name, changed, stays_tied):
    folder = tmp_path / "source"
    shutil.copytree(folders / name, folder)
    write_tokenizer_without_sound(folder)
    change(folder, changed)
    assert run("extend-vocab", folder, tmp_path / "extended", "--sound-codes", 8) == 0
    assert ("left out" if stays_tied else "differ") in capsys.readouterr().out
    assert (HEAD in tensors_of(tmp_path / "extended")) != stays_tied
    assert read_json(tmp_path / "extended" / "config.json")["tie_word_embeddings"] == stays_tied
    language_model.import_hf(tmp_path / "extended", tmp_path / "model", None)
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), their_logits(tmp_path / "extended"), atol=1e-4)


def write_tokenizer_without_sound(folder):
    description = read_json(folder / "tokenizer.json")
    description["added_tokens"] = [token for token in description["added_tokens"] if "sound" not in token["content"]]
    write_json(folder / "tokenizer.json", description)


# Links ---------------------------------------------------------------------------------------------------------------


def link_weights(folder, elsewhere):
    link(folder / "model.safetensors", elsewhere / "llama.safetensors")


def link_a_shard(folder, elsewhere):
    in_two_shards(folder)
    link(folder / "2.safetensors", elsewhere / "sha256")


def link_everything(folder, elsewhere):
    """As the hub's cache: a snapshot of links with the bytes in blobs."""
    for number, file in enumerate(sorted(folder.iterdir())):
        link(file, elsewhere / f"blob{number}")


def link_config_and_index(folder, elsewhere):
    in_two_shards(folder)
    link(folder / "config.json", elsewhere / "a.json")
    link(folder / safetensors_files.INDEX, elsewhere / "b.json")


def link_tokenizer(folder, elsewhere):
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        link(folder / name, elsewhere / name)


def link(file, to):
    shutil.move(file, to)
    os.symlink(os.path.relpath(to, file.parent), file)


LINKS = [link_weights, link_a_shard, link_everything, link_config_and_index, link_tokenizer]


@pytest.mark.parametrize("linked", LINKS)
def test_a_folder_of_links_is_the_users_own(source, tmp_path, linked):
    folder, elsewhere = source("llama-untied"), tmp_path / "elsewhere"
    before = tensors_of(folder)
    elsewhere.mkdir()
    linked(folder, elsewhere)
    language_model.import_hf(folder, tmp_path / "model", None)
    assert not any(file.is_symlink() for file in (tmp_path / "model").rglob("*"))
    language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    assert_same_bits(before, tensors_of(tmp_path / "hf"))
    assert LanguageModel.from_pretrained(tmp_path / "model").tokenizer is not None
    assert run("inspect", folder) == 0


@pytest.mark.parametrize("linked", LINKS)
def test_a_link_to_nothing_is_named(source, tmp_path, capsys, linked):
    folder, elsewhere = source("llama-untied"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    linked(folder, elsewhere)
    shutil.rmtree(elsewhere)
    assert run("import", folder, tmp_path / "model") == 2
    assert "a link to ../elsewhere/" in one_line(capsys) and nothing_left(tmp_path, "source")


@pytest.mark.parametrize("part", ["params", "tokenizer", "config.json", "whole"])
def test_model_folders_with_links_are_read(source, tmp_path, part):
    language_model.import_hf(source("llama-tied"), tmp_path / "model", None)
    expected = our_logits(tmp_path / "model", TOKENS)
    file = tmp_path / "model" if part == "whole" else tmp_path / "model" / part
    link(file, tmp_path / "elsewhere")
    np.testing.assert_array_equal(our_logits(tmp_path / "model", TOKENS), expected)
    language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_a_pointer_of_git_lfs_is_told(source, tmp_path, capsys):
    folder = source("llama-tied")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert run("import", folder, tmp_path / "model") == 2
    assert "run git lfs pull" in one_line(capsys)


# Dtypes --------------------------------------------------------------------------------------------------------------


def mixed(weights):
    return {key: value.astype(ml_dtypes.bfloat16) if ".layers.1." in key else value for key, value in weights.items()}


def double(weights):
    return {key: value.astype(np.float64) for key, value in weights.items()}


def eight_bits(weights):
    return {key: value.astype(ml_dtypes.float8_e4m3fn) if "proj.w" in key else value for key, value in weights.items()}


def half_first(weights):
    return {key: value.astype(np.float16) if ".layers.0.self_attn" in key else value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "qwen2-tied",
            mixed,
            "model.layers.1.input_layernorm.weight has dtype bfloat16, but the same weight of another layer has float32",
        ),
        ("llama-untied", half_first, "has dtype float32, but the same weight of another layer has float16"),
        ("llama-untied", double, "model.embed_tokens.weight has dtype float64, expected one of float32, float16, bfloat16"),
        ("qwen2-tied", eight_bits, "has dtype float8_e4m3fn, expected one of float32"),
    ],
)
def test_dtype_casts_what_a_model_folder_does_not_keep(source, tmp_path, capsys, name, changed, message):
    folder = source(name)
    change(folder, changed)
    assert run("inspect", folder) == 0
    capsys.readouterr()
    assert run("import", folder, tmp_path / "model") == 2
    error = one_line(capsys)
    assert message in error and "import with --dtype float32 or bfloat16" in error and len(error) < 700
    for dtype in ("float32", "bfloat16"):
        language_model.import_hf(folder, tmp_path / dtype, dtype)
        assert {array.dtype.name for array in load_arrays(tmp_path / dtype).values()} == {dtype}
    np.testing.assert_allclose(our_logits(tmp_path / "float32", TOKENS), their_logits(folder), atol=1e-4)


def test_integers_are_no_weights_under_any_dtype(source, tmp_path, capsys):
    folder = source("llama-untied")
    change(folder, lambda weights: {k: v.astype(np.int8) if "proj" in k else v for k, v in weights.items()})
    for flags in ((), ("--dtype", "float32")):
        assert run("import", folder, tmp_path / "model", *flags) == 2
        error = one_line(capsys)
        assert "has dtype int8" in error and "quantised weights cannot be read" in error and "--dtype" not in error
        assert "(and 20 others)" in error and len(error) < 500


@pytest.mark.parametrize(
    ("key", "value"),
    [(EMBEDDING, np.nan), ("model.layers.2.mlp.up_proj.weight", np.nan), ("model.norm.weight", np.inf), (HEAD, -np.inf)],
)
def test_weights_that_are_no_numbers_are_refused(source, tmp_path, capsys, key, value):
    folder = source("llama-untied")

    def broken(weights):
        weights[key].flat[3] = value
        return weights

    change(folder, broken)
    for command in (("import",), ("import", "--dtype", "bfloat16")):
        assert run(command[0], folder, tmp_path / "model", *command[1:]) == 2
        assert f"{folder}: {key} holds {'NaN' if np.isnan(value) else 'infinity'}" in one_line(capsys)
    write_tokenizer_without_sound(folder)
    assert run("extend-vocab", folder, tmp_path / "model", "--sound-codes", 8) == 2
    assert f"{key} holds" in one_line(capsys)
    assert nothing_left(tmp_path, "source")


def test_a_cast_that_overflows_is_refused(source, tmp_path, capsys):
    folder = source("llama-untied")
    change(folder, lambda weights: double(weights) | {"model.norm.weight": np.full(32, 1e300)})
    assert run("import", folder, tmp_path / "model", "--dtype", "float32") == 2
    assert "model.norm.weight holds infinity (as float32)" in one_line(capsys)


# Leftovers, names, configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"],
        ["model.rotary_emb.inv_freq"],
        ["model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.0.self_attn.rotary_emb.sin_cached"],
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_rotary_tables_are_left_out(source, tmp_path, capsys, names, sharded):
    folder = source("llama-untied")
    before = tensors_of(folder)
    change(folder, lambda weights: weights | {name: np.ones(4, np.float32) for name in names})
    if sharded:
        in_two_shards(folder, lambda index: {key: file for key, file in index.items() if "rotary" not in key})
    assert f"left out: {names[0]}" in imported(folder, tmp_path / "model", capsys)
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    assert_same_bits(before, tensors_of(tmp_path / "hf"))


def without_prefix(weights):
    return {key.removeprefix("model."): value for key, value in weights.items()}


@pytest.mark.parametrize("name", ["llama-untied", "llama-tied", "qwen2-tied"])
def test_names_without_the_models_prefix(source, tmp_path, name):
    folder = source(name)
    before, expected = tensors_of(folder), their_logits(folder)
    change(folder, without_prefix)
    if "untied" not in name:
        set_config(folder, architectures=[read_json(folder / "config.json")["architectures"][0].replace("ForCausalLM", "Model")])
    np.testing.assert_allclose(their_logits(folder), expected, atol=1e-5)
    language_model.import_hf(folder, tmp_path / "model", None)
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), expected, atol=1e-4)
    assert run("inspect", folder) == 0
    write_tokenizer_without_sound(folder)
    assert run("extend-vocab", folder, tmp_path / "extended", "--sound-codes", 8) == 0
    assert read_json(tmp_path / "extended" / "config.json")["architectures"][0].endswith("ForCausalLM")
    assert tensors_of(tmp_path / "extended").keys() == before.keys()


def test_a_weight_under_two_names_is_refused(source, tmp_path, capsys):
    folder = source("llama-tied")
    change(folder, lambda weights: weights | {"norm.weight": weights["model.norm.weight"]})
    assert run("import", folder, tmp_path / "model") == 2
    assert "which are the same weight" in one_line(capsys)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_theta": 12345.0}, "rope_theta 12345.0 and that of rope_parameters, 10000.0, differ"),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, "differ; rope_scaling is read"),
        ({"rope_theta": 10000.0, "rope_scaling": None}, None),
    ],
)
def test_rotary_settings_in_both_spellings(source, tmp_path, capsys, fields, said):
    folder = source("llama-untied")
    values = read_json(folder / "config.json")
    write_json(folder / "config.json", values | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} | fields)
    out = imported(folder, tmp_path / "model", capsys)
    assert said in out if said else "differ" not in out
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), their_logits(folder), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: found NaN"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "rope_theta inf found"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "factor": float("nan")}}, "factor: found NaN"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights cannot be expressed, take those from before"),
    ],
)
def test_configs_of_no_use(source, tmp_path, capsys, fields, message):
    folder = source("llama-untied")
    set_config(folder, **fields)
    assert run("import", folder, tmp_path / "model") == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model.bin", "pytorch_model.bin found: load the folder with transformers"),
        ("llama.safetensors", "llama.safetensors found, which is another format or under another name"),
        ("consolidated.00.pth", "consolidated.00.pth found, which is another format"),
    ],
)
def test_weights_in_another_format(source, tmp_path, capsys, name, advice):
    folder = source("llama-untied")
    (folder / "model.safetensors").rename(folder / name)
    assert run("import", folder, tmp_path / "model") == 2
    assert advice in one_line(capsys)


# Text tokenizers -----------------------------------------------------------------------------------------------------


def add_token(folder, content, index):
    description = read_json(folder / "tokenizer.json")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description["added_tokens"].append({"id": index, "content": content, **flags})
    write_json(folder / "tokenizer.json", description)


@pytest.mark.parametrize(("name", "multiple"), [("llama-untied", 64), ("llama-tied", 1), ("qwen2-tied", 1)])
def test_a_padding_token_without_a_row_gets_one(source, tmp_path, capsys, name, multiple):
    folder = source(name)
    before = tensors_of(folder)
    add_token(folder, "[PAD]", 275)
    out = imported(folder, tmp_path / "model", capsys, "--vocab-multiple", multiple)
    assert "rows for [PAD] added" in out
    config = load_config(tmp_path / "model", "language_model", LanguageModelConfig)
    assert config.llama.vocab_size == 276 and config.padded_vocab_size == (276 if multiple == 1 else 320)
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    after = tensors_of(tmp_path / "hf")
    for key in before.keys() & {EMBEDDING, HEAD}:
        np.testing.assert_array_equal(after[key][:275], before[key])
        np.testing.assert_allclose(after[key][275], before[key].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(their_logits(tmp_path / "hf")[..., :275], their_logits(folder), atol=1e-5)
    answers = LanguageModel.from_pretrained(tmp_path / "model").answer([[{"role": "user", "content": "hi"}]] * 3, 4)
    assert len(answers) == 3


def test_sound_tokens_after_a_padding_token_without_a_row(source, tmp_path):
    folder = source("llama-tied")
    write_tokenizer_without_sound(folder)
    set_config(folder, vocab_size=264)
    change(folder, lambda weights: weights | {EMBEDDING: weights[EMBEDDING][:264]})
    add_token(folder, "[PAD]", 264)
    assert run("extend-vocab", folder, tmp_path / "extended", "--sound-codes", 8) == 0
    config = language_model.read_hf_config(tmp_path / "extended")
    assert config.sound.first_id == 265 and config.llama.vocab_size == 276
    assert tensors_of(tmp_path / "extended")[EMBEDDING].shape == (276, 32)


def chat_token(folder):
    """A token of the chat template without a row: a model that was never trained with it."""
    add_token(folder, "<|turn|>", 275)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}")


def more_text(folder):
    """A tokenizer of another model, whose ordinary texts have larger ids."""
    shutil.rmtree(folder.parent / "other", ignore_errors=True)
    texts = ["the quick brown fox jumps over the lazy dog", "and runs away from it"]
    train_llama_tokenizer(texts, folder.parent / "other", 300, sound_codes=9, durations=False)
    shutil.copytree(folder.parent / "other", folder, dirs_exist_ok=True)
    shutil.rmtree(folder.parent / "other")


def end_token(folder):
    add_token(folder, "</s>", 275)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        set_config(folder, name, eos_token="</s>")


@pytest.mark.parametrize("changed", [chat_token, more_text, end_token])
def test_ids_that_texts_or_chats_have_need_rows(source, tmp_path, capsys, changed):
    folder = source("llama-untied")
    changed(folder)
    assert run("import", folder, tmp_path / "model") == 2
    assert "expected ids below vocab_size 275" in one_line(capsys)


@pytest.mark.parametrize(
    ("others", "advice"),
    [
        ((), "put its files into the folder tokenizer"),
        (("tokenizer.model",), "tokenizer.model found"),
        (("vocab.json",), "vocab.json found"),
    ],
)
def test_a_model_without_a_text_tokenizer_takes_ids(source, tmp_path, capsys, others, advice):
    folder = source("llama-untied")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink()
    for name in others:
        (folder / name).write_text("x")
    out = imported(folder, tmp_path / "model", capsys)
    assert "no text tokenizer" in out and advice in out
    model = LanguageModel.from_pretrained(tmp_path / "model")
    assert len(model.generate([[1, 2, 3]], 3)[0]) <= 3
    with pytest.raises(InputError, match="no text tokenizer; add its tokenizer files .tokenizer.json"):
        model.answer([[{"role": "user", "content": "hi"}]], 3)
    assert run("extend-vocab", folder, tmp_path / "extended", "--sound-codes", 8) == 2
    assert "no tokenizer.json found" in one_line(capsys)
