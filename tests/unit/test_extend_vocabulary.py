"""Sound tokens for text models: which ids and rows they get, what the tokenizer makes of them, and what is refused."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from converters import engine, extend_vocabulary, language_model, safetensors_files
from converters.__main__ import main
from converters.recognise import recognise
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import load_arrays, load_config
from ichigo_jax.text import train_tokenizer
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.vocab import SoundVocabulary, sound_text, sound_token

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)
TEXTS = ["turn on the kitchen light", "good morning"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama_folder(folder):
    """As Llama 3: the tokenizer's last id is the embedding's last row; 256 bytes, 8 special tokens. Tied, bfloat16."""
    train_tokenizer.save_tokenizer(llama_backend(), folder, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=264, rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=True, eos_token_id=262, bos_token_id=256
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def llama_backend():
    backend = train_tokenizer._train_bpe(TEXTS, 256)
    train_tokenizer._add_special(backend, train_tokenizer.LLAMA_SPECIAL_TOKENS)
    return backend


def qwen_folder(folder):
    """As Qwen2.5: vocab.json and merges.txt beside tokenizer.json, added tokens listed twice, 16 spare rows. Untied, float32."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))
    added = {str(token["id"]): token for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    settings = {
        "added_tokens_decoder": {index: {k: v for k, v in token.items() if k != "id"} for index, token in added.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "chat_template": "{{ messages[0]['content'] }}",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "added_tokens.json", {token["content"]: int(index) for index, token in added.items()})
    config = transformers.Qwen2Config(
        **SIZES, vocab_size=290, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False, eos_token_id=272
    )
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


FIRST = {"llama": 264, "qwen2": 274}
ROWS = {"llama": 264, "qwen2": 290}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    llama_folder(root / "llama")
    qwen_folder(root / "qwen2")
    return {"llama": root / "llama", "qwen2": root / "qwen2"}


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def tensors_of(folder):
    return {key: tensor.read() for key, tensor in safetensors_files.read_folder(folder).items()}


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


# Ids, rows, files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes, durations, size", [(512, False, 515), (2560, False, 2563), (2560, True, 2611)])
def test_sizes_of_the_released_families(codes, durations, size):
    """128,771 and 130,867 rows on Llama 3, whose own ids are 128,256."""

    class Llama3:
        size, sound, added = 128_256, None, {}

    sound = extend_vocabulary.place(Llama3, extend_vocabulary.Extension(codes, durations, 0, 0.05), "Llama 3")
    assert sound == SoundVocabulary(128_256, codes + 1, durations) and sound.size == size


def test_hugging_face_folder(family, folders, tmp_path, capsys):
    assert run("extend-vocab", folders[family], tmp_path / "out", "--sound-codes", 32, "--duration-tokens") == 0
    first, rows, size = FIRST[family], ROWS[family], 2 + 33 + 48
    out = capsys.readouterr().out
    assert f"sound tokens: {size} from id {first}" in out and f"vocabulary: {rows} -> {first + size} rows" in out

    before, after = tensors_of(folders[family]), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before:
        if key not in (EMBEDDING, HEAD):
            assert same(before[key], after[key]), key
    for key in before.keys() & {EMBEDDING, HEAD}:
        old, new = before[key][:first].astype(np.float32), after[key].astype(np.float32)
        assert after[key].dtype == before[key].dtype and new.shape == (first + size, 32)
        assert same(before[key][:first], after[key][:first])
        noise = new[first:] - old.mean(axis=0)
        assert len(np.unique(new[first:], axis=0)) == size, "rows that are equal stay equal in training"
        assert 0.04 < (noise / old.std(axis=0)).std() < 0.06
    if family == "qwen2":
        assert not np.array_equal(after[EMBEDDING][first:], after[HEAD][first:])

    assert read_json(tmp_path / "out" / "config.json") == read_json(folders[family] / "config.json") | {
        "vocab_size": first + size
    }
    asked = {"sound_codes": 32, "durations": True, "seed": 0, "noise": 0.05, "first_id": first}
    assert read_json(tmp_path / "out" / "provenance.json")["extended_vocabulary"] == asked
    names = {path.name for path in folders[family].iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"provenance.json"}
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()) and model.get_input_embeddings().weight.shape == (first + size, 32)


def test_auto_tokenizer_round_trips_sound_tokens(family, folders, tmp_path):
    assert run("extend-vocab", folders[family], tmp_path / "out", "--sound-codes", 32) == 0
    before = transformers.AutoTokenizer.from_pretrained(folders[family])
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    first = FIRST[family]
    assert len(before) == first and len(after) == first + 2 + 33
    assert after.encode(sound_token(12), add_special_tokens=False) == [first + 2 + 12]
    assert after.decode([first + 2 + 12]) == sound_token(12)
    text = "turn on" + sound_text([12, 0, 32]) + " the light"
    ids = after.encode(text, add_special_tokens=False)
    assert after.decode(ids) == text and [i for i in ids if i >= first] == [first, first + 14, first + 2, first + 34, first + 1]
    assert after.decode(ids, skip_special_tokens=True) == "turn on the light"
    for text in ("turn on the kitchen light", "<|im_end|><tool_call>", "<|eot_id|>"):
        assert after.encode(text) == before.encode(text)
    assert after.chat_template == before.chat_template and after.eos_token == before.eos_token
    assert TextTokenizer.from_folder(tmp_path / "out").sound == SoundVocabulary(first, 33, False)


def test_model_folder_gets_the_same_weights(family, folders, tmp_path):
    """Import and extension may change places."""
    language_model.import_hf(folders[family], tmp_path / "model", None)
    assert run("extend-vocab", tmp_path / "model", tmp_path / "out", "--sound-codes", 32, "--vocab-multiple", 64) == 0
    config = load_config(tmp_path / "out", "language_model", LanguageModelConfig)
    vocab_size = FIRST[family] + 2 + 33
    assert config.sound == SoundVocabulary(FIRST[family], 33, False)
    assert (config.llama.vocab_size, config.padded_vocab_size) == (vocab_size, 320)
    arrays = load_arrays(tmp_path / "out")
    assert arrays["embedding",].shape == (320, 32) and not arrays["embedding",][vocab_size:].any()

    assert run("extend-vocab", folders[family], tmp_path / "hf", "--sound-codes", 32) == 0
    language_model.export_hf(tmp_path / "out", tmp_path / "exported")
    expected, found = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "exported")
    assert expected.keys() == found.keys() and all(same(expected[key], found[key]) for key in expected)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()


