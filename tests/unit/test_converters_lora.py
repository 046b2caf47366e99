"""PEFT adapter folders of tiny random models: in, the same logits, out again bit for bit; training to PEFT; the refusals."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from reference_weights import filled
from test_converters_llama import assert_same_bits, hf_model, nothing_left, our_logits, run

from converters import engine, language_model, lora, safetensors_files
from converters.recognise import recognise
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig
from ichigo_jax.models.lora import LoraConfig, load_adapter, merge_arrays
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import load_arrays, load_config, save_model
from ichigo_jax.tasks.language_model import LanguageModelFiles
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.text.train_tokenizer import train_llama_tokenizer
from ichigo_jax.train import train
from ichigo_jax.training import run_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FAMILIES = {
    "llama": dict(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"]),
    "llama-tied": dict(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "o_proj"], modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    "qwen2": dict(r=3, lora_alpha=7, lora_dropout=0.1, target_modules=["v_proj", "mlp.down_proj"], modules_to_save=["norm"]),
}  # fmt: skip
OURS = {
    "llama": LoraConfig(4, 8.0, False, ("all",), ("embedding", "lm_head")),
    "llama-tied": LoraConfig(4, 6.0, True, ("q", "o"), ("embedding",)),
    "qwen2": LoraConfig(3, 7.0, False, ("v", "down"), ("norms",)),
}
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 20))


def peft_model(family):
    model = peft.get_peft_model(hf_model(family), peft.LoraConfig(task_type="CAUSAL_LM", **FAMILIES[family]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Model folders of the base models."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        hf_model(family).save_pretrained(root / "hf" / family)
        language_model.import_hf(root / "hf" / family, root / family, None)
    return root


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapter folders as PEFT saves them."""
    root = tmp_path_factory.mktemp("adapters")
    for family in FAMILIES:
        peft_model(family).save_pretrained(root / family)
    return root


@pytest.fixture
def broken(adapters, tmp_path):
    return shutil.copytree(adapters / "llama", tmp_path / "adapter")


def tensors_of(folder):
    return {key: tensor.read() for key, tensor in safetensors_files.read_header(folder / lora.WEIGHTS).items()}


# There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_comes_in_gives_the_same_logits_and_goes_out_bit_for_bit(family, bases, adapters, tmp_path):
    expected = logits_of(peft_model(family))
    assert np.abs(expected - logits_of(hf_model(family))).max() > 0.1
    lora.import_peft(adapters / family, bases / family, tmp_path / "model")
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), expected, atol=1e-4)
    assert load_adapter(tmp_path / "model")[0] == OURS[family]

    language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    np.testing.assert_allclose(logits_of(whole), expected, atol=1e-4)

    lora.export_peft(tmp_path / "model", tmp_path / "out", "some/base")
    assert_same_bits(tensors_of(adapters / family), tensors_of(tmp_path / "out"))
    loaded = peft.PeftModel.from_pretrained(hf_model(family), tmp_path / "out").eval()
    np.testing.assert_array_equal(logits_of(loaded), expected)
    assert loaded.peft_config["default"].base_model_name_or_path == "some/base"
    again = lora.config_from_peft(
        read_json(tmp_path / "out" / lora.CONFIG),
        load_config(bases / family, "language_model", LanguageModelConfig),
        "again",
    )
    assert again == OURS[family]


def test_bfloat16_bases_stay_bfloat16(bases, adapters, tmp_path):
    language_model.import_hf(bases / "hf" / "llama", tmp_path / "base", "bfloat16")
    lora.import_peft(adapters / "llama", tmp_path / "base", tmp_path / "model")
    assert {array.dtype.name for array in load_arrays(tmp_path / "model").values()} == {"bfloat16"}
    assert {array.dtype.name for array in load_adapter(tmp_path / "model")[1].values()} == {"float32"}


def test_what_an_adapter_was_trained_with_comes_before_what_its_base_was(bases, broken, tmp_path):
    base = shutil.copytree(bases / "llama", tmp_path / "base")
    write_json(base / "provenance.json", {"sound_form": "plain", "chat_date": "2024-07-26"})
    write_json(broken / "provenance.json", {"chat_date": "2026-11-27"})
    lora.import_peft(broken, base, tmp_path / "model")
    lora.export_peft(tmp_path / "model", tmp_path / "out", None)
    language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    for folder in ("model", "out", "hf"):
        found = read_json(tmp_path / folder / "provenance.json")
        assert (found["sound_form"], found["chat_date"]) == ("plain", "2026-11-27")


