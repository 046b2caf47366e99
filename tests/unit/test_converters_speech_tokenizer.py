"""WhisperSpeech and Ichigo files: in, the same codes and states, out again bit for bit; codebooks grown and merged."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from converters import codebook, quantizer, torch_files
from converters.__main__ import main
from ichigo_jax import SpeechTokenizer
from ichigo_jax.errors import InputError
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import load_arrays, load_config

torch = pytest.importorskip("torch")
whisper = pytest.importorskip("whisper")

DIMS = dict(  # the originals know no other audio context
    n_mels=80, n_audio_ctx=1500, n_audio_state=32, n_audio_head=2, n_audio_layer=1,
    n_vocab=300, n_text_ctx=12, n_text_state=32, n_text_head=2, n_text_layer=1,
)  # fmt: skip
WHISPERSPEECH = dict(  # what the package stores of a model's arguments
    codebook_dim=8, vq_codes=32, q_depth=1, n_head=2, head_width=16, ffn_mult=4, depth=1, use_cosine_sim=True, downsample=2,
    whisper_model_name="medium",
)  # fmt: skip
TUNABLES = dict(
    init_std=1.5, embeddings_std=0.045, embeddings_lr_scale=1, query_mult=2, rope=True, mask_embs=True, downsample_conv=False,
    downsample_mean=True, codebook_dim=32, codebook_decay=0.9, lr0=0.0009, warmup_steps=850, random=False, output_mult=None,
)  # fmt: skip


@pytest.fixture(autouse=True)
def torchaudio(monkeypatch):
    """The originals import torchaudio for reading files, which nothing here needs."""
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))


def randomized(module, seed):
    """Random weights that all matter, and statistics as a training would have left them."""
    torch.manual_seed(seed)
    for name, value in module.named_parameters():
        std = 0.2 if value.ndim == 1 else 1.5 * value[0].numel() ** -0.5
        torch.nn.init.normal_(value, mean=1.0 if ("ln" in name and "weight" in name) else 0.0, std=std)
    for name, value in module.named_buffers():
        if name.endswith(("cluster_size", "val_true", "val_total", "_codebook_usage")):
            torch.nn.init.uniform_(value, 0.0, 9.0)
        elif name.endswith("embed_avg"):
            torch.nn.init.normal_(value)
    return module.eval()


def whisper_model():
    model = randomized(whisper.model.Whisper(whisper.model.ModelDimensions(**DIMS)), 1)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.1)
    return model


def transformer(codes=32, seed=0, **tunables):
    """The quantiser as ``ichigo_asr`` trains it."""
    cls = pytest.importorskip("ichigo_asr.models.vq_transformer").RQBottleneckTransformer
    config = pytest.importorskip("ichigo_asr.config.vq_config").VQConfig(codebook_dim=8, **tunables)
    arguments = {"vq_codes": codes, "q_depth": 1, "n_head": 2, "head_width": 16, "codebook_dim": 8, "threshold_ema_dead_code": 0}
    return randomized(cls(**arguments, use_cosine_sim=True, downsample=2, config=config), seed)


def ichigo_settings(**change):
    """A section ``quantizer`` of ichigo's own configuration."""
    names = ("codebook_dim", "vq_codes", "n_head", "head_width", "ffn_mult", "depth", "use_cosine_sim", "downsample", "q_depth")
    return {name: WHISPERSPEECH[name] for name in names} | dict(
        mask_code=32, num_quantizers=1, codebook_decay=0.99, commitment_weight=1.0, threshold_ema_dead_code=0, query_mult=2,
        no_quantize=False, rope=True, mask_embs=True, downsample_conv=False, downsample_mean=True,
    ) | change  # fmt: skip


def ichigo_model(**change):
    """The quantiser as ``ichigo`` runs it."""
    cls = pytest.importorskip("ichigo.asr.arch.quantizer").Quantizer
    return cls({"quantizer": ichigo_settings(**change)}).eval()


def save_ichigo(file, model):
    """As Lightning saves a training, optimizer and all."""
    contents = {
        "epoch": 3,
        "global_step": 1234,
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"phase": 1, "lr0": 0.001},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
    }
    torch.save(contents, file)
    return file