def test_spare_rows_that_are_not_needed_stay(folders, tmp_path):
    assert run("extend-vocab", folders["qwen2"], tmp_path / "out", "--sound-codes", 4) == 0
    before, after = tensors_of(folders["qwen2"])[EMBEDDING], tensors_of(tmp_path / "out")[EMBEDDING]
    assert after.shape == (290, 32) and same(before[:274], after[:274]) and same(before[281:], after[281:])
    assert not np.isclose(before[274:281], after[274:281]).all(axis=1).any()


def test_seed_and_noise(folders, tmp_path):
    rows = {}
    for name, arguments in {"a": (), "b": (), "c": ("--seed", 1), "d": ("--noise", 0)}.items():
        assert run("extend-vocab", folders["qwen2"], tmp_path / name, "--sound-codes", 32, *arguments) == 0
        rows[name] = tensors_of(tmp_path / name)[EMBEDDING][274:]
    assert same(rows["a"], rows["b"]) and not np.array_equal(rows["a"], rows["c"])
    np.testing.assert_allclose(rows["d"], np.tile(tensors_of(folders["qwen2"])[EMBEDDING][:274].mean(axis=0), (35, 1)), atol=1e-6)


def test_extending_again_changes_nothing(family, folders, tmp_path, capsys):
    source = folders[family]
    language_model.import_hf(source, tmp_path / "model", None)
    for start in (source, tmp_path / "model"):
        one, two = tmp_path / f"{start.name}-1", tmp_path / f"{start.name}-2"
        assert run("extend-vocab", start, one, "--sound-codes", 32) == 0
        assert "nothing to extend" not in capsys.readouterr().out
        assert run("extend-vocab", one, two, "--sound-codes", 32) == 0
        assert "nothing to extend: the vocabulary has these sound tokens already" in capsys.readouterr().out
        for file in one.glob("*.*"):
            if file.is_file():
                assert (two / file.name).read_bytes() == file.read_bytes(), file
    found, expected = load_arrays(tmp_path / "model-2"), load_arrays(tmp_path / "model-1")
    assert found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in found)