# From training to PEFT -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What ``configs/nano_llama.py:instruct`` reads: a tokenizer, sound tokens, a first stage in bfloat16."""
    root = tmp_path_factory.mktemp("root")
    words = ["turn on the light", "user", "assistant", "yes"] * 3
    train_llama_tokenizer(words, root / "text_tokenizers" / "llama", 300, sound_codes=8, durations=False)
    write_json(root / "speech_tokenizer" / "model" / "provenance.json", {"fingerprint": "0123456789abcdef"})
    (root / "tokens").mkdir()
    rows = [{"tokens": [number % 8, 5], "answer": "yes", "text": "on"} for number in range(16)]
    for name in ("train", "heldout"):
        pq.write_table(pa.Table.from_pylist(rows), root / "tokens" / f"{name}.parquet")
    tokenizer = TextTokenizer.from_folder(root / "text_tokenizers" / "llama")
    network = LlamaConfig("llama", tokenizer.size, 32, 48, 2, 4, 2, 8, 256, 1e-5, 1e4, None, False, False, 0.1)
    config = LanguageModelConfig(network, tokenizer.sound, tokenizer.eos_ids, -(-tokenizer.size // 8) * 8)
    state = nnx.to_pure_dict(nnx.state(filled(lambda rngs: Llama(config, rngs))))
    state = unflatten_dict({path: array.astype(jnp.bfloat16) for path, array in flatten_dict(state).items()})
    save_model(root / "pretrain" / "model", "language_model", config, state, {}, root / "text_tokenizers" / "llama")
    return root


def lora_config(root, *overrides):
    settings = [
        "--config.model.base_dtype=bfloat16",
        "--config.train.steps=4",
        "--config.train.batch_size=8",
        "--config.optimizer.warmup_steps=1",
        "--config.output.checkpoint_every=2",
        "--config.data.length=48",
    ]
    return run_config.load(f"configs/nano_llama.py:instruct,lora,root={root}", [*settings, *overrides])


def test_a_trained_adapter_is_merged_resumed_exported_and_loaded_by_peft(root, tmp_path, capsys):
    assert train(lora_config(root), tmp_path / "run") == 0
    model, base = tmp_path / "run" / "model", root / "pretrain" / "model"
    found, adapter = load_adapter(model)
    assert found == LoraConfig(16, 32.0, False, ("all",), ("embedding", "lm_head"))
    assert all(np.abs(array).max() > 0 for array in adapter.values())
    assert {array.dtype.name for array in load_arrays(model).values()} == {"bfloat16"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "heldout/answers_exact" in rows[-1]
    merged = merge_arrays(load_arrays(base), adapter, found)
    for path, array in load_arrays(model).items():
        np.testing.assert_array_equal(array, merged[path], err_msg=str(path))

    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "model")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    assert train(lora_config(root), tmp_path / "resumed") == 0
    for path, array in load_adapter(tmp_path / "resumed" / "model")[1].items():
        np.testing.assert_array_equal(array, adapter[path], err_msg=str(path))

    assert run("export", model, tmp_path / "peft", "--format", "peft", "--base", "our/base") == 0
    assert run("export", base, tmp_path / "hf") == 0
    assert run("export", model, tmp_path / "merged", "--format", "hf") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    in_float32 = {path: array.astype(np.float32) for path, array in load_arrays(base).items()}
    config = load_config(base, "language_model", LanguageModelConfig)
    unrounded = unflatten_dict(merge_arrays(in_float32, adapter, found))
    save_model(tmp_path / "unrounded", "language_model", config, unrounded, {}, None)
    tokens = TOKENS % config.llama.vocab_size
    np.testing.assert_allclose(our_logits(tmp_path / "unrounded", tokens), logits_of(theirs, tokens), atol=1e-4)
    assert load_config(model, "language_model", LanguageModelConfig) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_tokenizer": "x"}, "config.model of a new model found beside config.init_from; expected None, or what"),
        (
            {"llama": None, "adapter": {"rank": 4}, "base_dtype": "float32"},
            "config.model.adapter: missing field 'alpha'; missing field 'rslora'",
        ),
        ({"llama": None, "adapter": None, "base_dtype": "float16"}, "config.model.base_dtype: found 'float16', expected one of"),
        ({"llama": None, "adapter": None, "base_dtype": "float32"}, "base_dtype 'float32' found, expected one with an adapter"),
    ],
)
def test_config_model_beside_init_from_is_of_that_model(root, tmp_path, changes, message):
    config = lora_config(root)
    object.__setattr__(config, "model", changes)
    with pytest.raises(InputError, match=message):
        LanguageModelFiles(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank 0 and alpha 32.0 found, expected positive numbers"),
        ({"targets": ()}, "targets .. found, expected 'all' or some"),
        ({"targets": ("q_proj",)}, "targets.0.: found 'q_proj', expected one of 'all', 'q'"),
        ({"train_also": ("head",)}, "train_also.0.: found 'head', expected one of 'embedding'"),
    ],
)
def test_adapters_that_make_no_sense_are_refused(root, tmp_path, changes, message):
    config = lora_config(root)
    config.model["adapter"] |= changes
    with pytest.raises(InputError, match=message):
        LanguageModelFiles(config)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' cannot be expressed, expected 'LORA'"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias True cannot be expressed.*use_dora True cannot be expressed"),
        ({"bias": "all"}, "bias 'all' cannot be expressed, expected 'none'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern .* cannot be expressed"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' cannot be expressed"),
        ({"something_new": [1]}, "something_new .1. cannot be expressed"),
        ({"r": None, "target_modules": None}, "r is missing; target_modules is missing"),
        ({"r": "4"}, "rank: found '4' .str., expected int"),
        ({"target_modules": ".*proj"}, "target_modules '..proj' cannot be expressed, expected a list"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules 'embed_tokens' cannot be expressed"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "target_modules means 1 of 3 modules like model.layers.0"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save 'mlp' cannot be expressed"),
        ({"modules_to_save": ["input_layernorm"]}, "modules_to_save means 3 of 7 modules like"),
    ],
)
def test_adapter_configs_that_cannot_be_expressed(broken, bases, changes, message):
    write_json(broken / lora.CONFIG, read_json(broken / lora.CONFIG) | changes)
    with pytest.raises(InputError, match=message) as caught:
        lora.import_peft(broken, bases / "llama", broken.parent / "model")
    assert str(broken / lora.CONFIG) in str(caught.value) and "\n" not in str(caught.value)
    assert nothing_left(broken.parent, "adapter")


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"]])
def test_tied_embeddings_trained_apart_are_refused(bases, adapters, saved):
    values = read_json(adapters / "llama-tied" / lora.CONFIG) | {"modules_to_save": saved, "ensure_weight_tying": False}
    config = load_config(bases / "llama-tied", "language_model", LanguageModelConfig)
    with pytest.raises(InputError, match="unties them, which cannot be expressed"):
        lora.config_from_peft(values, config, "here")