def save_whisperspeech(file, model, config=WHISPERSPEECH, tunables=TUNABLES):
    state = {key: value for key, value in model.state_dict().items() if key != "_codebook_usage"}
    torch.save({"config": config, "tunables": tunables, "state_dict": state}, file)
    return file


@pytest.fixture(scope="module")
def whisper_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("whisper") / "whisper.pt"
    torch.save({"dims": DIMS, "model_state_dict": whisper_model().state_dict()}, file)
    return file


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def imported(source, whisper_file, target, *flags):
    assert run("import", source, target, "--whisper", whisper_file, *flags) == 0
    return target


def config_of(folder):
    return load_config(folder, "speech_tokenizer", SpeechTokenizerConfig).quantizer


def tensors_of(file):
    return {key: tensor.read() for key, tensor in torch_files.tensors(torch_files.load(file)["state_dict"], "").items()}


def assert_same_bits(expected, found):
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == expected[key].dtype and found[key].shape == expected[key].shape, key
        assert found[key].tobytes() == expected[key].tobytes(), key


def clips():
    random = np.random.default_rng(0)
    pitch = 200 + 3000 * random.random((2, 1 + 51_234 // 1600)).repeat(1600, axis=1)[:, :51_234]
    clips = 0.3 * np.sin(2 * np.pi * pitch * np.arange(51_234) / 16_000) + 0.05 * random.normal(size=pitch.shape)
    return [clips[0].astype(np.float32), clips[1, :9000].astype(np.float32)]


def assert_same_pipeline(folder, model, quantizers=1):
    """Ours on the imported folder against log-mel, encoder and quantiser of the packages."""
    tokenizer = SpeechTokenizer.from_pretrained(folder, batch_size=2)
    reference = whisper_model()
    found = tokenizer.encode(clips())
    seen = set()
    for clip, codes in zip(clips(), found):
        mel = whisper.log_mel_spectrogram(torch.tensor(clip))[None]
        frames = mel.shape[-1]
        with torch.no_grad():
            states = reference.encoder(torch.nn.functional.pad(mel, (0, 3000 - frames), value=-1.5))
            expected = model.quantize(states, frames)[0].numpy()
            x = model.downsample_embeddings(states)
            x = x + model.mlp(model.mlp_ln(x))
            first = model.rq.layers[0]
            z = torch.nn.functional.normalize(first.project_in(x), dim=-1)
            best = (z @ first._codebook.embed[0].T)[0].topk(2).values
        assert codes.shape == expected.shape and len(codes) == len(clip) // 640
        clear = ((best[:, 0] - best[:, 1]) > 1e-5).numpy()[: len(codes)]
        np.testing.assert_array_equal(codes[clear], expected[clear])
        assert clear.mean() > 0.9
        seen |= set(codes.ravel())
        if quantizers == 1:
            with torch.no_grad():
                expected_states = model.dequantize(torch.tensor(expected)).numpy()
            np.testing.assert_allclose(tokenizer.dequantize([expected]), expected_states, atol=1e-4, rtol=0)
    assert len(seen) > 4


# ---- the whole chain -------------------------------------------------------------------------------------------------


def test_ichigo_from_file_to_codes_and_back(whisper_file, tmp_path, capsys):
    model = transformer()
    source = save_ichigo(tmp_path / "a.ckpt", model)
    folder = imported(source, whisper_file, tmp_path / "model")
    printed = capsys.readouterr().out
    for line in (
        "head_width: 16 (from the shapes)",
        "downsample: 2 (as in all released models)",
        "mask_code: 32 (from the shapes)",
    ):
        assert line in printed
    assert "not kept: optimizer_states" in printed
    reference = ichigo_model()
    reference.load_state_dict(model.state_dict(), strict=False)
    assert_same_pipeline(folder, reference)

    assert run("export", folder, tmp_path / "b.pth") == 0
    assert_same_bits(tensors_of(source), tensors_of(tmp_path / "b.pth"))
    contents = torch.load(tmp_path / "b.pth", weights_only=True)
    assert contents["global_step"] == 1234 and contents["hyper_parameters"] == {"phase": 1, "lr0": 0.001}
    state = {key.replace("model.", ""): value for key, value in contents["state_dict"].items()}
    transformer(seed=5).load_state_dict(state)
    cls = pytest.importorskip("ichigo.asr.arch.quantizer").Quantizer
    assert not cls(contents["config"]).load_state_dict(state, strict=False).missing_keys
    again = imported(tmp_path / "b.pth", whisper_file, tmp_path / "again")
    assert config_of(again) == config_of(folder)
    assert read_json(again / "provenance.json")["fingerprint"] == read_json(folder / "provenance.json")["fingerprint"]


def test_whisperspeech_from_file_to_codes_and_back(whisper_file, tmp_path, capsys):
    model = transformer()
    source = save_whisperspeech(tmp_path / "a.model", model)
    folder = imported(source, whisper_file, tmp_path / "model")
    assert "fits Whisper: medium" in (printed := capsys.readouterr().out) and "query_mult: 2.0 (from the file)" in printed
    reference = ichigo_model()
    reference.load_state_dict(model.state_dict(), strict=False)
    assert_same_pipeline(folder, reference)

    assert run("export", folder, tmp_path / "b.model") == 0
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("a.model", "b.model"))
    assert {**after, "state_dict": None} == {**before, "state_dict": None}
    assert_same_bits(tensors_of(source), tensors_of(tmp_path / "b.model"))


def test_four_quantizers(whisper_file, tmp_path):
    model = randomized(ichigo_model(num_quantizers=4, q_depth=4), 0)
    folder = imported(save_ichigo(tmp_path / "a.pth", model), whisper_file, tmp_path / "model")
    assert config_of(folder).num_quantizers == 4
    assert_same_pipeline(folder, model, quantizers=4)
    assert run("export", folder, tmp_path / "b.pth") == 0
    assert_same_bits(tensors_of(tmp_path / "a.pth"), tensors_of(tmp_path / "b.pth"))
    config = WHISPERSPEECH | {"q_depth": 4}
    folder = imported(save_whisperspeech(tmp_path / "a.model", model, config), whisper_file, tmp_path / "model2")
    assert_same_pipeline(folder, model, quantizers=4)


def test_convolution_and_no_rope(whisper_file, tmp_path):
    change = {"downsample_conv": True, "downsample_mean": False, "rope": False, "query_mult": 1}
    model = randomized(ichigo_model(**change), 0)
    source = save_whisperspeech(
        tmp_path / "a.model", model, tunables={k: v for k, v in change.items() if v} | {"mask_embs": True}
    )
    folder = imported(source, whisper_file, tmp_path / "model")
    config = config_of(folder)
    assert (config.downsampling, config.rope, config.query_mult, config.mask_code) == ("conv", False, 1.0, 32)
    assert_same_pipeline(folder, model)
    assert run("export", folder, tmp_path / "b.model") == 0
    assert_same_bits(tensors_of(source), tensors_of(tmp_path / "b.model"))


# ---- what was trained here, half precision, other ways out -----------------------------------------------------------


def test_what_was_trained_here_loads_into_the_packages(whisper_file, tmp_path):
    """Without what an import keeps, the files have all that the packages ask for."""
    folder = imported(save_ichigo(tmp_path / "a.pth", transformer()), whisper_file, tmp_path / "model")
    for name in ("foreign.json", "foreign.safetensors"):
        (folder / name).unlink()
    assert run("export", folder, tmp_path / "b.pth") == 0
    contents = torch.load(tmp_path / "b.pth", weights_only=True)
    state = {key.removeprefix("model."): value for key, value in contents["state_dict"].items()}
    fresh = transformer(seed=5)
    for key in ("val_true", "val_total", "_codebook_usage"):
        assert not state[key].any(), key
    torch.testing.assert_close(state["_out_blocks.0.attn.rotary.inv_freq"], fresh._out_blocks[0].attn.rotary.inv_freq)
    fresh.load_state_dict(state)

    assert run("export", folder, tmp_path / "b.model", "--format", "whisperspeech") == 0
    contents = torch.load(tmp_path / "b.model", weights_only=True)
    fields = set(WHISPERSPEECH) - {"whisper_model_name"}
    assert {name: contents["config"][name] for name in fields} == {name: WHISPERSPEECH[name] for name in fields}
    assert contents["tunables"].items() <= TUNABLES.items()
    assert contents["state_dict"].keys() == state.keys() - {"_codebook_usage"}

    assert run("export", folder, tmp_path / "w.pt", "--format", "openai") == 0
    loaded = whisper.load_model(str(tmp_path / "w.pt"), device="cpu").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in whisper_model().state_dict().items())


