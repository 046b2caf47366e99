"""Hugging Face folders of tiny random models: in, the same logits, out again bit for bit; and everything that is refused."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict

from converters import engine, language_model, llama, safetensors_files, stored_weights
from converters.__main__ import main
from converters.recognise import recognise
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig, RopeScaling
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import load_arrays, load_config, load_model, save_model
from ichigo_jax.text.train_tokenizer import train_llama_tokenizer
from ichigo_jax.vocab import SoundVocabulary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    bos_token_id=256,
    eos_token_id=[257, 262],
    pad_token_id=258,
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def hf_model(family):
    torch.manual_seed(0)
    if family == "qwen2":
        rope = dict(rope_type="default", rope_theta=1e6)
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**SIZES, rope_parameters=rope, rms_norm_eps=1e-6, tie_word_embeddings=False)
        )
    else:
        rope = LLAMA3 | dict(rope_theta=500000.0)
        tied = family == "llama-tied"
        head_dim = 16 if tied else 8  # 4 heads of 16 are wider than the model, as in Llama-like families that set head_dim
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **SIZES, rope_parameters=rope, rms_norm_eps=1e-5, tie_word_embeddings=tied, head_dim=head_dim
            )
        )
    with torch.no_grad():  # transformers starts norms at one and biases at zero, where a mistake would not show
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory):
    """Each family as transformers saves it, with a tokenizer that has sound tokens."""
    root = tmp_path_factory.mktemp("hf")
    train_llama_tokenizer(["turn on the kitchen light"], root / "tokenizer", 256, sound_codes=9, durations=False)
    folders = {}
    for name in ("llama", "llama-tied", "qwen2"):
        hf_model(name).save_pretrained(root / name)
        shutil.copytree(root / "tokenizer", root / name, dirs_exist_ok=True)
        folders[name] = root / name
    return folders


@pytest.fixture
def broken(hf_folders, tmp_path):
    """A copy of the Llama folder to break."""
    return Path(shutil.copytree(hf_folders["llama"], tmp_path / "source"))


def our_logits(folder, tokens):
    config = load_config(folder, "language_model", LanguageModelConfig)
    model = load_model(folder, lambda rngs: Llama(config, rngs), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(len(tokens[0])), np.shape(tokens))
    return nnx.jit(lambda model, tokens: model.logits(model(tokens, positions)[0]))(model, jnp.asarray(tokens))


def tensors_of(folder):
    return {key: tensor.read() for key, tensor in safetensors_files.read_folder(folder).items()}


def assert_same_bits(expected, found):
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == expected[key].dtype and found[key].shape == expected[key].shape, key
        assert found[key].tobytes() == expected[key].tobytes(), key


def nothing_left(folder, *names):
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


# Parity and round trips ----------------------------------------------------------------------------------------------


def test_logits_equal_those_of_transformers(family, hf_folders, tmp_path):
    language_model.import_hf(hf_folders[family], tmp_path / "model", None)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 40))
    with torch.no_grad():
        expected = hf_model(family)(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(our_logits(tmp_path / "model", tokens), expected, atol=1e-4)


def test_round_trip_is_bit_exact_and_whole(family, hf_folders, tmp_path):
    language_model.import_hf(hf_folders[family], tmp_path / "model", None)
    config = load_config(tmp_path / "model", "language_model", LanguageModelConfig)
    assert config.sound == SoundVocabulary(first_id=264, codes=9, durations=False)
    assert config.eos_token_ids == (257, 262) and config.padded_vocab_size == 320

    provenance = language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    assert provenance["export_max_abs_logit_diff"] < 1e-4
    assert read_json(tmp_path / "hf" / "provenance.json") == provenance
    assert_same_bits(tensors_of(hf_folders[family]), tensors_of(tmp_path / "hf"))
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {path.name for path in hf_folders[family].iterdir()} | {"provenance.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (hf_folders[family] / name).read_bytes()

    before = transformers.AutoConfig.from_pretrained(hf_folders[family])
    after = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    for field in ("rope_parameters", "tie_word_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after, field) == getattr(before, field), field
    assert llama.config_from_hf(read_json(tmp_path / "hf" / "config.json"), "") == config.llama
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").convert_tokens_to_ids("<|sound_0003|>") == 269


def test_float32_leaves_as_bfloat16_and_says_what_that_costs(family, hf_folders, tmp_path, capsys):
    language_model.import_hf(hf_folders[family], tmp_path / "model", "float32")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "model"), str(tmp_path / "hf"), "--dtype", "bfloat16", "--max-shard-size", "20KB"])
    printed, provenance = capsys.readouterr().out, read_json(tmp_path / "hf" / "provenance.json")
    assert ended.value.code == 0 and "rounding to bfloat16 changes logits by at most 0.0" in printed
    assert provenance["export_dtype"] == "bfloat16" and provenance["export_max_abs_logit_diff"] < 1e-4
    assert 1e-4 < provenance["export_rounding_logit_diff"] < 0.1
    exported, exact = tensors_of(tmp_path / "hf"), tensors_of(hf_folders[family])
    assert exported.keys() == exact.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == ml_dtypes.bfloat16, name
        np.testing.assert_array_equal(tensor, exact[name].astype(ml_dtypes.bfloat16))
    files = [*(tmp_path / "hf").glob("*.safetensors")]
    assert len(files) > 1 and all(file.stat().st_size < 60_000 for file in files)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("size", ["0GB", "many", "-1MB", "1.5GB"])
def test_shard_sizes_that_are_none(size, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path), str(tmp_path / "hf"), f"--max-shard-size={size}"])
    assert ended.value.code == 2 and "expected a size such as 2GB" in capsys.readouterr().err


def test_bfloat16_round_trip_in_shards(hf_folders, tmp_path):
    hf_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size="30KB")
    assert (tmp_path / "source" / safetensors_files.INDEX).exists()
    language_model.import_hf(tmp_path / "source", tmp_path / "model", None)
    assert {array.dtype for array in load_arrays(tmp_path / "model").values()} == {np.dtype(ml_dtypes.bfloat16)}
    language_model.export_hf(tmp_path / "model", tmp_path / "hf", shard_bytes=20_000)
    assert_same_bits(tensors_of(tmp_path / "source"), tensors_of(tmp_path / "hf"))
    assert read_json(tmp_path / "hf" / "config.json")["torch_dtype"] == "bfloat16"
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16

    index = read_json(tmp_path / "hf" / safetensors_files.INDEX)
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "hf" / name).stat().st_size < 25_000 for name in files)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    for key, value in hf_model("llama").to(torch.bfloat16).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_hosts_that_share_a_disk_write_their_parts_of_one_export(hf_folders, tmp_path, monkeypatch):
    model, parts = tmp_path / "model", tmp_path / "hf.parts"
    language_model.import_hf(hf_folders["llama"], model, None)
    language_model.export_hf(model, tmp_path / "alone", 20_000)
    every = sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors"))
    first = language_model.export_part(model, tmp_path / "hf", 0, 3, 20_000)
    assert first == every[::3] and sorted(path.name for path in parts.iterdir()) == [*first, "source.json"]
    before = {name: (parts / name).stat().st_mtime_ns for name in first}
    assert language_model.export_part(model, tmp_path / "hf", 0, 3, 20_000) == first
    assert before == {name: (parts / name).stat().st_mtime_ns for name in first}, "what is there stays"
    assert language_model.export_part(model, tmp_path / "hf", 2, 3, 20_000) == every[2::3]
    read = []
    monkeypatch.setattr(
        safetensors_files,
        "write_file",
        lambda file, *rest, to=safetensors_files.write_file: read.append(file.name) or to(file, *rest),
    )
    language_model.export_hf(model, tmp_path / "hf", 20_000)
    assert read == every[1::3], "only what no host has written"
    assert_same_bits(tensors_of(tmp_path / "alone"), tensors_of(tmp_path / "hf"))
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone").iterdir()
    )
    assert not parts.exists()


def test_parts_of_another_state_of_the_model_are_refused(hf_folders, tmp_path, capsys):
    model = tmp_path / "model"
    language_model.import_hf(hf_folders["llama"], model, None)
    assert run("export", model, tmp_path / "hf", "--part", "1/2") == 0
    assert "1 weight files" in capsys.readouterr().out
    (file,) = (tmp_path / "hf.parts").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    assert run("export", model, tmp_path / "hf") == 2 and "truncated" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists() and file.exists()
    file.write_bytes(whole)
    (model / "provenance.json").write_text("{}")
    for arguments in (("--part", "2/2"), ()):
        assert run("export", model, tmp_path / "hf", *arguments) == 2
        assert "parts of another model, or of this one before it changed" in capsys.readouterr().err
    for text in ("0/2", "3/2", "1", "a/b"):
        assert run("export", model, tmp_path / "hf", "--part", text) == 2
        assert "expected I/N" in capsys.readouterr().err


def test_import_casts_when_asked(hf_folders, tmp_path):
    language_model.import_hf(hf_folders["llama"], tmp_path / "model", "bfloat16")
    expected = hf_model("llama").model.norm.weight.to(torch.bfloat16).float().detach().numpy()
    np.testing.assert_array_equal(load_arrays(tmp_path / "model")["norm", "scale"].astype(np.float32), expected)


def test_export_of_our_own_model_drops_padding_rows(tmp_path):
    """A model that was never a Hugging Face folder: padded rows, no generation config."""
    train_llama_tokenizer(["good morning"], tmp_path / "tokenizer", 256, sound_codes=9, durations=False)
    network = LlamaConfig("llama", 275, 32, 48, 2, 4, 2, 8, 64, 1e-5, 10000.0, RopeScaling(8.0, 1.0, 4.0, 16), False, False, 0.1)
    config = LanguageModelConfig(network, SoundVocabulary(264, 9, False), (262,), padded_vocab_size=288)
    rng = np.random.default_rng(0)
    shapes = language_model.target_shapes(config)
    state = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
    provenance = {"speech_tokenizer_fingerprint": "0123456789abcdef", "sound_form": "compressed"}
    save_model(tmp_path / "model", "language_model", config, unflatten_dict(state), provenance, tmp_path / "tokenizer")

    found = language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    assert provenance.items() <= found.items() and found["export_max_abs_logit_diff"] < 1e-4
    weights = tensors_of(tmp_path / "hf")
    assert weights["model.embed_tokens.weight"].shape == weights["lm_head.weight"].shape == (275, 32)
    np.testing.assert_array_equal(weights["lm_head.weight"], state["lm_head",].T[:275])
    special = {"bos_token_id": 256, "eos_token_id": 262, "pad_token_id": 258}
    assert read_json(tmp_path / "hf" / "generation_config.json") == special
    assert special.items() <= read_json(tmp_path / "hf" / "config.json").items()

    language_model.import_hf(tmp_path / "hf", tmp_path / "again", None)
    again = load_config(tmp_path / "again", "language_model", LanguageModelConfig)
    assert (again.llama, again.sound, again.eos_token_ids) == (config.llama, config.sound, config.eos_token_ids)
    assert provenance.items() <= read_json(tmp_path / "again" / "provenance.json").items()


def test_generation_config_follows_the_model(hf_folders, tmp_path):
    """Other settings of the original stay; the ends are the model's."""
    source = Path(shutil.copytree(hf_folders["llama"], tmp_path / "source"))
    write_json(source / "generation_config.json", {"eos_token_id": 257, "temperature": 0.6})
    language_model.import_hf(source, tmp_path / "model", None)
    settings = read_json(tmp_path / "model" / "config.json")
    assert settings["eos_token_ids"] == [257]
    write_json(tmp_path / "model" / "config.json", settings | {"eos_token_ids": [257, 262]})
    language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    found = read_json(tmp_path / "hf" / "generation_config.json")
    assert found == {"bos_token_id": 256, "eos_token_id": [257, 262], "pad_token_id": 258, "temperature": 0.6}


