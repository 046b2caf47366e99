"""Training the speech tokenizer: ``configs/speech_tokenizer.py`` against ``ichigo_asr``, sharded, and what that lacks."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
from flax import nnx
from flax.traverse_util import flatten_dict
from reference_weights import filled, quantizer_weights, set_weights, whisper_weights

from ichigo_jax.audio.noise import add_noise
from ichigo_jax.data import speech
from ichigo_jax.data.faults import FaultLog
from ichigo_jax.data.speech import Layout, SpeechExamples, read_transcripts
from ichigo_jax.errors import InputError
from ichigo_jax.models.quantizer import Quantizer, QuantizerConfig
from ichigo_jax.models.whisper import Whisper, WhisperConfig
from ichigo_jax.parallel import batch_sharding, make_mesh
from ichigo_jax.storage.model_folder import save_model
from ichigo_jax.tasks.speech_tokenizer import SpeechTokenizerFiles, SpeechTokenizerTask
from ichigo_jax.text.train_tokenizer import train_whisper_tokenizer
from ichigo_jax.train import make_step, train
from ichigo_jax.training.optimizer import learning_rate_schedule, make_optimizer, rate_scale
from ichigo_jax.training.run_config import load
from ichigo_jax.training.state import logical_axes, make_state, split, state_shardings

RECIPE = str(Path(__file__).parents[2] / "configs" / "speech_tokenizer.py")
TEXTS = ("turn on", "what is two", "light", "turn it")
HEAD_WIDTH, STEPS, WARMUP = 16, 20, 5
SMALL_WHISPER = {
    "n_audio_state": 32,
    "n_audio_head": 2,
    "n_audio_layer": 1,
    "n_vocab": 272,
    "n_text_ctx": 16,
    "n_text_state": 32,
    "n_text_head": 2,
    "n_text_layer": 1,
}
SMALL_QUANTIZER = {"n_head": 2, "head_width": HEAD_WIDTH, "vq_codes": 24, "mask_code": 24, "codebook_dim": 8}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    train_whisper_tokenizer(TEXTS, folder, 262)
    return folder


def speak(seed, samples):
    """Something with a little melody, so that the codes differ."""
    random = np.random.default_rng(seed)
    pitch = 200 + 3000 * random.random(1 + samples // 1600).repeat(1600)[:samples]
    tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(samples) / 16000)
    return (tone + 0.05 * random.normal(size=samples)).astype(np.float32)


def write_corpus(folder, lengths, texts=TEXTS):
    """Clips of so many samples and their manifest."""
    clips, lines = [speak(seed, length) for seed, length in enumerate(lengths)], []
    for number, (clip, text) in enumerate(zip(clips, texts)):
        soundfile.write(folder / f"{number}.wav", clip, 16000, subtype="FLOAT")
        lines.append(json.dumps({"path": f"{number}.wav", "text": text}) + "\n")
    (folder / "clips.jsonl").write_text("".join(lines))
    return clips


def small_recipe(
    arguments, folder, text_folder, *, positions, batch_size, whisper=None, quantizer=None, objective=None, frozen=None
):
    """The run that ``configs/speech_tokenizer.py`` describes, of a small model on a small corpus, in float32."""
    config = load(f"{RECIPE}:{arguments}", [])
    model = {
        "whisper": {**config.model["whisper"], **SMALL_WHISPER, "n_audio_ctx": positions, **(whisper or {})},
        "quantizer": {**config.model["quantizer"], **SMALL_QUANTIZER, "positions": positions, **(quantizer or {})},
    }
    manifest = str(folder / "clips.jsonl")
    data = {
        **config.data,
        "text_tokenizer": str(text_folder),
        "text_length": 16,
        "sources": ({"path": manifest, "language": "en", "weight": 1.0},),
        "evaluation": ({"name": "heldout", "path": manifest, "language": "en", "limit": 2},),
    }
    optimizer = dataclasses.replace(config.optimizer, linear_rate_width=3 * HEAD_WIDTH, warmup_steps=WARMUP)
    return dataclasses.replace(
        config,
        model=model,
        data=data,
        objective={**config.objective, **(objective or {})},
        optimizer=optimizer if frozen is None else dataclasses.replace(optimizer, frozen=frozen),
        train=dataclasses.replace(config.train, steps=STEPS, batch_size=batch_size, compute_dtype="float32", remat="none"),
    )


def recording(optimizer):
    """The same optimizer; the first half of its state is the last gradients, as they were before the clip."""

    def update(gradients, state, params):
        updates, inner = optimizer.update(gradients, state[1], params)
        return updates, (gradients, inner)

    return optax.GradientTransformation(lambda params: (params, optimizer.init(params)), update)


def prepare(task, config, model):
    """What ``train`` makes of a model: the state at step 0, the optimizer, and the step to be jitted."""
    graphdef, *parts = split(model, config.optimizer.frozen)
    optimizer = recording(make_optimizer(config.optimizer, config.train.steps, model))
    return make_state(*parts, optimizer, config.train.spike_window), optimizer, make_step(task, config, graphdef, optimizer)


# ---- against the original --------------------------------------------------------------------------------------------


@pytest.fixture
def original(monkeypatch):
    """``ichigo_asr``'s model, its Lightning module and its configs, without the libraries that they need elsewhere."""
    torch = pytest.importorskip("torch")

    class LightningModule(torch.nn.Module):
        def save_hyperparameters(self, *arguments):
            pass

    stubs = {name: types.ModuleType(name) for name in ("torchaudio", "lightning", "lightning.pytorch", "models")}
    stubs["lightning.fabric.utilities.rank_zero"] = types.SimpleNamespace(rank_zero_only=lambda function: function)
    stubs["lightning.pytorch"].LightningModule = LightningModule
    stubs["lightning"].pytorch = stubs["lightning.pytorch"]
    for name in ("lightning.fabric", "lightning.fabric.utilities"):
        stubs[name] = types.ModuleType(name)
    for name, module in stubs.items():
        monkeypatch.setitem(sys.modules, name, module)
    transformer = pytest.importorskip("ichigo_asr.models.vq_transformer")
    monkeypatch.setitem(sys.modules, "models.vq_transformer", transformer)
    return types.SimpleNamespace(
        torch=torch,
        whisper=pytest.importorskip("whisper"),
        Model=transformer.RQBottleneckTransformer,
        Module=pytest.importorskip("ichigo_asr.trainer.lightning_module").WhisperVQModule,
        VQConfig=pytest.importorskip("ichigo_asr.config.vq_config").VQConfig,
        TrainerConfig=pytest.importorskip("ichigo_asr.config.trainer_config").TrainerConfig,
    )