def test_half_precision_is_kept(whisper_file, tmp_path):
    model = transformer().half()
    source = save_ichigo(tmp_path / "a.pth", model)
    folder = imported(source, whisper_file, tmp_path / "model")
    assert run("export", folder, tmp_path / "b.pth") == 0
    assert_same_bits(tensors_of(source), tensors_of(tmp_path / "b.pth"))
    reference = ichigo_model()
    # Rotary frequencies in half precision are far off at position 1500; ours are as in the training, in single precision.
    state = {key: value for key, value in model.float().state_dict().items() if not key.endswith("inv_freq")}
    reference.load_state_dict(state, strict=False)
    assert_same_pipeline(folder, reference)


def test_casting_leaves_codebooks_alone(whisper_file, tmp_path):
    source = save_ichigo(tmp_path / "a.pth", transformer())
    folder = imported(source, whisper_file, tmp_path / "model", "--dtype", "bfloat16")
    dtypes = {path: str(array.dtype) for path, array in load_arrays(folder).items()}
    kept = {path for path, dtype in dtypes.items() if dtype == "float32"}
    assert kept == {path for path in dtypes if "codebook" in path} | {("whisper", "encoder", "positions")}
    assert set(dtypes.values()) == {"float32", "bfloat16"}


def test_a_speech_tokenizer_is_a_whisper_too(whisper_file, tmp_path):
    source = save_ichigo(tmp_path / "a.pth", transformer())
    folder = imported(source, whisper_file, tmp_path / "model")
    again = imported(source, folder, tmp_path / "again")
    fingerprints = {read_json(path / "provenance.json")["fingerprint"] for path in (folder, again)}
    assert len(fingerprints) == 1 and SpeechTokenizer.from_pretrained(folder).fingerprint in fingerprints
    assert read_json(again / "foreign.json")["whisper"] == {"format": "openai"}


