"""GGUF files: the same model as from the Hugging Face folder with their weights, and everything that is refused."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from gguf_models import add_tokenizer, gguf_tensors, permuted, rope_factors, write_gguf
from test_converters_llama import hf_model, our_logits
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from converters import extend_vocabulary, gguf_files, gguf_language_model, gguf_tokenizer, language_model, safetensors_files
from converters.__main__ import main
from converters.engine import TensorInfo
from converters.recognise import recognise
from ichigo_jax.models.llama import LanguageModelConfig, LlamaConfig, RopeScaling
from ichigo_jax.storage import read_json
from ichigo_jax.storage.model_folder import load_arrays, load_config
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.text.train_tokenizer import save_tokenizer, train_llama_tokenizer

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = ["llama", "llama-tied", "qwen2"]
TEXTS = [
    "turn on the kitchen light",
    "12345 and 67, 8 9",
    "It's  DON'T\n\n we'll",
    " x\t<|eot_id|> ",
    "cafe\u0301 déjà 日本 😀",
    "",
]


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory):
    """Each family as transformers saves it, with a tokenizer that has sound tokens."""
    root = tmp_path_factory.mktemp("hf")
    texts = ["turn on the kitchen light", "12345 12 12 123 123", "it's don't we'll"]
    train_llama_tokenizer(texts, root / "tokenizer", 256, sound_codes=9, durations=False)
    for name in FAMILIES:
        hf_model(name).save_pretrained(root / name)
        shutil.copytree(root / "tokenizer", root / name, dirs_exist_ok=True)
    return {name: root / name for name in FAMILIES}


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def refused(source, capsys):
    """The one line that the import of a file ends with; nothing is written."""
    before = sorted(source.parent.iterdir())
    assert run("import", source, source.parent / "never") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(source) in error and sorted(source.parent.iterdir()) == before
    return error


def random_texts(count=200):
    random = np.random.default_rng(0)
    letters = list("abcdefghij klmnopqr stuvwxyz ABC .,!?'-\"0123456789\n\tàéüñ日本русский😀")
    return TEXTS + ["".join(random.choice(letters, random.integers(1, 40))) for _ in range(count)]


# ---- the same model --------------------------------------------------------------------------------------------------


def with_weights(folder, wanted, target):
    """A copy of a Hugging Face folder with the weights that a GGUF of type ``wanted`` stands for."""
    shutil.copytree(folder, target)
    config = read_json(folder / "config.json")
    _, floats = gguf_tensors(folder, wanted)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    keys = {
        name.replace("{i}", str(layer)): key.replace("{i}", str(layer))
        for name, key in gguf_language_model.NAMES.items()
        for layer in range(config["num_hidden_layers"])
    }
    tensors = {}
    for name, array in floats.items():
        part = next((part for part in heads if f".{part}.weight" in name), None)
        if part and config["model_type"] == "llama":
            # The order that the permutation of row numbers undoes.
            order = permuted(np.arange(len(array))[:, None], heads[part])[:, 0]
            array = array[np.argsort(order)]
        tensors[keys[name]] = array
    infos = {key: TensorInfo(array.dtype, array.shape) for key, array in tensors.items()}
    safetensors_files.write_file(target / safetensors_files.SINGLE, infos, tensors.__getitem__)
    return target


@pytest.mark.parametrize("wanted", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_of_the_folder_with_its_weights(family, wanted, hf_folders, tmp_path):
    write_gguf(tmp_path / "model.gguf", hf_folders[family], wanted)
    dequantized = with_weights(hf_folders[family], wanted, tmp_path / "hf")
    language_model.import_hf(dequantized, tmp_path / "expected", None)
    gguf_language_model.import_gguf(tmp_path / "model.gguf", tmp_path / "found", None)
    configs = [read_json(tmp_path / name / "config.json") for name in ("expected", "found")]
    for config in configs:
        del config["llama"]["initializer_range"]  # of training, which GGUF has no place for
    assert configs[0] == configs[1]
    expected, found = load_arrays(tmp_path / "expected"), load_arrays(tmp_path / "found")
    assert found.keys() == expected.keys()
    half = {"F16": "float16", "BF16": "bfloat16"}.get(wanted, "float32")
    for path, array in expected.items():
        assert found[path].dtype == ("float32" if path[-1] in ("scale", "q_bias", "k_bias", "v_bias") else half), path
        np.testing.assert_array_equal(found[path].astype(np.float32), array, err_msg=str(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, hf_folders, tmp_path):
    write_gguf(tmp_path / "model.gguf", hf_folders[family])
    assert run("import", tmp_path / "model.gguf", tmp_path / "model") == 0
    tokens = np.random.default_rng(0).integers(0, 320, (2, 40))
    with torch.no_grad():
        expected = hf_model(family)(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(our_logits(tmp_path / "model", tokens), expected, atol=1e-4)


def test_a_weight_of_several_types_becomes_float32(hf_folders, tmp_path):
    def change(metadata, stored):
        data = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32)
        stored["blk.1.ffn_up.weight"] = (data.astype(np.float16), gguf.GGMLQuantizationType.F16)

    write_gguf(tmp_path / "model.gguf", hf_folders["llama"], "Q8_0", change)
    notes = gguf_language_model.import_gguf(tmp_path / "model.gguf", tmp_path / "model", None)
    assert notes == [
        "answers end at 257 <|end_of_text|>, 262 <|eot_id|>",
        "Q8_0 weights written as float32; --dtype bfloat16 takes half of that",
    ]
    arrays = load_arrays(tmp_path / "model")
    assert {str(array.dtype) for array in arrays.values()} == {"float32"}
    expected = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(arrays["layers", "feed_forward", "up"][1], expected.T)


def test_import_inspect_and_export(hf_folders, tmp_path, capsys):
    folder = tmp_path / "one"
    folder.mkdir()
    write_gguf(folder / "any.gguf", hf_folders["qwen2"], "Q8_0")
    assert run("inspect", folder) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert (
        lines["format"] == "gguf"
        and lines["architecture"] == "qwen2"
        and lines["answers end at"].startswith("257 <|end_of_text|>")
    )
    assert lines["dtype"].startswith("float32, stored as F32 (") and "Q8_0 (" in lines["dtype"]
    assert lines["sound tokens"] == "9 codes from id 264, durations False"
    assert run("import", folder, tmp_path / "model", "--dtype", "bfloat16", "--vocab-multiple", "128") == 0
    assert "written as float32" not in capsys.readouterr().out
    assert load_config(tmp_path / "model", "language_model", LanguageModelConfig).padded_vocab_size == 384
    assert {str(array.dtype) for array in load_arrays(tmp_path / "model").values()} == {"bfloat16"}
    provenance = read_json(tmp_path / "model" / "provenance.json")
    assert provenance["source"] == "any.gguf" and provenance["source_tensor_types"]["Q8_0"] == 20
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_tokens_to_ids("<|sound_0003|>") == 269
    assert run("extend-vocab", folder, tmp_path / "sound", "--sound-codes", "8") == 2
    assert "language_model as gguf found, expected a Hugging Face folder or a model folder" in capsys.readouterr().err


# ---- rotary scaling --------------------------------------------------------------------------------------------------


def network(head_dim, theta, scaling=None):
    return LlamaConfig("llama", 32, 64, 64, 1, 1, 1, head_dim, 64, 1e-5, theta, scaling, True, False, 0.02)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 500000.0, RopeScaling(8.0, 1.0, 4.0, 8192)),  # Llama 3.1
        (64, 500000.0, RopeScaling(32.0, 1.0, 4.0, 8192)),  # Llama 3.2
        (128, 10000.0, RopeScaling(16.0, 1.0, 8.0, 4096)),
        (64, 500000.0, RopeScaling(4.0, 1.0, 2.5, 1000)),
        (8, 500000.0, RopeScaling(8.0, 1.0, 4.0, 16)),  # one frequency between the borders
    ],
)
def test_scaling_is_told_from_the_factors(head_dim, theta, scaling, tmp_path):
    factors = rope_factors(head_dim, theta, **vars(scaling))
    assert 1 < len(set(factors.tolist()))
    assert scaling_of(tmp_path, factors, network(head_dim, theta)) == scaling


def scaling_of(tmp_path, factors, config):
    factors.tofile(tmp_path / "factors")
    stored = safetensors_files.Tensor(np.dtype(np.uint8), (1, factors.nbytes), tmp_path / "factors", 0)
    weight = gguf_files.GgufWeight(np.dtype(np.float32), factors.shape, "F32", stored)
    return gguf_language_model._rope_scaling(config, weight, "a.gguf")


def test_scaling_twice_as_large_in_all_numbers_is_the_same(tmp_path):
    factors = rope_factors(64, 500000.0, 8.0, 2.0, 8.0, 16384)
    assert scaling_of(tmp_path, factors, network(64, 500000.0)) == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_factors_that_are_no_scaling(tmp_path):
    assert scaling_of(tmp_path, np.ones(32, np.float32), network(64, 500000.0)) is None
    factors = rope_factors(64, 500000.0, 8.0, 1.0, 4.0, 8192)
    for wrong in (factors[:-1], -factors, factors + np.linspace(0, 1, 32, dtype=np.float32), factors * np.nan):
        with pytest.raises(Exception, match=r"a.gguf: rope_freqs.weight.* found"):
            scaling_of(tmp_path, wrong, network(64, 500000.0))


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def metadata_of(file, folder, pre, **others):
    """The metadata of a tokenizer folder after a file."""
    writer = gguf.GGUFWriter(file, "llama")
    add_tokenizer(writer, folder, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**gguf_files.read_gguf(file).metadata, **others}


def test_the_tokenizer_is_that_of_the_folder(hf_folders, tmp_path):
    folder = hf_folders["llama"]
    write_gguf(tmp_path / "model.gguf", folder)
    gguf_language_model.import_gguf(tmp_path / "model.gguf", tmp_path / "model", None)
    expected, found = TextTokenizer.from_folder(folder), TextTokenizer.from_folder(tmp_path / "model" / "tokenizer")
    for text in random_texts():
        assert found.encode(text) == expected.encode(text), repr(text)
        assert found.decode(found.encode(text)) == text
    assert found.added == expected.added and found.sound == expected.sound and found.size == expected.size
    assert (found.bos_ids, found.pad_id, found.end_of_text_id) == (expected.bos_ids, expected.pad_id, expected.end_of_text_id)
    messages = [{"role": "user", "content": "turn on"}, {"role": "assistant", "content": "yes"}]
    assert found.render_chat(messages, True) == expected.render_chat(messages, True)
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "model" / "tokenizer"))
    assert ours("on <|eot_id|> <|sound_0001|>")["input_ids"] == theirs("on <|eot_id|> <|sound_0001|>")["input_ids"]


REFERENCES = {
    "qwen2": (normalizers.NFC(), lambda: transformers.models.qwen2.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer),
    "smollm": (
        None,
        lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "gpt-2": (None, lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
}


@pytest.mark.parametrize("pre", REFERENCES)
def test_families_split_text_in_their_own_ways(pre, tmp_path):
    normalizer, splitter = REFERENCES[pre]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    # Merges across words, digits and line ends, so that another splitting would show.
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(random_texts(2000), trainer)
    backend.add_special_tokens(["<|im_end|>"])
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = splitter()
    save_tokenizer(backend, tmp_path / "expected", eos_token="<|im_end|>")
    metadata = metadata_of(tmp_path / "a.gguf", tmp_path / "expected", pre)
    metadata["tokenizer.ggml.eos_token_id"] = backend.token_to_id("<|im_end|>")
    found = gguf_tokenizer.write(metadata, tmp_path / "found", "a.gguf")
    expected = TextTokenizer.from_folder(tmp_path / "expected")
    for text in random_texts():
        assert found.encode(text) == expected.encode(text), repr(text)
    assert found.eos_ids == expected.eos_ids and found.bos_ids == ()


def test_rows_without_a_token_are_no_tokens(hf_folders, tmp_path):
    metadata = metadata_of(tmp_path / "a.gguf", hf_folders["llama"], "llama-bpe")
    metadata["tokenizer.ggml.eos_token_id"] = 257
    assert metadata["tokenizer.ggml.tokens"][300] == "[PAD300]"
    found = gguf_tokenizer.write(metadata, tmp_path / "found", "a.gguf")
    assert found.size == 264 + 11 and "[PAD300]" not in json.dumps(read_json(tmp_path / "found" / "tokenizer.json"))


def test_a_file_that_says_that_texts_do_not_begin_with_a_token(hf_folders, tmp_path):
    metadata = metadata_of(tmp_path / "a.gguf", hf_folders["llama"], "llama-bpe")
    assert gguf_tokenizer.write(metadata, tmp_path / "a", "a.gguf").bos_ids == (256,)
    assert gguf_tokenizer.write({**metadata, "tokenizer.ggml.add_bos_token": False}, tmp_path / "b", "a.gguf").bos_ids == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' found, expected 'gpt2'"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre 'tekken' found, expected one of llama-bpe"),
        ({"tokenizer.ggml.merges": ["no such"]}, "merges that do not fit the tokens"),
        ({"tokenizer.ggml.tokens": 3}, "no tokenizer.ggml.tokens found"),
        ({"tokenizer.ggml.token_type": [1]}, "1 types for 320 tokens found"),
        ({"tokenizer.ggml.eos_token_id": 320}, "eos_token_id 320 found, expected an id below 320"),
        ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id -1 found"),
    ],
)
def test_tokenizers_that_are_refused(change, message, hf_folders, tmp_path):
    metadata = metadata_of(tmp_path / "a.gguf", hf_folders["llama"], "llama-bpe", **change)
    with pytest.raises(Exception, match=f"^a.gguf: .*{message}"):
        gguf_tokenizer.write(metadata, tmp_path / "found", "a.gguf")


def test_a_file_without_a_tokenizer(hf_folders, tmp_path, capsys):
    write_gguf(tmp_path / "a.gguf", hf_folders["llama"])
    whole = (tmp_path / "a.gguf").read_bytes()
    key = b"tokenizer.ggml.model\x08\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"
    assert whole.count(key + b"gpt2") == 1
    (tmp_path / "a.gguf").write_bytes(whole.replace(key + b"gpt2", key + b"none"))
    assert run("import", tmp_path / "a.gguf", tmp_path / "model") == 0
    assert "no text tokenizer in it" in capsys.readouterr().out
    assert not (tmp_path / "model" / "tokenizer").exists()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_all_faults_of_the_weights_are_told_together(hf_folders, tmp_path, capsys):
    def change(metadata, stored):
        del stored["blk.1.attn_v.weight"]
        stored["blk.0.ffn_gate_inp.weight"] = stored["output_norm.weight"]
        stored["blk.2.ffn_norm.weight"] = (np.ones(31, np.float32), gguf.GGMLQuantizationType.F32)

    write_gguf(tmp_path / "a.gguf", hf_folders["llama"], change=change)
    error = refused(tmp_path / "a.gguf", capsys)
    for fault in (
        "blk.1.attn_v.weight is missing",
        "blk.0.ffn_gate_inp.weight is unknown",
        "blk.2.ffn_norm.weight has shape [31], expected [32]",
    ):
        assert fault in error


def test_all_faults_of_the_metadata_are_told_together(hf_folders, tmp_path, capsys):
    def change(metadata, stored):
        del metadata["llama.context_length"]
        metadata["llama.attention.head_count"] = [4, 4, 2]
        metadata["llama.rope.scaling.type"] = "yarn"
        metadata["llama.expert_count"] = 8
        metadata["llama.residual_scale"] = 2.0
        metadata["llama.block_count"] = 4
        metadata["llama.vocab_size"] = 321

    write_gguf(tmp_path / "a.gguf", hf_folders["llama"], change=change)
    error = refused(tmp_path / "a.gguf", capsys)
    for fault in (
        "llama.context_length is missing",
        "llama.attention.head_count",
        "llama.rope.scaling.type 'yarn' cannot be expressed, expected 'none'",
        "llama.expert_count 8 cannot be expressed",
        "llama.residual_scale is unknown",
        "llama.block_count 4 found, but weights of 3 layers",
        "llama.vocab_size 321 found, token_embd.weight has 320 rows",
    ):
        assert fault in error, fault


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": "gemma3"}, "general.architecture 'gemma3' found, expected 'llama' or 'qwen2'"),
        ({"general.architecture": "qwen3moe"}, "general.architecture 'qwen3moe' found"),
        ({"split.count": 3}, "one of 3 parts of a model found"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count 4 cannot be expressed, expected the head size 8"),
        ({"llama.attention.value_length": 16}, "llama.attention.value_length 16 cannot be expressed"),
        ({"llama.attention.head_count": 3}, "num_attention_heads 3 found"),
        ({"tokenizer.ggml.eos_token_id": 400}, "eos_token_id 400 found"),
        ({"tokenizer.ggml.eot_token_id": 400}, "eos_token_ids (257, 400) found"),
    ],
)
def test_models_of_another_kind(values, message, hf_folders, tmp_path, capsys):
    write_gguf(tmp_path / "a.gguf", hf_folders["llama"], change=lambda metadata, stored: metadata.update(values))
    assert message in refused(tmp_path / "a.gguf", capsys)


@pytest.mark.parametrize("family", FAMILIES[:1])
def test_every_truncated_file_is_refused(family, hf_folders, tmp_path, capsys):
    file = tmp_path / "a.gguf"
    write_gguf(file, hf_folders[family])
    whole = file.read_bytes()
    for size in [5, 12, 23, 30, 60, 400, 2000, 9000, len(whole) // 2, len(whole) - 200]:
        file.write_bytes(whole[:size])
        assert "truncated" in refused(file, capsys), size
    file.write_bytes(whole[:2])
    assert "expected a PyTorch file" in refused(file, capsys)


def changed(find, replace, count=1):
    def change(whole):
        assert whole.count(find) >= count
        return whole.replace(find, replace, count)

    return change


LAYER_1 = b"blk.1.attn_norm.weight\x01\x00\x00\x00 \x00\x00\x00\x00\x00\x00\x00"  # one axis of 32; type and place follow


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(b"GGUF\3\0\0\0", b"GGUF\1\0\0\0"), "version 1 found, expected a little-endian GGUF file of version 2 or 3"),
        (changed(b"GGUF\3\0\0\0", b"GGUF\4\0\0\0"), "version 4 found"),
        (changed(b"GGUF\3\0\0\0", b"GGUF\0\0\0\3"), "big-endian numbers found"),
        (changed(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"), "blk.0.attn_norm.weight occurs more than once"),
        (changed(b"llama.vocab_size", b"llama.block_count"[:16]), "llama.block_coun is unknown"),
        (changed(LAYER_1 + b"\0\0\0\0", LAYER_1 + b"\x63\0\0\0"), "blk.1.attn_norm.weight has type 99, which the package gguf"),
        (changed(LAYER_1 + b"\0\0\0\0", LAYER_1 + b"\x1a\0\0\0"), "blk.1.attn_norm.weight has type I32, which the package gguf"),
        (changed(LAYER_1 + b"\0\0\0\0", LAYER_1 + b"\x0c\0\0\0"), "rows of 32 numbers, expected a multiple of 256 for Q4_K"),
        (changed(LAYER_1, LAYER_1.replace(b" ", b"@")), "overlaps the tensor before it"),
        (changed(LAYER_1, LAYER_1.replace(b" ", b"\x10")), "leaves a hole before it"),
        (changed(LAYER_1, LAYER_1.replace(b"\x01\0\0\0", b"\x09\0\0\0")), "has 9 axes, expected 1 to 4"),
        (lambda whole: whole + b"x" * 32, "bytes of data found, its tensors account for"),
        (changed(b"tokenizer.ggml.token_type\x09\0\0\0\5", b"tokenizer.ggml.token_type\x09\0\0\0\x0d"), "has type 13, expected"),
        (
            changed(b"token_type\x09\0\0\0\5\0\0\0\x40\1\0\0\0\0\0\0", b"token_type\x09\0\0\0\5\0\0\0\0\0\0\0\0\0\0\x10"),
            "truncated",  # a list of more numbers than the file has bytes
        ),
    ],
)
def test_broken_files(change, message, hf_folders, tmp_path, capsys):
    file = tmp_path / "a.gguf"
    write_gguf(file, hf_folders["llama"])
    file.write_bytes(change(file.read_bytes()))
    assert message in refused(file, capsys)


def test_folders_with_several_files_and_with_a_copy_of_config_json(hf_folders, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf(folder / "a.gguf", hf_folders["llama"])
    shutil.copyfile(hf_folders["llama"] / "config.json", folder / "config.json")
    assert recognise(folder).path == folder / "a.gguf"
    shutil.copyfile(folder / "a.gguf", folder / "b.gguf")
    assert "2 GGUF files found (a.gguf, b.gguf), expected one" in refused(folder, capsys)


def test_without_the_package_the_error_says_how_to_get_it(hf_folders, tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "a.gguf", hf_folders["llama"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    assert "pip install 'ichigo_jax[gguf]'" in refused(tmp_path / "a.gguf", capsys)


def test_an_imported_file_can_be_given_sound_tokens(hf_folders, tmp_path):
    def change(metadata, stored):
        metadata["tokenizer.ggml.pre"] = "smollm"

    plain = tmp_path / "plain"
    shutil.copytree(hf_folders["llama-tied"], plain)
    description = read_json(plain / "tokenizer.json")
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < 264]
    (plain / "tokenizer.json").write_text(json.dumps(description))
    write_gguf(tmp_path / "a.gguf", plain, change=change)
    gguf_language_model.import_gguf(tmp_path / "a.gguf", tmp_path / "model", None)
    extension = extend_vocabulary.Extension(8, False, 0, 0.05)
    extend_vocabulary.extend(recognise(tmp_path / "model"), tmp_path / "sound", extension, None)
    text = TextTokenizer.from_folder(tmp_path / "sound" / "tokenizer")
    assert text.sound == load_config(tmp_path / "sound", "language_model", LanguageModelConfig).sound
    assert text.sound.first_id == 264 and text.special_id("<|eot_id|>") == 262