def test_table_covers_every_parameter_once(family, hf_folders):
    config = language_model.read_hf_config(hf_folders[family])
    rows = llama.table(config)
    assert {row.target for row in rows} == language_model.target_shapes(config).keys()
    assert len({row.target for row in rows}) == len({row.source for row in rows}) == len(rows)


@pytest.mark.parametrize(
    "transform, shape",
    [
        (engine.heads_out(4), (8, 6)),
        (engine.heads_in(4), (6, 8)),
        (engine.head_bias(4), (8,)),
        (engine.TRANSPOSED, (5, 6)),
    ],
)
def test_transforms_are_their_own_inverses(transform, shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(transform.inverse(transform.forward(array)), array)
    assert jax.eval_shape(transform.inverse, transform.forward(array)).shape == shape


# Config refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' cannot be expressed"),
        ({"mlp_bias": True}, "mlp_bias True cannot be expressed"),
        ({"attention_bias": True}, "attention_bias True puts a bias on the attention's output"),
        ({"use_sliding_window": True}, "use_sliding_window True cannot be expressed"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention.* cannot be expressed"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* cannot be expressed"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 cannot be expressed"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "scaling 'yarn' cannot be expressed",
        ),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor .* is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, "mrope_section .* cannot be expressed"),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": [1]}, "expected a group of fields"),
        ({"rms_norm_eps": None, "vocab_size": None}, "vocab_size is missing; rms_norm_eps is missing"),
        ({"hidden_size": "32"}, "hidden_size: found '32' .str., expected int"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads 3"),
        ({"eos_token_id": 400}, "eos_token_ids .* expected ids below vocab_size 320"),
        ({"eos_token_id": ["</s>"]}, "expected whole numbers"),
        ({"vocab_size": 270}, "the tokenizer has ids up to 274"),
    ],
)
def test_configs_that_cannot_be_expressed(broken, changes, message):
    (broken / "generation_config.json").unlink()
    values = read_json(broken / "config.json")
    write_json(broken / "config.json", values | changes)
    with pytest.raises(InputError, match=message) as caught:
        language_model.import_hf(broken, broken.parent / "model", None)
    assert "\n" not in str(caught.value) and nothing_left(broken.parent, "source")