# ---- inspect ---------------------------------------------------------------------------------------------------------


def inspected(capsys, *arguments):
    capsys.readouterr()
    assert run("inspect", *arguments) == 0
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_inspect(whisper_file, tmp_path, capsys):
    ichigo = save_ichigo(tmp_path / "a.pth", transformer())
    lines = inspected(capsys, ichigo)
    assert lines["format"] == "ichigo" and lines["kind"] == "speech_tokenizer"
    assert lines["fits Whisper"] == "none that was released; one of width 32"
    assert lines["n_head"] == "2 (from the shapes)" and lines["vq_codes"] == "32 (from the shapes)"
    assert lines["bookkeeping"] == "_codebook_usage, _out_blocks.0.attn.rotary.inv_freq, val_total, val_true"
    assert inspected(capsys, ichigo, "--set", "query_mult=1")["query_mult"] == "1.0 (given)"
    assert inspected(capsys, save_whisperspeech(tmp_path / "a.model", transformer()))["fits Whisper"] == "medium"
    lines = inspected(capsys, imported(ichigo, whisper_file, tmp_path / "model"))
    assert lines["format"] == "model folder" and lines["mask_code"] == "32" and lines["source"] == "a.pth"
    assert lines["whisper audio"].startswith("1 layers, width 32") and len(lines["fingerprint"]) == 16