def original_run(original, config, downsampling, phase):
    """The original's model with random weights, and its own optimizer and scheduler."""
    torch, whisper = original.torch, original.whisper
    torch.manual_seed(0)
    vq_config = original.VQConfig(
        codebook_dim=8, warmup_steps=WARMUP, downsample_conv=downsampling == "conv", downsample_mean=downsampling == "mean"
    )
    sizes = {"vq_codes": 24, "q_depth": 1, "n_head": 2, "head_width": HEAD_WIDTH, "codebook_dim": 8, "downsample": 2}
    model = original.Model(**sizes, threshold_ema_dead_code=0, use_cosine_sim=True, config=vq_config)
    for name, value in model.named_parameters():
        std = 0.2 if value.ndim == 1 else 1.5 * value[0].numel() ** -0.5
        torch.nn.init.normal_(value, mean=1.0 if ("ln" in name and "weight" in name) else 0.0, std=std)

    dims = {key: value for key, value in config.model["whisper"].items() if key != "layer_norm_eps"}
    frozen = whisper.model.Whisper(whisper.model.ModelDimensions(**dims)).eval().requires_grad_(False)
    torch.nn.init.normal_(frozen.decoder.positional_embedding, std=0.3)
    torch.nn.init.normal_(frozen.decoder.token_embedding.weight, std=0.3)
    model.whmodel = [frozen]
    # One clip at a time: over a batch the package would bound every clip by the loudest one.
    model.log_mel_spectrogram = lambda clips: torch.stack([whisper.log_mel_spectrogram(clip) for clip in clips])

    module = original.Module(model, original.TrainerConfig(task="test", iterations=STEPS, vq_config=vq_config), phase=phase)
    optimizers = module.configure_optimizers()
    return model.train(), optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]


