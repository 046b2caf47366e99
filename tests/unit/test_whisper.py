"""Whisper against ``openai-whisper`` on random weights; cached decoding against whole sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference_weights import filled, jitted, set_weights, whisper_weights

from ichigo_jax.errors import InputError
from ichigo_jax.models.whisper import Conv, Whisper, WhisperConfig, sinusoids
from ichigo_jax.parallel import make_mesh, named_sharding

TINY = WhisperConfig(
    n_mels=20,
    n_audio_ctx=24,
    n_audio_state=32,
    n_audio_head=4,
    n_audio_layer=3,
    n_vocab=61,
    n_text_ctx=16,
    n_text_state=32,
    n_text_head=2,
    n_text_layer=2,
    layer_norm_eps=1e-5,
)
RELEASED_TINY = dataclasses.replace(  # the released "tiny" but for the length of its audio context
    TINY, n_mels=80, n_audio_state=384, n_audio_head=6, n_audio_layer=4, n_text_state=384, n_text_head=6, n_text_layer=4,
    n_vocab=51865, n_text_ctx=448,
)  # fmt: skip


def reference(config):
    torch = pytest.importorskip("torch")
    whisper = pytest.importorskip("whisper")
    dims = {key: value for key, value in dataclasses.asdict(config).items() if key != "layer_norm_eps"}
    torch.manual_seed(0)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**dims)).eval()
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.1)  # left uninitialised by the constructor
    for name, value in model.named_parameters():
        if value.ndim == 1:  # norms and biases start as ones and zeros, which would hide a mistake
            torch.nn.init.normal_(value, mean=1.0 if "ln" in name and "weight" in name else 0.0, std=0.2)
    ours = nnx.eval_shape(lambda: Whisper(config, nnx.Rngs(0)))
    set_weights(ours, whisper_weights(model, config))
    return torch, model, ours


def inputs(config, batch, tokens):
    random = np.random.default_rng(1)
    mel = random.normal(size=(batch, 2 * config.n_audio_ctx, config.n_mels)).astype(np.float32)
    return mel, random.integers(config.n_vocab, size=(batch, tokens)).astype(np.int32)


@pytest.mark.parametrize("config", [TINY, RELEASED_TINY], ids=["small", "tiny"])
def test_encoder_and_decoder_equal_openai_whisper(config):
    torch, model, ours = reference(config)
    mel, tokens = inputs(config, 2, 9)
    with torch.no_grad():
        states = model.encoder(torch.tensor(mel.transpose(0, 2, 1))).numpy()
        logits = model.decoder(torch.tensor(tokens), torch.tensor(states)).numpy()
    np.testing.assert_allclose(jitted(ours.encoder, "__call__")(mel), states, atol=1e-4, rtol=0)
    np.testing.assert_allclose(jitted(ours.decoder, "__call__")(tokens, states), logits, atol=1e-4, rtol=1e-5)


def test_one_layer_equals_openai_whisper():
    torch, model, ours = reference(dataclasses.replace(TINY, n_audio_layer=1))
    x = np.random.default_rng(2).normal(size=(2, 24, 32)).astype(np.float32)
    with torch.no_grad():
        expected = model.encoder.blocks[0](torch.tensor(x)).numpy()
    graphdef, state = nnx.split(ours.encoder.blocks)
    block = nnx.merge(graphdef, jax.tree.map(lambda value: value[0], state))
    np.testing.assert_allclose(block(x), expected, atol=1e-5, rtol=0)


def test_sinusoids_equal_openai_whisper():
    whisper = pytest.importorskip("whisper")
    np.testing.assert_allclose(sinusoids(1500, 384), whisper.model.sinusoids(1500, 384), atol=2e-4)
    np.testing.assert_allclose(sinusoids(20, 64), whisper.model.sinusoids(20, 64), atol=1e-5)


@pytest.mark.parametrize(("length", "stride"), [(7, 1), (8, 2), (7, 2)])
def test_conv_equals_lax_convolution(length, stride):
    conv = Conv(5, 6, stride, "mels", nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, length, 5))
    expected = jax.lax.conv_general_dilated(x, conv.kernel[...], (stride,), [(1, 1)], dimension_numbers=("NTC", "TIO", "NTC"))
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)


@pytest.mark.parametrize("steps", [[10], [4, 1, 1, 4]])
def test_cached_decoding_equals_whole_sequences(steps):
    model = filled(lambda rngs: Whisper(TINY, rngs))
    mel, tokens = inputs(TINY, 3, 10)
    states = jitted(model.encoder, "__call__")(mel)
    cross, cache = jitted(model.decoder, "prefill_cross")(states), model.decoder.init_cache(3, 12)
    positions = jnp.broadcast_to(jnp.arange(10), (3, 10))
    step, pieces, start = jitted(model.decoder, "decode"), [], 0
    for length in steps:
        part = slice(start, start + length)
        logits, cache = step(tokens[:, part], positions[:, part], cross, cache)
        pieces.append(logits)
        start += length
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), jitted(model.decoder, "__call__")(tokens, states), atol=1e-5)


def test_rows_may_stand_at_different_positions():
    model = filled(lambda rngs: Whisper(TINY, rngs))
    mel, tokens = inputs(TINY, 2, 6)
    states = jitted(model.encoder, "__call__")(mel)
    cross, cache = jitted(model.decoder, "prefill_cross")(states), model.decoder.init_cache(2, 8)
    step = jitted(model.decoder, "decode")
    _, cache = step(tokens[:, :5], jnp.broadcast_to(jnp.arange(5), (2, 5)), cross, cache)
    whole = jitted(model.decoder, "__call__")
    # Row 0 goes on at 5; row 1 at 3, writing over what stood there.
    last, _ = step(tokens[:, 5:], jnp.array([[5], [3]]), cross, cache)
    np.testing.assert_allclose(last[0, 0], whole(tokens, states)[0, 5], atol=1e-5)
    shorter = np.concatenate([tokens[:, :3], tokens[:, 5:], tokens[:, :2]], axis=1)  # of the length that is compiled already
    np.testing.assert_allclose(last[1, 0], whole(shorter, states)[1, 3], atol=1e-5)


def test_rematerialisation_changes_no_gradient():
    model = filled(lambda rngs: Whisper(dataclasses.replace(TINY, n_audio_layer=2), rngs))
    mel, tokens = inputs(TINY, 2, 5)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, remat, decoder_remat):
        model = nnx.merge(graphdef, params, rest)
        return jnp.square(model.decoder(tokens, model.encoder(mel, remat), decoder_remat)).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    plain = jax.tree.leaves(gradient(params, "none", "none"))
    for expected, found in zip(plain, jax.tree.leaves(gradient(params, "full", "dots"))):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in plain)


def test_sharded_over_eight_devices_equals_one_device():
    model = filled(lambda rngs: Whisper(dataclasses.replace(TINY, n_vocab=64), rngs))
    mel, tokens = inputs(TINY, 4, 8)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, mel, tokens: nnx.merge(graphdef, state).decoder(tokens, nnx.merge(graphdef, state).encoder(mel)))
    expected = run(state, mel, tokens)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    place = lambda v: v.replace(jax.device_put(v[...], named_sharding(mesh, v.axes, v.shape, "")))  # noqa: E731
    sharded = jax.tree.map(place, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    assert len(sharded["encoder"]["blocks"]["mlp"]["up"][...].sharding.device_set) == 8
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(sharded, mel, tokens), expected, atol=1e-5)


def test_what_does_not_fit_is_refused():
    model = filled(lambda rngs: Whisper(TINY, rngs))
    with pytest.raises(InputError, match=r"\(46, 20\).*expected \(48, 20\)"):
        model.encoder(jnp.zeros((1, 46, 20)))
    with pytest.raises(InputError, match="multiple of n_text_head 3"):
        dataclasses.replace(TINY, n_text_head=3)
    with pytest.raises(InputError, match="n_text_state 64"):
        dataclasses.replace(TINY, n_text_state=64)
