"""The bottleneck against ``ichigo``, ``ichigo_asr`` and ``vector_quantize_pytorch`` on random weights."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference_weights import arrays, filled, jitted, quantizer_weights, residual_vq_weights, set_weights

from ichigo_jax.errors import InputError
from ichigo_jax.models.declare import Buffer
from ichigo_jax.models.quantizer import Quantizer, QuantizerConfig, ResidualVQ, l2_normalize
from ichigo_jax.models.whisper import WHISPER_INIT
from ichigo_jax.parallel import batch_sharding, make_mesh, replicated

NANO = QuantizerConfig(
    n_head=2,
    head_width=16,
    ffn_mult=4,
    depth=1,
    vq_codes=24,
    mask_code=24,
    num_quantizers=1,
    fsq_levels=None,
    codebook_dim=8,
    downsample=2,
    downsampling="mean",
    positions=20,
    codebook_decay=0.9,
    threshold_ema_dead_code=0.0,
    laplace_eps=1e-5,
    commitment_weight=1.0,
    statistics_over="all_frames",
    query_mult=2.0,
    rope=True,
    rope_base=10000.0,
    layer_norm_eps=1e-5,
    init_std=1.5,
    embeddings_std=0.045,
)
RELEASED = dataclasses.replace(NANO, positions=1500)  # the originals know no other context
STATES = ("embed", "cluster_size", "embed_avg")


@pytest.fixture
def torchaudio(monkeypatch):
    """The originals import torchaudio for reading files, which nothing here needs."""
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomized(torch, module):
    """Larger weights than the constructors give, so that every part of the module matters."""
    for name, value in module.named_parameters():
        std = 0.2 if value.ndim == 1 else 1.5 * value[0].numel() ** -0.5
        torch.nn.init.normal_(value, mean=1.0 if ("ln" in name and "weight" in name) else 0.0, std=std)
    return module


# ---- the bottleneck --------------------------------------------------------------------------------------------------


def ichigo_quantizer(config):
    torch = pytest.importorskip("torch")
    quantizer = pytest.importorskip("ichigo.asr.arch.quantizer")
    torch.manual_seed(0)
    values = dataclasses.asdict(config) | {
        "q_depth": 1,
        "use_cosine_sim": True,
        "mask_embs": config.mask_code is not None,
        "downsample_conv": config.downsampling == "conv",
        "downsample_mean": config.downsampling == "mean",
    }
    model = randomized(torch, quantizer.Quantizer({"quantizer": values})).eval()
    ours = nnx.eval_shape(lambda: Quantizer(config, nnx.Rngs(0)))
    set_weights(ours, quantizer_weights(model, config))
    return torch, model, ours


@pytest.mark.parametrize(
    "change",
    [{}, {"mask_code": 20, "depth": 2}, {"downsampling": "conv", "query_mult": 1.0}, {"downsampling": "stride", "rope": False}],
    ids=["released", "merged", "conv", "stride"],
)
def test_codes_and_states_equal_ichigo(torchaudio, change):
    config = dataclasses.replace(RELEASED, **change)
    torch, model, ours = ichigo_quantizer(config)
    states = normal(1, 1, 1500, 32)
    expected = model.quantize(torch.tensor(states), 3000).numpy()
    assert len(np.unique(expected)) > 10
    codes = jitted(ours, "codes")(states)
    np.testing.assert_array_equal(codes[..., 0], expected)
    dequantize = jitted(ours, "dequantize")
    for count in (750, 333, 2):  # a single code trips over the original's squeeze
        with torch.no_grad():
            expected_states = model.dequantize(torch.tensor(expected[0, :count])).numpy()
        np.testing.assert_allclose(dequantize(codes[:, :count]), expected_states, atol=1e-4, rtol=0)


def test_training_pass_equals_ichigo_asr(torchaudio):
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("ichigo_asr.models.vq_transformer").RQBottleneckTransformer
    vq_config = pytest.importorskip("ichigo_asr.config.vq_config").VQConfig
    torch.manual_seed(0)
    arguments = {"vq_codes": 24, "q_depth": 1, "n_head": 2, "head_width": 16, "codebook_dim": 8, "threshold_ema_dead_code": 0}
    model = transformer(**arguments, use_cosine_sim=True, downsample=2, config=vq_config(codebook_dim=8))
    model = randomized(torch, model).train()
    ours = nnx.eval_shape(lambda: Quantizer(RELEASED, nnx.Rngs(0)))
    set_weights(ours, quantizer_weights(model, RELEASED))

    states, mask = normal(1, 2, 1500, 32), np.arange(1500) < np.array([[1500], [700]])
    x = torch.tensor(states, requires_grad=True)
    expected = model._process_quantization(x, torch.tensor(mask))
    (expected.square().mean() + model.commit_loss).backward()

    graphdef, params, buffers = nnx.split(ours, nnx.Param, Buffer)

    @jax.jit
    def step(states, params, buffers):
        def loss(states, params):
            module = nnx.merge(graphdef, params, buffers, copy=True)
            out = module(states, mask, train=True, key=None)
            return jnp.square(out.states).mean() + out.commitment, (out, nnx.state(module, Buffer))

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(states, params)

    (_, (out, buffers)), (by_states, by_params) = step(states, params, buffers)
    np.testing.assert_allclose(out.states, expected.detach(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(out.commitment, model.commit_loss.item(), atol=1e-5)
    np.testing.assert_allclose(by_states, x.grad, atol=1e-5, rtol=1e-3)
    np.testing.assert_allclose(buffers["vq"]["codebook"]["embed"][...], arrays(model)["rq.layers.0._codebook.embed"], atol=1e-5)
    for weight in model.parameters():
        weight.data = weight.grad  # so that the copying of weights copies gradients
    expected_gradients = quantizer_weights(model, RELEASED)
    for path, found in nnx.to_flat_state(by_params):
        key = ".".join(map(str, path))
        np.testing.assert_allclose(found[...], expected_gradients[key], atol=1e-5, rtol=1e-3, err_msg=key)


def test_masked_frames_become_the_mask_code():
    model = filled(lambda rngs: Quantizer(NANO, rngs))
    states = normal(1, 2, 20, 32)
    mask = np.arange(20) < np.array([[20], [8]])
    graphdef, state = nnx.split(model)
    out = jax.jit(lambda state: nnx.merge(graphdef, state)(states, mask, train=False, key=None))(state)
    np.testing.assert_array_equal(out.codes, jitted(model, "codes")(states))
    dequantize = jitted(model, "dequantize")
    np.testing.assert_allclose(out.states[1:], dequantize(out.codes[1:, :4]), atol=1e-5)
    np.testing.assert_allclose(out.states[:1], dequantize(out.codes[:1]), atol=1e-5)


# ---- residual quantisation and the codebook --------------------------------------------------------------------------


def residual_vq(config):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    model = package.ResidualVQ(
        dim=config.width,
        codebook_size=config.codes,
        decay=config.codebook_decay,
        commitment_weight=config.commitment_weight,
        threshold_ema_dead_code=config.threshold_ema_dead_code,
        use_cosine_sim=True,
        codebook_dim=config.codebook_dim,
        num_quantizers=config.num_quantizers,
    )
    randomized(torch, model)
    ours = fresh(config)
    set_weights(ours, residual_vq_weights(arrays(model), config))
    return torch, model, ours


def test_residual_codes_equal_the_package():
    torch, model, ours = residual_vq(dataclasses.replace(NANO, num_quantizers=4))
    x = normal(3, 3, 50, 32)
    with torch.no_grad():
        expected, codes, _ = model.eval()(torch.tensor(x))
    quantized, found, _ = ours(x, np.ones((3, 50), bool), train=False, key=None)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(quantized, expected, atol=1e-5)
    np.testing.assert_allclose(ours.decode(found), expected, atol=1e-5)


@pytest.mark.parametrize("quantizers", [1, 4])
def test_training_updates_equal_the_package(quantizers):
    config = dataclasses.replace(NANO, num_quantizers=quantizers, commitment_weight=0.7)
    torch, model, ours = residual_vq(config)
    model.train()
    graphdef, params, buffers = nnx.split(ours, nnx.Param, Buffer)

    @jax.jit
    def step(x, target, buffers):
        def loss(x):
            module = nnx.merge(graphdef, params, buffers, copy=True)
            quantized, codes, commitment = module(x, jnp.ones(x.shape[:2], bool), train=True, key=None)
            return (quantized * target).sum() + commitment, (codes, commitment, nnx.state(module, Buffer))

        return jax.grad(loss, has_aux=True)(x)

    for seed in range(5):
        x, target = normal(seed, 4, 30, 32), normal(100 + seed, 4, 30, 32)
        ours_x, (codes, commitment, buffers) = step(x, target, buffers)
        x = torch.tensor(x, requires_grad=True)
        quantized, expected_codes, losses = model(x)
        ((quantized * torch.tensor(target)).sum() + losses.mean()).backward()
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_allclose(commitment, losses.mean().item(), atol=1e-5)
        np.testing.assert_allclose(ours_x, x.grad, atol=1e-5)
    expected = residual_vq_weights(arrays(model), config)
    for name in STATES:
        found = buffers["codebook"][name][...]
        np.testing.assert_allclose(found, expected[f"codebook.{name}"], atol=1e-5, err_msg=name)
        assert np.abs(found - getattr(ours.codebook, name)[...]).max() > 0.1, f"{name} did not move"


def fresh(config):
    return filled(lambda rngs: ResidualVQ(config, WHISPER_INIT, rngs))


def training(vq):
    """A function that takes one batch through ``vq`` in training: its buffers move, codes and commitment come back."""
    graphdef, state = nnx.split(vq)

    @jax.jit
    def step(state, x, valid, key):
        module = nnx.merge(graphdef, state, copy=True)
        _, codes, commitment = module(x, valid, train=True, key=key)
        return codes[..., 0], commitment, nnx.state(module)

    def train(x, valid, key=None):
        codes, commitment, state = step(nnx.state(vq), x, valid, key)
        nnx.update(vq, state)
        return codes, commitment

    return train


def updated(config, x, valid, key=None):
    """The buffers of a fresh quantiser after one batch."""
    vq = fresh(config)
    before = {name: np.asarray(getattr(vq.codebook, name)[0]) for name in STATES}
    codes, commitment = training(vq)(x, valid, key)
    return before, {name: np.asarray(getattr(vq.codebook, name)[0]) for name in STATES}, codes, commitment


def test_dead_codes_are_seeded_from_the_batch():
    config = dataclasses.replace(NANO, threshold_ema_dead_code=0.05)
    x = normal(1, 2, 40, 32)
    vq = fresh(config)
    z = np.asarray(vq._project(0, x)).reshape(-1, 8)
    before, after, codes, _ = updated(config, x, np.ones((2, 40), bool), jax.random.key(0))
    used = np.unique(codes)
    dead = np.setdiff1d(np.arange(config.codes), used)
    assert len(dead) > 0
    nearest = (after["embed"][dead] @ z.T).argmax(-1)
    np.testing.assert_allclose(after["embed"][dead], z[nearest], atol=1e-6)
    assert len(np.unique(nearest)) == len(dead), "no vector seeds two codes"
    np.testing.assert_allclose(after["cluster_size"][dead], 0.05)
    np.testing.assert_allclose(after["embed_avg"][dead], 0.05 * z[nearest], atol=1e-6)
    np.testing.assert_allclose(after["cluster_size"][used], 0.1 * np.bincount(codes.ravel(), minlength=25)[used], atol=1e-6)


def test_seeding_keeps_codes_alive():
    x = normal(1, 4, 40, 32)
    counts = {}
    for threshold in (0.0, 0.2):
        vq = fresh(dataclasses.replace(NANO, threshold_ema_dead_code=threshold))
        start = np.zeros_like(vq.codebook.embed[...])  # all codes near one direction: without seeding few are ever used
        vq.codebook.embed[...] = l2_normalize(start + 1.0 + 0.01 * normal(2, *start.shape))
        vq.codebook.embed_avg[...] = vq.codebook.embed[...] * 1.0
        train = training(vq)
        for seed in range(15):
            codes, _ = train(x, np.ones((4, 40), bool), jax.random.key(seed))
        counts[threshold] = len(np.unique(codes))
    assert counts[0.2] > 20 > counts[0.0], counts


def test_seeding_with_fewer_vectors_than_dead_codes_repeats_valid_ones():
    config = dataclasses.replace(NANO, threshold_ema_dead_code=10.0)
    x, valid = normal(1, 1, 8, 32), np.arange(8)[None] < 3
    z = np.asarray(fresh(config)._project(0, x))[0]
    _, after, _, _ = updated(config, x, valid, jax.random.key(0))
    similarity = after["embed"] @ z[:3].T
    np.testing.assert_allclose(similarity.max(-1), 1.0, atol=1e-5)
    assert set(similarity.argmax(-1)) == {0, 1, 2}


def test_seeding_needs_a_key():
    with pytest.raises(ValueError, match="random key"):
        updated(dataclasses.replace(NANO, threshold_ema_dead_code=1.0), normal(1, 1, 8, 32), np.ones((1, 8), bool))


def test_padding_counts_only_where_the_configuration_says_so():
    states, mask = normal(1, 2, 20, 32), np.arange(20) < np.array([[20], [7]])
    shorter = np.where(mask[..., None], states, 9.0)  # only padding differs

    def after(statistics_over, states):
        config = dataclasses.replace(NANO, statistics_over=statistics_over)
        graphdef, state = nnx.split(filled(lambda rngs: Quantizer(config, rngs)))

        @jax.jit
        def step(state):
            model = nnx.merge(graphdef, state, copy=True)
            out = model(states, mask, train=True, key=None)
            return jnp.append(model.vq.codebook.embed_avg[...], out.commitment)

        return step(state)

    # The pair of states 6, 7 is half padding and makes no code, so it does not count either.
    np.testing.assert_array_equal(after("audio_frames", states), after("audio_frames", shorter))
    assert np.abs(after("all_frames", states) - after("all_frames", shorter)).max() > 0.01
    assert np.abs(after("all_frames", states) - after("audio_frames", states)).max() > 0.01


def test_statistics_over_audio_equal_those_of_the_audio_alone():
    config = dataclasses.replace(NANO, statistics_over="audio_frames")
    x = normal(1, 1, 10, 32)
    _, part, _, commitment = updated(config, x, np.arange(10)[None] < 6)
    _, alone, _, expected = updated(config, x[:, :6], np.ones((1, 6), bool))
    for name in STATES:
        np.testing.assert_allclose(part[name], alone[name], atol=1e-6)
    np.testing.assert_allclose(commitment, expected, atol=1e-6)


def test_sharded_update_equals_one_device():
    config = dataclasses.replace(NANO, threshold_ema_dead_code=0.05, statistics_over="audio_frames")
    graphdef, params, buffers = nnx.split(filled(lambda rngs: Quantizer(config, rngs)), nnx.Param, Buffer)
    states, mask = normal(1, 8, 20, 32), np.arange(20) < np.arange(6, 22, 2)[:, None]

    @jax.jit
    def step(params, buffers, states, mask):
        def loss(params):
            module = nnx.merge(graphdef, params, buffers, copy=True)
            out = module(states, mask, train=True, key=jax.random.key(3))
            return jnp.square(out.states).mean() + out.commitment, (out, nnx.state(module, Buffer))

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = step(params, buffers, states, mask)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    placed = jax.device_put((params, buffers), replicated(mesh))
    with jax.set_mesh(mesh):
        found = step(*placed, *jax.device_put((states, mask), batch_sharding(mesh)))
    assert len(found[0][1][0].states.sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="mask_code 25 found, expected 0 to 24"):
        dataclasses.replace(NANO, mask_code=25)
    with pytest.raises(InputError, match="multiple of downsample 3"):
        dataclasses.replace(NANO, downsample=3)
    with pytest.raises(InputError, match="codebook_dim 32"):
        dataclasses.replace(NANO, codebook_dim=32)
    model = filled(lambda rngs: Quantizer(NANO, rngs))
    with pytest.raises(InputError, match=r"\(18, 32\).*expected \(20, 32\)"):
        model.codes(jnp.zeros((1, 18, 32)))
    with pytest.raises(InputError, match="11 codes found, expected at most 10"):
        model.dequantize(jnp.zeros((1, 11, 1), int))