def test_old_and_new_spelling_of_rotary_settings():
    values = hf_model("llama").config.to_dict()
    new = llama.config_from_hf(values, "config.json")
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    assert llama.config_from_hf(old | {"rope_theta": 500000.0, "rope_scaling": LLAMA3}, "config.json") == new
    assert new.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 16) and new.rope_theta == 500000.0
    unscaled = llama.config_from_hf(old | {"rope_theta": 500000.0, "rope_scaling": None}, "config.json")
    assert unscaled.rope_scaling is None


# Weight refusals -----------------------------------------------------------------------------------------------------


def rewrite(folder, change):
    """Writes the folder's weights anew after ``change`` has had its way with them."""
    weights = {key: np.array(value) for key, value in tensors_of(folder).items()}
    change(weights)
    infos = {key: engine.TensorInfo(value.dtype, value.shape) for key, value in weights.items()}
    (folder / safetensors_files.SINGLE).unlink()
    safetensors_files.write_folder(folder, infos, weights.__getitem__, 10**9)


def test_all_faults_are_reported_together(broken):
    def change(weights):
        del weights["model.norm.weight"]
        weights["model.layers.3.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"]
        weights["model.layers.1.self_attn.k_proj.weight"] = weights["model.layers.1.self_attn.k_proj.weight"][:8]
        weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"].astype(np.float16)
        weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.int8)

    rewrite(broken, change)
    with pytest.raises(InputError) as caught:
        language_model.import_hf(broken, broken.parent / "model", None)
    for fault in (
        "model.norm.weight is missing",
        "model.layers.3.mlp.up_proj.weight is unknown",
        "model.layers.1.self_attn.k_proj.weight has shape [8, 32], expected [16, 32]",
        "model.layers.2.mlp.up_proj.weight has dtype float16, but the same weight of another layer has float32",
        "lm_head.weight has dtype int8",
    ):
        assert fault in str(caught.value)
    assert "\n" not in str(caught.value) and nothing_left(broken.parent, "source")