def rewrite(folder, change):
    weights = {key: np.array(value) for key, value in tensors_of(folder).items()}
    change(weights)
    infos = {key: engine.TensorInfo(value.dtype, value.shape) for key, value in weights.items()}
    safetensors_files.write_file(folder / lora.WEIGHTS, infos, weights.__getitem__)


def test_all_faults_of_the_weights_are_reported_together(broken, bases):
    at = "base_model.model.model.layers.1.self_attn"

    def change(weights):
        del weights[f"{at}.q_proj.lora_A.weight"]
        weights[f"{at}.q_proj.lora_magnitude_vector"] = np.ones(3, np.float32)
        weights[f"{at}.o_proj.lora_B.weight"] = np.ones((32, 5), np.float32)

    rewrite(broken, change)
    with pytest.raises(InputError) as caught:
        lora.import_peft(broken, bases / "llama", broken.parent / "model")
    for fault in (
        f"{at}.q_proj.lora_A.weight is missing",
        f"{at}.q_proj.lora_magnitude_vector is unknown",
        f"{at}.o_proj.lora_B.weight has shape [32, 5], expected [32, 4]",
    ):
        assert fault in str(caught.value)
    assert "\n" not in str(caught.value) and nothing_left(broken.parent, "adapter")


def test_a_tied_embedding_that_is_stored_differently_twice_is_refused(bases, adapters, tmp_path):
    folder = shutil.copytree(adapters / "llama-tied", tmp_path / "adapter")
    rewrite(folder, lambda weights: weights.update({"base_model.model.lm_head.weight": np.zeros((320, 32), np.float32)}))
    with pytest.raises(InputError, match="embed_tokens.weight and base_model.model.lm_head.weight differ, expected them alike"):
        lora.import_peft(folder, bases / "llama-tied", tmp_path / "model")