def original_example(torch, clip, prompt_and_text, end, length):
    """Audio, mask, inputs and targets as ``ichigo_asr.data.dataset.WhisperDataset`` makes them."""
    audio = np.pad(clip / np.abs(clip).max(), (0, 480_000 - len(clip)))
    fill = [end] * (length - len(prompt_and_text))
    targets = [*prompt_and_text[1:], end, *[-100] * len(fill)]
    mask = np.arange(1500) < len(clip) // 320
    return [torch.tensor(value) for value in (audio, mask, [*prompt_and_text, *fill], targets)]


def assert_close(found, expected, name, bound=1e-3):
    """Relative to the size of the whole array."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.linalg.norm(expected) > 0, f"{name} is all zeros"
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < bound, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(("phase", "downsampling"), [(1, "mean"), (2, "conv")])
def test_twenty_steps_equal_the_original(original, tmp_path, text_folder, phase, downsampling):
    torch = original.torch
    lengths = (480_000, 51_234, 333_333, 16_017)
    clips = write_corpus(tmp_path, lengths)
    config = small_recipe(
        f"medium,phase={phase}", tmp_path, text_folder, positions=1500, batch_size=2, quantizer={"downsampling": downsampling}
    )
    model, optimizer, scheduler = original_run(original, config, downsampling, phase)
    files = SpeechTokenizerFiles(config)
    task, text = files.task, files.text
    prompt, end = text.prompt_in("en"), text.end
    examples = {
        len(clip): original_example(torch, clip, [*prompt, *text.encode(words)], end, 16) for clip, words in zip(clips, TEXTS)
    }

    ours = nnx.eval_shape(lambda: task.make_model(nnx.Rngs(0)))
    set_weights(ours.whisper, whisper_weights(model.whmodel[0], task.model_config.whisper))
    set_weights(ours.quantizer, quantizer_weights(model, task.model_config.quantizer))
    state, _, step = prepare(task, config, ours)
    step, batches = jax.jit(step), files.open_data(tmp_path).examples().batch(config.train.batch_size)
    for number in range(STEPS):
        batch = batches[number]
        state, metrics = step(state, batch)

        rows = [examples[int(samples)] for samples in batch["samples"]]
        (cross_entropy, divergence, commitment), _, loss = model(*(torch.stack(values) for values in zip(*rows)))
        optimizer.zero_grad()
        loss.backward()
        if number == 0:
            gradients = {f"quantizer.{name}": value for name, value in original_gradients(model, task).items()}
            found = {".".join(map(str, path)): value for path, value in flatten_dict(state.opt_state[0]).items()}
            assert found.keys() <= gradients.keys()
            for name, value in found.items():
                assert_close(value, gradients[name], f"gradient of {name}")
        # What Lightning does with gradient_clip_val: all of the optimizer's parameters together.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), model.config.clip_gradient_norm)
        optimizer.step()
        scheduler.step()

        expected = {"loss": loss, "cross_entropy": cross_entropy, "commitment": commitment, "grad_norm": norm}
        if phase == 1:
            expected["kl"] = divergence
        assert ("kl" in metrics) == (phase == 1)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value.item(), rtol=1e-3, err_msg=f"{name} at step {number}")

    expected = quantizer_weights(model, task.model_config.quantizer)
    for name in ("embed", "cluster_size", "embed_avg"):
        assert_close(state.buffers["quantizer"]["vq"]["codebook"][name], expected[f"vq.codebook.{name}"], name)
    for path, value in flatten_dict(state.params["quantizer"]).items():
        assert_close(value, expected[".".join(map(str, path))], ".".join(map(str, path)))


def original_gradients(model, task):
    """Under our names: the copying of weights copies gradients."""
    kept = {name: value.data for name, value in model.named_parameters()}
    for value in model.parameters():
        value.data = value.grad
    gradients = quantizer_weights(model, task.model_config.quantizer)
    for name, value in model.named_parameters():
        value.data = kept[name]
    return gradients


# ---- sharding --------------------------------------------------------------------------------------------------------


def test_a_sharded_step_equals_one_device(tmp_path, text_folder):
    write_corpus(tmp_path, (5120, 3000, 4444, 1800))
    config = small_recipe("medium,phase=1", tmp_path, text_folder, positions=16, batch_size=8)
    files = SpeechTokenizerFiles(config)
    task = files.task
    model = filled(task.make_model)
    state, optimizer, step = prepare(task, config, model)
    batch = files.open_data(tmp_path).examples().batch(config.train.batch_size)[0]
    expected = jax.device_get(jax.jit(step)(state, batch))
    assert expected[1]["skipped_steps"] == 0
    axes = logical_axes(model, config.optimizer.frozen)
    for sizes in ({"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(sizes)
        shardings = state_shardings(state, axes, mesh)
        split_somewhere = any(not value.is_fully_replicated for value in jax.tree.leaves(shardings.frozen))
        assert split_somewhere == (sizes.keys() != {"data"})
        with jax.set_mesh(mesh):
            placed = jax.device_put(state, shardings), jax.device_put(batch, batch_sharding(mesh))
            found = jax.jit(step, out_shardings=(shardings, None))(*placed)
        for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (expected, found))):
            np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-5, err_msg=f"{sizes} {jax.tree_util.keystr(path)}")


# ---- what the original lacks -----------------------------------------------------------------------------------------


def test_scalar_quantisation_at_half_the_rate_with_whisper_trained_too(tmp_path, text_folder):
    write_corpus(tmp_path, (5120, 3000, 4444, 1800))
    config = small_recipe(
        "medium,phase=2,downsample=4,fsq",
        tmp_path,
        text_folder,
        positions=16,
        batch_size=4,
        quantizer={"fsq_levels": (4, 3, 3), "codebook_dim": 3, "vq_codes": 36, "mask_code": 36},
        objective={"noise_weight": 0.5},
        frozen=(),
    )
    files = SpeechTokenizerFiles(config)
    task = files.task
    state, _, step = prepare(task, config, filled(task.make_model))
    batch = files.open_data(tmp_path).examples().batch(config.train.batch_size)[0]
    new, metrics = jax.jit(step)(state, batch)
    values = task.report(jax.device_get(metrics))
    parts = values["cross_entropy"] + 0.5 * values["noise_consistency"]
    assert values["loss"] == pytest.approx(parts, rel=1e-5) and values["commitment"] == 0
    assert 0 < values["codes_used_fraction"] <= 1 and 0 <= values["codes_kept_under_noise"] < 1
    still = [path for path, value in flatten_dict(new.opt_state[0]).items() if not np.abs(value).max() > 0]
    assert not still, f"no gradient reaches {still}"
    model = nnx.merge(split(filled(task.make_model), ())[0], new.params, new.frozen, new.buffers)
    codes = jax.jit(lambda audio, samples: model.tokenize(audio, samples))(batch["audio"], batch["samples"])
    assert codes.shape == (4, 4, 1)
    for row, samples in zip(codes[..., 0], batch["samples"]):
        count = samples // 160 // 2 // 4
        assert (row[:count] < 36).all() and (row[count:] == 36).all()


FSQ = {"fsq_levels": (4, 3), "codebook_dim": 2, "vq_codes": 12, "mask_code": 12}


def fsq_config(**changes):
    values = load(RECIPE, []).model["quantizer"]
    return QuantizerConfig(**{**values, **SMALL_QUANTIZER, "positions": 12, **FSQ, **changes})


def test_scalar_codes_count_the_roundings():
    config = fsq_config()
    quantizer = filled(lambda rngs: Quantizer(config, rngs)).vq
    x = np.random.default_rng(0).normal(size=(4, 200, 32)).astype(np.float32)
    bounded = np.asarray(quantizer.projections(x))
    assert bounded[..., 0].min() > -2.01 and bounded[..., 0].max() < 1.01 and np.abs(bounded[..., 1]).max() < 1.01
    order = [(first, second) for second in (-1, 0, 1) for first in (-2, -1, 0, 1)]
    _, codes, commitment = quantizer(x, np.ones((4, 200), bool), train=True, key=None)
    assert commitment == 0 and len(np.unique(codes)) == 12
    np.testing.assert_array_equal([order[code] for code in codes.ravel()], bounded.round().reshape(-1, 2))
    kernel, bias = quantizer.project_out[...], quantizer.project_out_bias[...]
    rows = np.array([*(np.array(order) / (2, 1)), quantizer.mask[...]], np.float32)  # between -1 and 1
    np.testing.assert_allclose(quantizer.decode(jnp.arange(13)[:, None]), rows @ kernel + bias, atol=1e-5)
    np.testing.assert_allclose(quantizer(x, None, False, None)[0], quantizer.decode(codes), atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"vq_codes": 13}, {"mask_code": 3}, {"codebook_dim": 3}, {"num_quantizers": 2}, {"fsq_levels": (6, 2)}]
)
def test_levels_that_do_not_fit_are_refused(change):
    with pytest.raises(InputError, match="fsq_levels"):
        fsq_config(**change)


def test_noise_has_the_ratio_asked_for_and_ends_with_the_clip():
    samples, lengths = np.stack([speak(0, 16000), 0.01 * speak(1, 16000)]), np.array([16000, 4000])
    samples[1, 4000:] = 7.0
    noise = np.asarray(add_noise(samples, lengths, (9.99, 10.01), jax.random.key(0))) - samples
    for clip, added, length in zip(samples, noise, lengths):
        ratio = np.square(clip[:length]).mean() / np.square(added[:length]).mean()
        assert 10 * np.log10(ratio) == pytest.approx(10, abs=0.3)
        assert not added[length:].any()


# ---- learning rates --------------------------------------------------------------------------------------------------


def test_rates_follow_the_fan_in():
    config = load(RECIPE, [])
    model = nnx.eval_shape(lambda: Quantizer(QuantizerConfig(**config.model["quantizer"]), nnx.Rngs(0)))
    expected = {
        "mlp.up": 192 / 1024,
        "mlp.down_bias": 192 / 4096,
        "vq.project_in": 192 / 1024,
        "vq.project_out_bias": 192 / 64,
        "blocks.attention.key": 192 / 1024,
        "blocks.mlp_norm.bias": 1.0,
        "positions": 1.0,
    }
    declared = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
    assert {name: rate_scale(config.optimizer, declared[name]) for name in expected} == expected


def test_all_rates_end_where_the_recipe_says():
    config = load(RECIPE, []).optimizer
    for scale in (3.0, 1.0, 0.03):
        rate = learning_rate_schedule(config, 1500, scale)
        found = [float(rate(step)) for step in (0, 500, 1000, 1500)]
        middle = (scale * 1e-3 + 4e-5) / 2
        assert found == pytest.approx([scale * 1e-6, scale * 1e-3, middle, 4e-5], rel=1e-4)


# ---- starting from a Whisper, and the whole way ----------------------------------------------------------------------


def test_a_run_starts_from_a_whisper_and_the_next_from_its_tokenizer(tmp_path, text_folder):
    write_corpus(tmp_path, (5120, 3000, 4444, 1800))
    config = small_recipe("medium,phase=1", tmp_path, text_folder, positions=16, batch_size=8)
    whisper_config = WhisperConfig(**config.model["whisper"])
    whisper = filled(lambda rngs: Whisper(whisper_config, rngs))
    state = nnx.to_pure_dict(nnx.state(whisper))
    save_model(tmp_path / "whisper", "whisper", whisper_config, state, {"source": "a test"}, None)
    config = dataclasses.replace(
        config, init_from=str(tmp_path / "whisper"), train=dataclasses.replace(config.train, steps=2, accumulation=2)
    )
    assert train(config, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"kl", "commitment", "accuracy", "codebook_perplexity"} <= rows[0].keys()
    assert {"heldout/wer", "heldout/cer"} <= rows[1].keys()

    phase2 = small_recipe("medium,phase=2", tmp_path, text_folder, positions=16, batch_size=8, quantizer={"codebook_decay": 0.99})
    mesh = make_mesh({"data": 8})
    trained = SpeechTokenizerTask(phase2).load_model(str(tmp_path / "run" / "model"), mesh)
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(model)) for model in (whisper, trained.whisper))):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
    other = small_recipe("medium,phase=2", tmp_path, text_folder, positions=16, batch_size=8, quantizer={"query_mult": 1.0})
    with pytest.raises(InputError, match=r"query_mult 2\.0 \(config: 1\.0\)"):
        SpeechTokenizerTask(other).load_model(str(tmp_path / "run" / "model"), mesh)


@pytest.mark.parametrize(
    ("objective", "frozen", "message"),
    [
        ({"kl_weight": 1.0}, (), "expected 'whisper' in it"),
        ({"bottleneck": False, "noise_weight": 1.0}, None, "without the bottleneck"),
        ({"noise_snr_db": (1.0,)}, None, "the lowest and the highest"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(tmp_path, text_folder, objective, frozen, message):
    config = small_recipe("medium", tmp_path, text_folder, positions=16, batch_size=8, objective=objective, frozen=frozen)
    with pytest.raises(InputError, match=message):
        SpeechTokenizerTask(config)


@pytest.mark.parametrize("argument", ["huge", "medium,codes=100", "medium,phase=3", "medium,codes=many"])
def test_arguments_of_the_recipe_are_checked(argument):
    with pytest.raises(InputError):
        load(f"{RECIPE}:{argument}", [])


# ---- examples --------------------------------------------------------------------------------------------------------


def read_examples(folder, faults=None, **changes):
    """A text's ids are the lengths of its words."""
    layout = {"samples": 3200, "text_length": 5, "predict_prompt": False, "normalize": False, "concatenate": False}
    encode = lambda text: [len(word) for word in text.split()]  # noqa: E731
    rows = read_transcripts(str(folder / "clips.jsonl"))
    return SpeechExamples(rows, encode, [91, 92], 99, Layout(**{**layout, **changes}), faults or FaultLog(None))