def write_header(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, data, message",
    [
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, "truncated: 12 bytes of data found, its header promises 16"),
        ({"a": entry(0, 8)}, 12, "12 bytes of data found, its header accounts for 8"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b leaves a hole before it"),
        ({"a": entry(0, 12)}, 12, "a: 12 bytes found, F32 of shape .2. takes 8"),
        ({"a": entry(-8, 0)}, 0, "expected whole numbers from 0"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "expected whole numbers from 0"),
        ({"a": entry(0, 8, shape=["2"])}, 8, "expected whole numbers from 0"),
        ({"a": entry(0, 10**30, shape=[10**30 // 4])}, 8, "truncated"),
        ({"a": entry(0, 8, dtype="F4")}, 8, "dtype 'F4' found"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "dtype .'F32'. found"),
        ({"a": {"dtype": "F32"}}, 0, "a: expected dtype, shape and data_offsets"),
        ({"a": 3}, 0, "a: expected dtype, shape and data_offsets"),
        ([1, 2], 0, "found JSON of type list"),
        (b'{"a": 1, "a": 2}', 0, "keys occur more than once in the header: a"),
        (b"{broken", 0, "expected a safetensors header"),
        (b"\xff\xfe{}", 0, "expected a safetensors header"),
        (b"[" * 100_000, 0, "expected a safetensors header"),
    ],
)
def test_broken_headers(tmp_path, header, data, message):
    write_header(tmp_path / "model.safetensors", header, bytes(data))
    with pytest.raises(InputError, match=message) as caught:
        safetensors_files.read_folder(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b"1234", b"\xff" * 8 + b"{}", b"\0" * 16])
def test_files_that_are_not_safetensors(tmp_path, contents):
    (tmp_path / "model.safetensors").write_bytes(contents)
    with pytest.raises(InputError, match="expected a safetensors file, found a header of"):
        safetensors_files.read_folder(tmp_path)


def shard(folder, name="model-00001-of-00001.safetensors", key="a"):
    write_header(folder / name, {key: entry(0, 8)}, bytes(8))
    return name


def index(folder, weight_map):
    write_json(folder / safetensors_files.INDEX, {"weight_map": weight_map})


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/x.safetensors", "..", ".", ""])
def test_an_index_names_only_files_of_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    shard(tmp_path, "outside.safetensors")
    index(folder, {"a": str(tmp_path / name[1:]) if name.startswith("/") else name})
    with pytest.raises(InputError, match="expected a file of this folder"):
        safetensors_files.read_folder(folder)


def test_the_links_of_the_hub_cache_are_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "0123"
    folder.mkdir(parents=True)
    shard(tmp_path / "blobs", "cafe")
    os.symlink(Path("..", "..", "blobs", "cafe"), folder / "model.safetensors")
    assert safetensors_files.read_folder(folder)["a"].read().tolist() == [0, 0]


@pytest.mark.parametrize(
    "weight_map, message",
    [
        (
            {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"},
            "shards missing: 3.safetensors",
        ),
        (
            {"a": "1.safetensors", "c": "2.safetensors"},
            "c is not in 2.safetensors; b of 2.safetensors is not in",
        ),
        ({"a": "1.safetensors", "b": "2.safetensors", "x": "again.safetensors"}, "a is in more than one shard"),
        ({"a": 1}, "expected a weight_map"),
        (None, "expected a weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(tmp_path, weight_map, message):
    shard(tmp_path, "1.safetensors", "a")
    shard(tmp_path, "2.safetensors", "b")
    shard(tmp_path, "again.safetensors", "a")
    index(tmp_path, weight_map)
    with pytest.raises(InputError, match=message):
        safetensors_files.read_folder(tmp_path)


def test_folders_without_one_set_of_weights(tmp_path):
    with pytest.raises(InputError, match="no model.safetensors and no"):
        safetensors_files.read_folder(tmp_path)
    shard(tmp_path, "model.safetensors")
    index(tmp_path, {"a": "model.safetensors"})
    with pytest.raises(InputError, match="expected one of them"):
        safetensors_files.read_folder(tmp_path)


def in_shards(folder, max_shard_bytes=20_000):
    """Writes the folder's weights anew in shards; their file names."""
    tensors = {key: np.array(value) for key, value in tensors_of(folder).items()}
    infos = {key: engine.TensorInfo(value.dtype, value.shape) for key, value in tensors.items()}
    (folder / safetensors_files.SINGLE).unlink()
    safetensors_files.write_folder(folder, infos, tensors.__getitem__, max_shard_bytes)
    return sorted(file.name for file in folder.glob("model-*.safetensors"))


def remove_a_shard(folder):
    (folder / in_shards(folder)[1]).unlink()


def cut_a_shard(folder):
    file = folder / in_shards(folder)[1]
    file.write_bytes(file.read_bytes()[:-10])


def point_outside(folder):
    contents = read_json(folder / safetensors_files.INDEX) if in_shards(folder) else None
    contents["weight_map"][llama.EMBEDDING] = "../secret.safetensors"
    write_json(folder / safetensors_files.INDEX, contents)


def add_biases(folder):
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}))


def cut_the_vocabulary(folder):
    rewrite(folder, lambda weights: weights.update({llama.EMBEDDING: weights[llama.EMBEDDING][:300]}))


@pytest.mark.parametrize(
    "breaking, message",
    [
        (remove_a_shard, "shards missing: model-00002-of-"),
        (cut_a_shard, "model-00002-of-00007.safetensors: truncated"),
        (point_outside, "weights in '../secret.safetensors' found, expected a file of this folder"),
        (add_biases, "model.layers.0.self_attn.q_proj.bias is unknown"),
        (cut_the_vocabulary, "model.embed_tokens.weight has shape [300, 32], expected [320, 32]"),
    ],
)
def test_broken_folders_are_refused_in_one_line_and_leave_nothing(broken, tmp_path, capsys, breaking, message):
    breaking(broken)
    for command in (("import",), ("extend-vocab", "--sound-codes", 8)):
        assert run(command[0], broken, tmp_path / "model", *command[1:]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert nothing_left(tmp_path, "source")


# Export refusals -----------------------------------------------------------------------------------------------------


def test_an_export_that_differs_is_not_published(hf_folders, tmp_path, monkeypatch):
    language_model.import_hf(hf_folders["llama"], tmp_path / "model", None)
    honest = stored_weights.StoredWeight.read

    def wrong(weight):
        tensor = honest(weight)
        return tensor + np.float32(0.01) if weight.piece.source == "model.layers.1.mlp.up_proj.weight" else tensor

    monkeypatch.setattr(stored_weights.StoredWeight, "read", wrong)
    with pytest.raises(InputError, match="differ by .* expected at most 0.001 in float32; nothing was published"):
        language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    assert nothing_left(tmp_path, "model")


def test_params_that_do_not_fit_the_config(hf_folders, tmp_path):
    language_model.import_hf(hf_folders["llama-tied"], tmp_path / "model", None)
    settings = read_json(tmp_path / "model" / "config.json")
    settings["llama"] |= {"intermediate_size": 40, "tie_word_embeddings": False}
    write_json(tmp_path / "model" / "config.json", settings)
    with pytest.raises(InputError, match=r"lm_head is missing") as caught:
        language_model.export_hf(tmp_path / "model", tmp_path / "hf")
    assert "layers.feed_forward.up has shape [3, 32, 48], expected [3, 32, 40]" in str(caught.value)
    assert nothing_left(tmp_path, "model")


@pytest.mark.parametrize("lost", ["d", "manifest.ocdbt"])
def test_params_that_are_broken(hf_folders, tmp_path, capsys, lost):
    language_model.import_hf(hf_folders["llama"], tmp_path / "model", None)
    found = tmp_path / "model" / "params" / lost
    for file in found.iterdir() if found.is_dir() else [found]:
        file.unlink()
    assert run("export", tmp_path / "model", tmp_path / "hf") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "params" in error and error.count("\n") == 1
    with pytest.raises(InputError):
        our_logits(tmp_path / "model", [[1, 2]])
    assert nothing_left(tmp_path, "model")


def test_a_large_model_is_exported_without_the_comparison(hf_folders, tmp_path, capsys):
    language_model.import_hf(hf_folders["llama"], tmp_path / "model", None)
    assert run("export", tmp_path / "model", tmp_path / "hf", "--compare-up-to", 0.0001) == 0
    assert "not compared with transformers: the model takes 0.0 GB in float32, more than the 0.0 GB" in capsys.readouterr().out
    provenance = read_json(tmp_path / "hf" / "provenance.json")
    assert provenance["export_max_abs_logit_diff"] is None and "GB in float32" in provenance["export_not_compared"]
    assert_same_bits(tensors_of(hf_folders["llama"]), tensors_of(tmp_path / "hf"))


def test_import_pads_the_vocabulary_when_asked(hf_folders, tmp_path):
    assert run("import", hf_folders["llama"], tmp_path / "model", "--vocab-multiple", 128) == 0
    arrays = load_arrays(tmp_path / "model")
    assert arrays["embedding",].shape == (384, 32) and arrays["lm_head",].shape == (32, 384)
    assert not arrays["embedding",][320:].any() and not arrays["lm_head",][:, 320:].any()
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    assert_same_bits(tensors_of(hf_folders["llama"]), tensors_of(tmp_path / "hf"))
    assert run("import", hf_folders["llama"], tmp_path / "other", "--vocab-multiple", 0) == 2


# The command ---------------------------------------------------------------------------------------------------------


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_command_there_and_back(hf_folders, tmp_path, capsys):
    assert run("inspect", hf_folders["qwen2"]) == 0
    out = capsys.readouterr().out
    assert "kind: language_model" in out and "architecture: qwen2" in out and "9 codes from id 264" in out
    assert run("import", hf_folders["qwen2"], tmp_path / "model") == 0
    assert run("inspect", tmp_path / "model") == 0
    assert "format: model folder" in capsys.readouterr().out
    assert run("export", tmp_path / "model", tmp_path / "hf", "--format", "hf") == 0
    assert "largest difference" in capsys.readouterr().out
    assert_same_bits(tensors_of(hf_folders["qwen2"]), tensors_of(tmp_path / "hf"))


def test_command_refusals_are_one_line_and_exit_code_2(hf_folders, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("x")
    write_json(tmp_path / "taken" / "config.json", {"model_type": "bert"})
    for arguments, message in [
        (("import", hf_folders["llama"], tmp_path / "taken"), "exists already"),
        (("import", tmp_path / "absent", tmp_path / "model"), "no such file or folder"),
        (("import", tmp_path / "file", tmp_path / "model"), "expected a PyTorch file"),
        (("import", tmp_path, tmp_path / "model"), "no config.json in it"),
        (("import", tmp_path / "taken", tmp_path / "model"), "model_type 'bert' found"),
        (("export", hf_folders["llama"], tmp_path / "model"), "language_model as hf found"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert nothing_left(tmp_path, "file", "taken")


def test_recognise_tells_both_formats(hf_folders, tmp_path):
    assert recognise(hf_folders["llama"]).format == "hf"
    write_json(tmp_path / "config.json", {"kind": "whisper"})
    assert (recognise(tmp_path).format, recognise(tmp_path).kind) == ("model folder", "whisper")