@pytest.mark.parametrize(("rows", "mask"), [(513, 512), (1025, 1024), (2049, 2048), (2561, 2048), (512, None)])
def test_mask_code_is_told_by_the_rows(rows, mask):
    tensors = {
        "positional_embedding.weight": (1500, 1024),
        "mlp.0.weight": (4096, 1024),
        "rq.layers.0._codebook.embed": (1, rows, 64),
        "_out_blocks.0.attn_ln.weight": (1024,),
        "_out_blocks.0.attn.rotary.inv_freq": (32,),
    }
    infos = {key: torch_files.TensorInfo(np.dtype(np.float32), shape) for key, shape in tensors.items()}
    config = quantizer.infer(infos, {}, {}, "file").config
    assert (config.mask_code, config.codes, config.n_head, config.head_width) == (mask, rows, 16, 64)


# ---- codebooks -------------------------------------------------------------------------------------------------------


def test_grow_and_merge(whisper_file, tmp_path, capsys):
    small = imported(save_ichigo(tmp_path / "a.pth", transformer(codes=8)), whisper_file, tmp_path / "small")
    assert run("grow-codebook", small, tmp_path / "grown", "--copies", 4, "--noise", 0.01, "--seed", 3) == 0
    assert "codes: 32, mask code 32, 33 rows" in capsys.readouterr().out
    before, after = load_arrays(small), load_arrays(tmp_path / "grown")
    embed, grown = before[codebook.EMBED][0], after[codebook.EMBED][0]
    np.testing.assert_array_equal(grown[:8], embed[:8])
    np.testing.assert_array_equal(grown[32], embed[8])
    copies = grown[:32].reshape(4, 8, 8)
    shift = np.abs(copies[1:] - embed[:8])
    assert 0.001 < shift.mean() < 0.02 and not np.array_equal(copies[1], copies[2])
    np.testing.assert_allclose(np.linalg.norm(grown, axis=-1), 1.0, atol=1e-6)
    sizes, averages = after[codebook.SIZE][0], after[codebook.AVERAGE][0]
    np.testing.assert_allclose(sizes[:32].reshape(4, 8).sum(0), before[codebook.SIZE][0, :8], rtol=1e-6)
    np.testing.assert_allclose(averages[:8] * 4, before[codebook.AVERAGE][0, :8], rtol=1e-6)
    assert sizes[32] == before[codebook.SIZE][0, 8]
    codebook.grow(small, tmp_path / "same", 4, 0.01, 3)
    np.testing.assert_array_equal(load_arrays(tmp_path / "same")[codebook.EMBED][0], grown)

    assert run("merge-codebooks", tmp_path / "grown", small, tmp_path / "merged") == 0
    assert "codes: 40, mask code 32, 41 rows" in capsys.readouterr().out
    merged = load_arrays(tmp_path / "merged")
    for path in (codebook.EMBED, codebook.SIZE, codebook.AVERAGE):
        np.testing.assert_array_equal(merged[path], np.concatenate([after[path], before[path][:, :8]], axis=1))

    # ichigo_asr's own merged models load as this one does, and ichigo runs it with the mask code that the file tells.
    assert run("export", tmp_path / "merged", tmp_path / "merged.pth") == 0
    contents = torch.load(tmp_path / "merged.pth", weights_only=True)
    state = {key.removeprefix("model."): value for key, value in contents["state_dict"].items()}
    assert state["_codebook_usage"].shape == (41,) and not state["_codebook_usage"].any()
    transformer(codes=40, seed=5).load_state_dict(state)
    reference = ichigo_model(**contents["config"]["quantizer"])
    assert reference.mask_code == 32
    reference.load_state_dict(state, strict=False)
    assert_same_pipeline(tmp_path / "merged", reference)
    assert run("export", tmp_path / "merged", tmp_path / "merged.model", "--format", "whisperspeech") == 2
    assert "mask_code 32 found, expected the last, 40" in capsys.readouterr().err


def test_codebooks_that_do_not_fit(whisper_file, tmp_path):
    model = randomized(ichigo_model(num_quantizers=2, q_depth=2), 0)
    two = imported(save_ichigo(tmp_path / "a.pth", model), whisper_file, tmp_path / "two")
    one = imported(save_ichigo(tmp_path / "b.pth", transformer()), whisper_file, tmp_path / "one")
    with pytest.raises(InputError, match="num_quantizers 2 found, expected 1"):
        codebook.merge(one, two, tmp_path / "merged")
    with pytest.raises(InputError, match="at least 2 copies"):
        codebook.grow(one, tmp_path / "grown", 1, 0.01, 0)
    assert not any(Path(tmp_path / name).exists() for name in ("merged", "grown"))