def test_examples_are_as_their_documentation_shows(tmp_path):
    clips = write_corpus(tmp_path, (1000,), ("turn on",))
    example = read_examples(tmp_path)[0]
    np.testing.assert_array_equal(example["audio"], np.pad(clips[0], (0, 2200)))
    assert example["samples"] == 1000
    assert example["inputs"].tolist() == [91, 92, 4, 2, 99]
    assert example["targets"].tolist() == [-100, 4, 2, 99, -100]
    example = read_examples(tmp_path, predict_prompt=True, normalize=True, text_length=4)[0]
    assert np.abs(example["audio"]).max() == 1.0
    assert example["inputs"].tolist() == [91, 92, 4, 2]
    assert example["targets"].tolist() == [92, 4, 2, 99]


def test_clips_are_joined_until_audio_or_text_is_full(tmp_path):
    clips = write_corpus(tmp_path, (1000, 1500, 900, 400, 300), ("turn on", "a", "bb", "to be or", "c"))
    examples = read_examples(tmp_path, concatenate=True)
    assert [int(example["samples"]) for example in examples] == [2500, 900, 400, 300]
    np.testing.assert_array_equal(examples[0]["audio"], np.pad(np.concatenate(clips[:2]), (0, 700)))
    assert [example["inputs"].tolist() for example in examples] == [
        [91, 92, 4, 2, 1],
        [91, 92, 2, 99, 99],
        [91, 92, 2, 2, 2],
        [91, 92, 1, 99, 99],
    ]
    assert examples[0]["targets"].tolist() == [-100, 4, 2, 1, 99]