def test_command_recognises_inspects_and_refuses(bases, adapters, broken, tmp_path, capsys):
    assert recognise(adapters / "llama").format == "peft"
    assert run("inspect", adapters / "qwen2") == 0
    out = capsys.readouterr().out
    assert "format: peft" in out and "rank: 3" in out and "alpha: 7" in out
    assert run("import", adapters / "qwen2", tmp_path / "model", "--base", bases / "qwen2") == 0
    assert run("inspect", tmp_path / "model") == 0
    assert "adapter: rank 3, alpha 7, on v, down; in full: norms" in capsys.readouterr().out
    assert run("export", tmp_path / "model", tmp_path / "out", "--format", "peft") == 0
    assert_same_bits(tensors_of(adapters / "qwen2"), tensors_of(tmp_path / "out"))
    capsys.readouterr()
    (broken / lora.WEIGHTS).unlink()
    for arguments, message in [
        (("import", adapters / "llama", tmp_path / "no"), "an adapter without its base model found"),
        (("import", adapters / "llama", tmp_path / "no", "--base", bases / "hf" / "llama"), "expected a model of kind"),
        (("import", adapters / "llama", tmp_path / "no", "--base", bases / "llama", "--dtype", "bfloat16"), "--dtype with"),
        (("import", bases / "hf" / "llama", tmp_path / "no", "--base", bases / "llama"), "--base with"),
        (("import", broken, tmp_path / "no", "--base", bases / "llama"), "no adapter_model.safetensors found"),
        (("export", bases / "llama", tmp_path / "no", "--format", "peft"), "expected a model that was trained with an adapter"),
        (("export", bases / "llama", tmp_path / "no", "--base", "x"), "--base with --format hf found"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert nothing_left(tmp_path, "adapter", "model", "out")


# Folders as people have them -----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(adapters, tmp_path):
    """A copy of an adapter's folder to change."""
    return lambda family: shutil.copytree(adapters / family, tmp_path / "adapter")


def imported(adapter, base, target, capsys):
    assert run("import", adapter, target, "--base", base) == 0
    return capsys.readouterr().out


def test_the_base_is_the_one_that_the_adapter_names(adapter, bases, tmp_path, capsys):
    folder = adapter("qwen2")
    values = read_json(folder / lora.CONFIG)
    for name, message in [
        ("meta-llama/Llama-3.2-1B", "names 'meta-llama/Llama-3.2-1B'); import that and give the model folder by --base"),
        (None, "does not name it"),
        (str(bases / "hf" / "qwen2"), f"python -m converters import {bases / 'hf' / 'qwen2'} BASE, then give --base BASE"),
    ]:
        write_json(folder / lora.CONFIG, values | {"base_model_name_or_path": name})
        assert run("import", folder, tmp_path / "model") == 2
        error = capsys.readouterr().err
        assert "an adapter without its base model found" in error and message in error and error.count("\n") == 1
    write_json(folder / lora.CONFIG, values | {"base_model_name_or_path": str(bases / "qwen2")})
    assert run("import", folder, tmp_path / "model") == 0
    assert f"base: {bases / 'qwen2'}" in capsys.readouterr().out


def test_a_base_of_another_name_is_told(adapter, bases, tmp_path, capsys):
    folder = adapter("qwen2")
    values = read_json(folder / lora.CONFIG)
    for name, told in [("Qwen/Qwen2.5-1.5B", True), ("somewhere/qwen2", False), ("", False)]:
        write_json(folder / lora.CONFIG, values | {"base_model_name_or_path": name})
        out = imported(folder, bases / "qwen2", tmp_path / f"model{len(name)}", capsys)
        assert (f"the adapter was made for {name}, and" in out) == told


def resized(family, rows):
    """A model with another number of rows and an adapter on it, whose embeddings PEFT saves as well."""
    model = hf_model(family)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "embed" in name or "lm_head" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(("family", "rows"), [("llama", 320), ("llama", 322), ("llama-tied", 320), ("llama-tied", 326)])
def test_embeddings_that_are_saved_beside_the_adapter(bases, tmp_path, capsys, family, rows):
    model = resized(family, rows)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in tensors_of(tmp_path / "adapter")
    out = imported(tmp_path / "adapter", bases / family, tmp_path / "model", capsys)
    assert "saved beside the adapter: taken as trained in full" in out
    assert (f"vocabulary: 320 -> {rows} rows" in out) == (rows != 320)
    np.testing.assert_allclose(our_logits(tmp_path / "model", TOKENS), logits_of(model), atol=1e-4)
    assert load_config(tmp_path / "model", "language_model", LanguageModelConfig).llama.vocab_size == rows
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0


def test_an_embedding_of_other_rows_without_its_head_is_refused(bases, tmp_path, capsys):
    resized("llama", 322).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    rewrite(tmp_path / "adapter", lambda weights: weights.pop("base_model.model.lm_head.weight"))
    assert run("import", tmp_path / "adapter", tmp_path / "model", "--base", bases / "llama") == 2
    error = capsys.readouterr().err
    assert "embed_tokens.weight [322, 32] found, the base has 320 rows; resize the base" in error and error.count("\n") == 1


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16, np.float16])
def test_adapters_of_several_dtypes_are_kept_in_float32(adapter, bases, tmp_path, capsys, dtype):
    folder = adapter("llama")

    def change(weights):
        for key in weights:
            weights[key] = weights[key].astype(dtype) if ".layers.1." in key else weights[key]

    rewrite(folder, change)
    assert "kept in float32" in imported(folder, bases / "llama", tmp_path / "model", capsys)
    assert {array.dtype.name for array in load_adapter(tmp_path / "model")[1].values()} == {"float32"}