def test_blocks_do_not_change_the_rows(monkeypatch):
    """Statistics and noise are those of the whole, however it is cut."""

    class Whole(engine.Weight):
        def read(self):
            return array

        def blocks(self):
            return engine.row_blocks(array)

    array = np.random.default_rng(0).normal(0, 0.1, (50, 8)).astype(ml_dtypes.bfloat16)
    extended = extend_vocabulary.ExtendedWeight(array.dtype, (65, 8), Whole(array.dtype, array.shape), 45, 20, 0.05, (0, 0))
    whole = extended.read()
    monkeypatch.setattr("ichigo_jax.storage.stored_arrays.CHUNK_BYTES", 7 * 16)
    assert max(map(len, extended.blocks())) == 7
    np.testing.assert_array_equal(extended.read(), whole)
    assert whole.shape == (65, 8)


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, *arguments):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run("extend-vocab", *arguments) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_refusals(folders, tmp_path, capsys):
    llama = folders["llama"]
    assert run("extend-vocab", llama, tmp_path / "extended", "--sound-codes", 32) == 0
    capsys.readouterr()
    for arguments in (("--sound-codes", 16), ("--sound-codes", 32, "--duration-tokens")):
        error = refused(capsys, tmp_path, tmp_path / "extended", tmp_path / "out", *arguments)
        assert "sound tokens for 33 codes with durations False found" in error
    error = refused(capsys, tmp_path, llama, tmp_path / "extended", "--sound-codes", 32)
    assert "exists already" in error
    assert "--sound-codes 0 found" in refused(capsys, tmp_path, llama, tmp_path / "out", "--sound-codes", 0)
    assert "--noise -1.0" in refused(capsys, tmp_path, llama, tmp_path / "out", "--sound-codes", 8, "--noise", -1)
    padded = ("--sound-codes", 8, "--vocab-multiple", 8)
    assert "expected it at the import" in refused(capsys, tmp_path, llama, tmp_path / "out", *padded)

    plain = Path(shutil.copytree(llama, tmp_path / "plain"))
    (plain / "tokenizer.json").unlink()
    assert "no tokenizer.json found" in refused(capsys, tmp_path, plain, tmp_path / "out", "--sound-codes", 8)


def test_tokens_that_were_added_by_others(folders, tmp_path, capsys):
    source = Path(shutil.copytree(folders["llama"], tmp_path / "source"))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] = sound_token(3)
    write_json(source / "tokenizer.json", tokenizer)
    error = refused(capsys, tmp_path, source, tmp_path / "out", "--sound-codes", 8)
    assert "sound tokens must be numbered one after another" in error


def test_a_tokenizer_that_was_changed_in_a_model_folder(folders, tmp_path):
    language_model.import_hf(folders["llama"], tmp_path / "model", None)
    extend_vocabulary.add_sound_tokens(tmp_path / "model" / "tokenizer", SoundVocabulary(264, 9, False))
    extension = extend_vocabulary.Extension(8, False, 0, 0.05)
    with pytest.raises(InputError, match="config.json has None"):
        extend_vocabulary.extend(recognise(tmp_path / "model"), tmp_path / "out", extension, None)