def test_merged_whisperspeech_files_say_how_many_codes_they_have(whisper_file, tmp_path):
    folder = imported(save_whisperspeech(tmp_path / "a.model", transformer()), whisper_file, tmp_path / "model")
    codebook.grow(folder, tmp_path / "grown", 2, 0.01, 0)
    assert run("export", tmp_path / "grown", tmp_path / "b.model") == 0
    contents = torch.load(tmp_path / "b.model", weights_only=True)
    assert contents["config"] == WHISPERSPEECH | {"vq_codes": 64} and contents["tunables"] == TUNABLES


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err


def test_the_wrong_whisper_is_refused(whisper_file, tmp_path, capsys):
    cls = pytest.importorskip("ichigo.asr.arch.quantizer").Quantizer
    source = save_ichigo(tmp_path / "a.pth", cls({"quantizer": ichigo_settings(n_head=3)}))
    error = refused(capsys, "import", source, tmp_path / "model", "--whisper", whisper_file)
    assert "width 48" in error and "expected Whisper's n_audio_state, 32" in error and "it fits Whisper none" in error
    assert "give that by --whisper" in refused(capsys, "import", source, tmp_path / "model")
    error = refused(capsys, "import", source, tmp_path / "model", "--whisper", source)
    assert "speech_tokenizer as ichigo found, expected a Whisper" in error
    assert not (tmp_path / "model").exists()


def test_all_faults_of_the_tensors_are_told_together(whisper_file, tmp_path, capsys):
    model = transformer()
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    del state["model.mlp_ln.weight"], state["model.val_true"]  # the second need not be there
    state["model.surprise"] = torch.zeros(2)
    state["model.val_total"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    error = refused(capsys, "import", tmp_path / "a.pth", tmp_path / "model", "--whisper", whisper_file)
    for fault in ("mlp_ln.weight is missing", "surprise is unknown", "val_total has shape [3], expected [1]"):
        assert fault in error
    assert "val_true" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_cosine_sim": False}, "Euclidean codebooks cannot be expressed"),
        ({"depth": 2}, "_out_blocks.1.attn.query.weight is missing"),
        ({"vq_codes": 64}, "expected [1, 65, 8]"),
        ({"n_head": 0}, "n_head 0 found, expected positive numbers"),
        ({"downsample": 7}, "multiple of downsample 7"),
    ],
)
def test_settings_that_do_not_fit_their_tensors(change, message, tmp_path, capsys):
    source = save_whisperspeech(tmp_path / "a.model", transformer(), config=WHISPERSPEECH | change)
    assert message in refused(capsys, "inspect", source)


def test_flags_for_what_no_file_says(tmp_path, capsys):
    source = save_ichigo(tmp_path / "a.pth", transformer())
    assert "expected FIELD=VALUE" in refused(capsys, "inspect", source, "--set", "codes=3")
    assert "is not of the base 500.0" in refused(capsys, "inspect", source, "--set", "rope_base=500.0")
    assert "mean" in refused(capsys, "inspect", source, "--set", "downsampling=median")
    assert inspected(capsys, source, "--set", "downsampling=stride")["downsampling"] == "stride (given)"


def test_no_quantiser_in_the_file(tmp_path, capsys):
    torch.save({"state_dict": {"model.weight": torch.zeros(3)}}, tmp_path / "a.ckpt")
    assert "no quantiser found: positional_embedding.weight" in refused(capsys, "inspect", tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rope_base": 500.0}, "rope_base 500.0 found, expected 10000.0"), ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06")],
)
def test_what_the_packages_cannot_be_is_not_exported(change, message, whisper_file, tmp_path, capsys):
    folder = imported(save_ichigo(tmp_path / "a.pth", transformer()), whisper_file, tmp_path / "model")
    values = read_json(folder / "config.json")
    write_json(folder / "config.json", values | {"quantizer": values["quantizer"] | change})
    assert message in refused(capsys, "export", folder, tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()