@pytest.fixture(scope="module")
def base_with_text(bases, tmp_path_factory):
    """The Llama base with a tokenizer; its config ends texts only."""
    root = tmp_path_factory.mktemp("text")
    train_llama_tokenizer(["turn on the kitchen light"], root / "tokenizer", 256, sound_codes=9, durations=False)
    source = shutil.copytree(bases / "hf" / "llama", root / "hf")
    shutil.copytree(root / "tokenizer", source, dirs_exist_ok=True)
    write_json(source / "generation_config.json", {"eos_token_id": 257})
    language_model.import_hf(source, root / "base", None)
    return root / "base"


TEMPLATE = "{% for m in messages %}<|start_header_id|>{{ m['content'] }}<|python_tag|>{% endfor %}"


def own_tokenizer(folder, texts):
    shutil.copytree(texts, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def own_template(folder, texts):
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def own_template_among_settings(folder, texts):
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE})


@pytest.mark.parametrize("written", [own_tokenizer, own_template, own_template_among_settings])
def test_an_adapters_own_chat_template_is_the_merged_models(adapter, base_with_text, tmp_path, capsys, written):
    folder = adapter("llama")
    written(folder, base_with_text / "tokenizer")
    out = imported(folder, base_with_text, tmp_path / "model", capsys)
    assert "the adapter's own" in out and "answers end at 263 <|python_tag|> as well" in out
    tokenizer = TextTokenizer.from_folder(tmp_path / "model" / "tokenizer")
    assert tokenizer.turn_end_id == 263 and tokenizer.sound is not None
    assert load_config(tmp_path / "model", "language_model", LanguageModelConfig).eos_token_ids == (257, 263)
    assert read_json(tmp_path / "model" / "tokenizer" / "generation_config.json") == {"eos_token_id": 257}
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    assert read_json(tmp_path / "hf" / "generation_config.json")["eos_token_id"] == [257, 263]


def test_the_bases_tokenizer_stays_where_the_adapters_is_the_same_or_none(adapter, base_with_text, tmp_path, capsys):
    folder = adapter("llama")
    assert "own" not in imported(folder, base_with_text, tmp_path / "none", capsys)
    shutil.copytree(base_with_text / "tokenizer", folder, dirs_exist_ok=True)
    assert "own" not in imported(folder, base_with_text, tmp_path / "same", capsys)
    for name in ("none", "same"):
        assert load_config(tmp_path / name, "language_model", LanguageModelConfig).eos_token_ids == (257,)
    train_llama_tokenizer(["on"], tmp_path / "other", 256, sound_codes=80, durations=False)
    shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
    assert run("import", folder, tmp_path / "model", "--base", base_with_text) == 2
    error = capsys.readouterr().err
    assert "a text tokenizer of 346 ids with sound tokens" in error and "remove the tokenizer's files" in error


def test_adapters_of_links_and_adapters_of_nan(adapter, bases, tmp_path, capsys):
    folder = adapter("qwen2")
    for name in (lora.WEIGHTS, lora.CONFIG):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    imported(folder, bases / "qwen2", tmp_path / "model", capsys)
    (tmp_path / lora.WEIGHTS).rename(tmp_path / "moved")
    assert run("import", folder, tmp_path / "no", "--base", bases / "qwen2") == 2
    assert "a link to" in capsys.readouterr().err
    (folder / lora.WEIGHTS).unlink()
    shutil.copy(tmp_path / "moved", folder / lora.WEIGHTS)
    rewrite(folder, lambda weights: next(iter(weights.values())).fill(np.nan))
    assert run("import", folder, tmp_path / "no", "--base", bases / "qwen2") == 2
    assert "holds NaN, expected finite numbers" in capsys.readouterr().err