def test_what_cannot_be_used_is_recorded_and_left_out(tmp_path):
    write_corpus(tmp_path, (1000, 5000, 700, 500), ("on", "far too long", "more words than fit here", "off"))
    (tmp_path / "3.wav").write_text("no audio")
    faults = FaultLog(tmp_path / "skipped.jsonl")
    examples = read_examples(tmp_path, faults)
    assert [int(examples[number]["samples"]) for number in range(4)] == [1000, 0, 0, 0]
    assert (examples[1]["targets"] == -100).all()
    recorded = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).name for row in recorded] == ["1.wav", "2.wav", "3.wav"]
    joined = read_examples(tmp_path, concatenate=True)
    assert sum(int(joined[number]["samples"]) for number in range(len(joined))) == 1000


def test_data_that_is_gone_ends_the_run(tmp_path):
    write_corpus(tmp_path, (1000, 900), ("on", "off"))
    examples = read_examples(tmp_path)
    (tmp_path / "1.wav").unlink()
    for _ in range(speech.MOST_UNUSABLE):
        assert int(examples[0]["samples"]) == 1000 and int(examples[1]["samples"]) == 0, "half of it is not all"
    (tmp_path / "0.wav").unlink()
    batches = iter(grain.MapDataset.source(examples).repeat().batch(2).to_iter_dataset())
    with pytest.raises(InputError, match="no such file.*; nor could the 99 clips before it be used"):
        for _ in range(speech.MOST_UNUSABLE):
            next(batches)
