"""Whisper in OpenAI's and Hugging Face's formats: in, the same logits, out again bit for bit; and everything that is refused."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from reference_weights import jitted

from converters import safetensors_files, torch_files, whisper, whisper_text
from converters.__main__ import main
from converters.recognise import recognise
from ichigo_jax.audio.log_mel import log_mel
from ichigo_jax.errors import InputError
from ichigo_jax.models.whisper import Whisper, WhisperConfig
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import load_arrays, load_config, load_model
from ichigo_jax.text.train_tokenizer import train_whisper_tokenizer
from ichigo_jax.text.whisper import WhisperText

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DIMS = dict(
    n_mels=80, n_audio_ctx=40, n_audio_state=32, n_audio_head=4, n_audio_layer=2,
    n_vocab=300, n_text_ctx=12, n_text_state=32, n_text_head=2, n_text_layer=3,
)  # fmt: skip


def openai_model(dims=DIMS):
    package = pytest.importorskip("whisper")
    torch.manual_seed(0)
    model = package.model.Whisper(package.model.ModelDimensions(**dims)).eval()
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.1)  # left uninitialised by the constructor
    for name, value in model.named_parameters():
        if value.ndim == 1:  # norms and biases start as ones and zeros, which would hide a mistake
            torch.nn.init.normal_(value, mean=1.0 if "ln" in name and "weight" in name else 0.0, std=0.2)
    return model


def save_openai(file, model, dims=DIMS):
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, file)
    return file


def hf_model():
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=300, num_mel_bins=128, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=40, max_target_positions=12,
        pad_token_id=256, bos_token_id=256, eos_token_id=256, decoder_start_token_id=257, suppress_tokens=[1, 2],
        begin_suppress_tokens=None, init_std=0.2,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=256, eos_token_id=256, max_length=11)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.2)
    return model


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    train_whisper_tokenizer(["turn on the light"], folder, 260)
    return folder


@pytest.fixture(scope="module")
def openai_file(tmp_path_factory):
    return save_openai(tmp_path_factory.mktemp("openai") / "anything", openai_model())


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, text_folder):
    folder = tmp_path_factory.mktemp("hf") / "whisper"
    hf_model().save_pretrained(folder)
    shutil.copytree(text_folder, folder, dirs_exist_ok=True)
    write_json(folder / "preprocessor_config.json", {"feature_size": 128, "odd": [1, 2]})
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def load(folder):
    config = load_config(folder, "whisper", WhisperConfig)
    return load_model(folder, lambda rngs: Whisper(config, rngs), jnp.float32)


def state_dict_of(file):
    return {key: tensor.read() for key, tensor in torch_files.tensors(torch_files.load(file)["model_state_dict"], "").items()}


def assert_same_bits(expected, found):
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == expected[key].dtype and found[key].shape == expected[key].shape, key
        assert found[key].tobytes() == expected[key].tobytes(), key


# ---- parity ----------------------------------------------------------------------------------------------------------


def outputs(folder, mels):
    """Ours from samples to logits, and what the references need for the same."""
    clip = (0.3 * np.sin(np.arange(12_800) * 0.1) * np.linspace(0, 1, 12_800)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 300, (1, 9))
    model = load(folder)
    mel = log_mel(jnp.asarray(clip[None]), jnp.array([12_800]), mels=mels, frames=80)
    states = jitted(model.encoder, "__call__")(mel)
    return clip, tokens, states, jitted(model.decoder, "__call__")(tokens, states)


def test_logits_equal_openai_whisper(openai_file, tmp_path):
    assert run("import", openai_file, tmp_path / "model") == 0
    clip, tokens, states, logits = outputs(tmp_path / "model", 80)
    model = openai_model()
    package = pytest.importorskip("whisper")
    with torch.no_grad():
        mel = package.log_mel_spectrogram(torch.tensor(clip))[None]
        expected_states = model.encoder(mel)
        expected = model.decoder(torch.tensor(tokens), expected_states)
    np.testing.assert_allclose(states, expected_states, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 0.5


def test_logits_equal_transformers(hf_folder, tmp_path):
    assert run("import", hf_folder, tmp_path / "model") == 0
    clip, tokens, _, logits = outputs(tmp_path / "model", 128)
    extract = transformers.WhisperFeatureExtractor(feature_size=128)
    mel = torch.tensor(extract(clip, sampling_rate=16_000, padding="longest")["input_features"])
    with torch.no_grad():
        expected = hf_model()(input_features=mel, decoder_input_ids=torch.tensor(tokens)).logits
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_openai_round_trip_is_bit_exact(dtype, tmp_path):
    package = pytest.importorskip("whisper")
    file = save_openai(tmp_path / "a.pt", openai_model().to(getattr(torch, dtype)))
    assert run("import", file, tmp_path / "model") == 0
    assert {str(array.dtype) for array in load_arrays(tmp_path / "model").values()} == {dtype}
    assert run("export", tmp_path / "model", tmp_path / "b.pt") == 0
    assert torch.load(tmp_path / "b.pt", weights_only=True)["dims"] == DIMS
    assert_same_bits(state_dict_of(file), state_dict_of(tmp_path / "b.pt"))
    assert package.load_model(str(tmp_path / "b.pt"), device="cpu").dims.n_text_layer == 3
    assert load(tmp_path / "model").encoder.positions[...].dtype == jnp.float32


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_hf_round_trip_is_bit_exact_and_whole(shard_size, hf_folder, text_folder, tmp_path):
    source = tmp_path / "source"
    hf_model().half().save_pretrained(source, max_shard_size=shard_size)
    assert (source / safetensors_files.INDEX).exists() == (shard_size == "100KB")
    shutil.copytree(text_folder, source, dirs_exist_ok=True)
    assert run("import", source, tmp_path / "model") == 0
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    tensors = lambda folder: {key: x.read() for key, x in safetensors_files.read_folder(folder).items()}  # noqa: E731
    assert_same_bits(tensors(source), tensors(tmp_path / "hf"))
    assert read_json(tmp_path / "hf" / "config.json") == read_json(source / "config.json")
    assert read_json(tmp_path / "hf" / "generation_config.json") == read_json(source / "generation_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    _, loading = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values()), loading


def test_settings_of_a_hugging_face_folder_survive(hf_folder, tmp_path):
    assert run("import", hf_folder, tmp_path / "model") == 0
    assert (tmp_path / "model" / "tokenizer" / "tokenizer.json").exists()
    assert run("export", tmp_path / "model", tmp_path / "hf") == 0
    assert read_json(tmp_path / "hf" / "config.json")["suppress_tokens"] == [1, 2]
    assert read_json(tmp_path / "hf" / "preprocessor_config.json")["odd"] == [1, 2]


def test_openai_to_hugging_face_gives_the_same_logits(openai_file, text_folder, tmp_path):
    assert run("import", openai_file, tmp_path / "model", "--tokenizer", text_folder) == 0
    assert run("export", tmp_path / "model", tmp_path / "hf", "--format", "hf") == 0
    loaded, loading = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values()), loading
    text = WhisperText.from_folder(tmp_path / "hf")
    assert loaded.config.decoder_start_token_id == text.prompt[0] and loaded.generation_config.eos_token_id == text.end
    assert loaded.generation_config.lang_to_id == {"<|en|>": text.prompt[1]}
    mel, tokens = torch.randn(1, 80, 80), torch.tensor([[257, 3, 4]])
    with torch.no_grad():
        expected = openai_model()(mel, tokens)
        found = loaded.eval()(input_features=mel, decoder_input_ids=tokens).logits
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_import_casts_parameters_but_not_the_fixed_positions(openai_file, tmp_path):
    assert run("import", openai_file, tmp_path / "model", "--dtype", "bfloat16") == 0
    arrays = load_arrays(tmp_path / "model")
    assert arrays["decoder", "positions"].dtype == jnp.bfloat16
    assert {path for path, array in arrays.items() if array.dtype == np.float32} == {("encoder", "positions")}


# ---- the text tokenizer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_vocab", whisper_text.FAMILIES)
def test_text_tokenizer_from_the_assets_equals_openai_whisper(n_vocab, tmp_path):
    tokenizers = pytest.importorskip("whisper.tokenizer")
    multilingual, languages = whisper_text.FAMILIES[n_vocab]
    assert whisper_text.build(n_vocab, tmp_path) is None
    text = WhisperText.from_folder(tmp_path)
    expected = tokenizers.get_tokenizer(multilingual, num_languages=languages, language="en", task="transcribe")
    assert (text.size, text.end) == (n_vocab, expected.eot) == (expected.encoding.n_vocab, expected.eot)
    assert tuple(text.prompt) == expected.sot_sequence_including_notimestamps
    assert whisper_text.special_ids(tmp_path) == expected.special_tokens
    random = np.random.default_rng(0)
    letters = list("abcdefghij klmnopqr stuvwxyz ABC .,!?'-\"0123456789\n\tàéüñçßạốữ中文字日本한국어русскийعربي😀")
    texts = ["", " ", "It's 12345 o'clock, isn't it?", "aaaaaaaaaaaa ababab", "<|endoftext|> in a text", "Xin chào các bạn"]
    texts += ["".join(random.choice(letters, random.integers(1, 60))) for _ in range(300)]
    for string in texts:
        ids = text.encode(string)
        assert ids == expected.encoding.encode(string, disallowed_special=()), repr(string)
        assert text.decode(ids) == expected.decode(ids).strip(), repr(string)
    with_transformers = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert with_transformers.convert_tokens_to_ids("<|30.00|>") == expected.timestamp_begin + 1500 == n_vocab - 1


def test_import_says_where_the_text_tokenizer_comes_from(openai_file, text_folder, tmp_path, capsys):
    assert run("import", openai_file, tmp_path / "a") == 0
    assert "no text tokenizer written" in capsys.readouterr().out
    assert not (tmp_path / "a" / "tokenizer").exists()
    assert run("import", openai_file, tmp_path / "b", "--tokenizer", text_folder) == 0
    assert "text tokenizer written: from tokenizer" in capsys.readouterr().out
    assert (tmp_path / "b" / "tokenizer" / "tokenizer.json").exists()
    small = save_openai(tmp_path / "small", openai_model(DIMS | {"n_vocab": 200}), DIMS | {"n_vocab": 200})
    assert run("import", small, tmp_path / "c", "--tokenizer", text_folder) == 2
    assert "265 ids found, the model has 200" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


# ---- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["openai", "hf", "model folder"])
def test_inspect(where, openai_file, hf_folder, tmp_path, capsys):
    run("import", openai_file, tmp_path / "model")
    capsys.readouterr()
    assert run("inspect", {"openai": openai_file, "hf": hf_folder, "model folder": tmp_path / "model"}[where]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["format"] == where and lines["kind"] == "whisper" and lines["size"] == "not a released one"
    assert lines["audio"] == "2 layers, width 32, 4 heads, 40 positions"
    assert lines["mels"] == ("128" if where == "hf" else "80") and lines["dtype"] == "float32"


def test_sizes_are_told_by_dimensions():
    config = lambda **change: WhisperConfig(**DIMS | change, layer_norm_eps=1e-5)  # noqa: E731
    medium = dict(n_audio_state=1024, n_text_state=1024, n_audio_layer=24, n_text_layer=24)
    large = dict(n_audio_state=1280, n_text_state=1280, n_audio_layer=32, n_text_layer=32)
    assert whisper.size(config(**medium, n_vocab=51_865)) == "medium"
    assert whisper.size(config(**medium, n_vocab=51_864)) == "medium.en"
    assert whisper.size(config(**large, n_mels=80)) == "large"
    assert whisper.size(config(**large, n_mels=128)) == "large-v3"
    assert whisper.fitting(1024) == "medium" and whisper.fitting(48).startswith("none")


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_all_faults_of_the_weights_are_told_together(tmp_path, capsys):
    state = openai_model().state_dict()
    del state["decoder.ln.bias"]
    state["encoder.conv1.weight"] = state["encoder.conv1.weight"][:, :20]
    state["extra"] = torch.zeros(1)
    state["encoder.blocks.1.attn.query.weight"] = state["encoder.blocks.1.attn.query.weight"].half()
    torch.save({"dims": DIMS, "model_state_dict": state}, tmp_path / "broken.pt")
    assert run("import", tmp_path / "broken.pt", tmp_path / "model") == 2
    error = capsys.readouterr().err
    for fault in ("extra is unknown", "decoder.ln.bias is missing", "has shape [32, 20, 3], expected [32, 80, 3]", "float16"):
        assert fault in error
    assert error.count("\n") == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["broken.pt"]


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"dims": DIMS, "model_state_dict": {"a": Evil()}}, "print, which is code"),
        ([1, 2], "expected a dictionary, found list"),
        ({"dims": DIMS | {"n_mels": 0}, "model_state_dict": {}}, "n_mels 0 found, expected positive"),
        ({"dims": {"n_mels": 80}, "model_state_dict": {}}, "missing field 'n_audio_ctx'"),
        ({"dims": DIMS, "model_state_dict": {"a": 3}}, "a is no dense tensor but int"),
        ({"weights": {}}, "a PyTorch file with weights found"),
    ],
)
def test_files_that_are_no_whisper(contents, message, tmp_path, capsys):
    torch.save(contents, tmp_path / "file.pt")
    assert run("import", tmp_path / "file.pt", tmp_path / "model") == 2
    captured = capsys.readouterr()
    assert message in captured.err and "run\n" not in captured.out


def test_files_that_are_not_pytorchs(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"no pickle")
    whole = save_openai(tmp_path / "b.pt", openai_model()).read_bytes()
    (tmp_path / "b.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("a.pt", "b.pt"):
        assert run("inspect", tmp_path / name) == 2
        assert "expected a PyTorch file" in capsys.readouterr().err


def test_the_older_file_format_is_read_too(tmp_path):
    contents = {"dims": DIMS, "model_state_dict": openai_model().state_dict()}
    torch.save(contents, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert whisper.open_source(recognise(tmp_path / "old.pt")).config.n_vocab == 300


def test_an_old_torch_is_refused(openai_file, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(InputError, match=r"torch 2\.9\.1\+cpu found, expected 2\.10"):
        recognise(openai_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu_new"}, "activation_function 'gelu_new' cannot be expressed"),
        ({"encoder_ffn_dim": 64, "scale_embedding": True}, "scale_embedding True cannot be expressed.*encoder_ffn_dim 64"),
        ({"architectures": ["WhisperModel"]}, "architectures"),
        ({"d_model": None}, "d_model is missing"),
    ],
)
def test_what_a_hugging_face_config_may_not_say(change, message, hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "source")
    write_json(folder / "config.json", read_json(folder / "config.json") | change)
    with pytest.raises(InputError, match=message):
        whisper.open_source(recognise(folder))


def test_an_output_projection_must_be_the_embedding(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "source")
    tensors = {key: tensor.read().copy() for key, tensor in safetensors_files.read_folder(folder).items()}
    embedding = tensors["model.decoder.embed_tokens.weight"]

    def with_projection(projection):
        contents = tensors | {"proj_out.weight": projection}
        infos = {key: torch_files.TensorInfo(array.dtype, array.shape) for key, array in contents.items()}
        safetensors_files.write_file(folder / safetensors_files.SINGLE, infos, contents.__getitem__)
        return whisper.open_source(recognise(folder))

    found = with_projection(embedding)
    assert "proj_out.weight" not in found.infos and "left out: proj_out.weight" in found.notes[0]
    with pytest.raises(InputError, match="Whisper's are tied; if it is out of date, remove it from the weights"):
        with_projection(embedding + 1)
    del tensors["model.decoder.embed_tokens.weight"]
    found = with_projection(embedding)
    assert "model.decoder.embed_tokens.weight" in found.infos and "proj_out.weight alone is stored" in found.notes[0]


def test_an_index_may_name_an_output_projection_that_no_shard_has(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder, tmp_path / "source")
    (folder / safetensors_files.SINGLE).rename(folder / "1.safetensors")
    names = [*safetensors_files.read_header(folder / "1.safetensors"), "proj_out.weight"]
    write_json(folder / safetensors_files.INDEX, {"weight_map": dict.fromkeys(names, "1.safetensors")})
    assert "proj_out.weight" not in whisper.open_source(recognise(folder)).infos


def test_whisper_folders_of_links_of_several_dtypes_and_of_nan(hf_folder, tmp_path, capsys):
    folder = shutil.copytree(hf_folder, tmp_path / "source")
    file = folder / safetensors_files.SINGLE
    tensors = {key: tensor.read().copy() for key, tensor in safetensors_files.read_folder(folder).items()}

    def write():
        infos = {key: torch_files.TensorInfo(array.dtype, array.shape) for key, array in tensors.items()}
        safetensors_files.write_file(tmp_path / "weights", infos, tensors.__getitem__)

    write()
    for name in (safetensors_files.SINGLE, "config.json"):
        if name == "config.json":
            (folder / name).rename(tmp_path / name)
        else:
            file.unlink()
        (folder / name).symlink_to(tmp_path / ("weights" if name == safetensors_files.SINGLE else name))
    assert run("import", folder, tmp_path / "model") == 0

    tensors["model.decoder.layers.1.fc1.weight"] = tensors["model.decoder.layers.1.fc1.weight"].astype(np.float16)
    write()
    capsys.readouterr()
    assert run("import", folder, tmp_path / "no") == 2
    assert "but the same weight of another layer has float32; import with --dtype" in capsys.readouterr().err
    assert run("inspect", folder) == 0 and "float16, float32" in capsys.readouterr().out
    assert run("import", folder, tmp_path / "cast", "--dtype", "float32") == 0

    tensors["model.encoder.conv1.weight"][0, 0, 0] = np.nan
    write()
    capsys.readouterr()
    assert run("import", folder, tmp_path / "no", "--dtype", "float32") == 2
    assert "model.encoder.conv1.weight holds NaN, expected finite numbers" in capsys.readouterr().err


def test_an_epsilon_that_the_formats_do_not_know(openai_file, tmp_path):
    run("import", openai_file, tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    write_json(tmp_path / "model" / "config.json", config | {"layer_norm_eps": 1e-6})
    with pytest.raises(InputError, match="layer_norm_eps 1e-06 found, expected 1e-05"):
        whisper.export_whisper(recognise(tmp_path / "model"), tmp_path / "out.pt", "openai")


def test_flags_that_do_not_belong(openai_file, tmp_path, capsys):
    assert run("import", openai_file, tmp_path / "model", "--whisper", openai_file) == 2
    assert "expected them with a quantiser only" in capsys.readouterr().err
    run("import", openai_file, tmp_path / "model")
    assert run("export", tmp_path / "model", tmp_path / "out", "--format", "ichigo") == 2
    assert "expected one of hf, openai for a whisper" in capsys.readouterr().err
    assert run("import", tmp_path / "model", tmp_path / "again") == 2
    assert "a model folder found" in capsys.readouterr().err
