"""The language model against transformers on tiny random weights, and its own packing and cache against the plain pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.models.declare import cast_params
from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig, RopeScaling, inverse_frequencies
from ichigo_jax.parallel import make_mesh, named_sharding
from ichigo_jax.training.flops import count_flops
from ichigo_jax.vocab import SoundVocabulary

SCALING = RopeScaling(8.0, 1.0, 4.0, 16)
CONFIG = LanguageModelConfig(
    llama=LlamaConfig(
        architecture="llama",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        rope_scaling=SCALING,
        tie_word_embeddings=False,
        attention_bias=False,
        initializer_range=0.2,
    ),
    sound=SoundVocabulary(first_id=40, codes=8, durations=False),
    eos_token_ids=(1,),
    padded_vocab_size=56,
)


@pytest.fixture(scope="module")
def model():
    return nnx.jit(lambda: Llama(CONFIG, nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, 50)


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@nnx.jit(static_argnames="remat")
def plain(model, tokens, remat="none"):
    return model(tokens, positions_of(tokens), remat=remat)[0]


@nnx.jit
def cached(model, tokens, positions, cache):
    return model(tokens, positions, cache=cache)


def test_logits_leave_padding_rows_out(model, tokens):
    logits = model.logits(plain(model, tokens))
    assert logits.shape == (2, 12, 50) and logits.dtype == jnp.float32
    assert model.embedding.shape == (56, 32) and model.lm_head.shape == (32, 56)


def test_a_token_sees_nothing_after_it(model, tokens):
    changed = tokens.at[:, 7:].set((tokens[:, 7:] + 1) % 50)
    before, after = plain(model, tokens), plain(model, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).min(-1).max() > 1e-3


def test_packed_row_equals_its_sequences_apart(model, tokens):
    #       |  5 tokens  |    4 tokens  |  padding |
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    packed, _ = model(tokens[:1], positions, segment_ids=segments)
    np.testing.assert_allclose(packed[:, :5], plain(model, tokens[:1, :5]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:9], plain(model, tokens[:1, 5:9]), atol=1e-5)
    assert np.isfinite(packed).all()
    unseparated, _ = model(tokens[:1], positions)
    assert np.abs(packed - unseparated)[:, 5:9].max() > 1e-2


def test_cached_token_by_token_equals_one_pass(model, tokens):
    cache = model.init_cache(batch=2, length=16)
    assert cache.k.shape == cache.v.shape == (2, 2, 16, 2, 8)
    hidden = []
    for position in range(12):
        new, cache = cached(model, tokens[:, position : position + 1], jnp.full((2, 1), position), cache)
        hidden.append(new)
    np.testing.assert_allclose(jnp.concatenate(hidden, 1), plain(model, tokens), atol=1e-5)


def test_right_padded_prefill_then_decode(model, tokens):
    """Prompts of 5 and 8 tokens in one batch; the shorter one's padding leaves slots that its next tokens overwrite."""
    lengths = jnp.array([5, 8])
    prompt = jnp.where(jnp.arange(8) < lengths[:, None], tokens[:, :8], 0)
    hidden, cache = cached(model, prompt, positions_of(prompt), model.init_cache(2, 16))
    expected = plain(model, tokens)
    np.testing.assert_allclose(hidden[0, :5], expected[0, :5], atol=1e-5)
    np.testing.assert_allclose(hidden[1, :8], expected[1, :8], atol=1e-5)
    for step in range(3):
        positions = lengths[:, None] + step
        hidden, cache = cached(model, jnp.take_along_axis(tokens, positions, 1), positions, cache)
        np.testing.assert_allclose(hidden[:, 0], expected[jnp.arange(2), positions[:, 0]], atol=1e-5)


def test_packed_rows_and_a_cache_are_refused(model, tokens):
    with pytest.raises(AssertionError, match="do not go together"):
        model(tokens, positions_of(tokens), segment_ids=tokens, cache=model.init_cache(2, 16))


def test_remat_changes_no_gradient(model, tokens):
    grad = nnx.jit(nnx.grad(lambda model, remat: plain(model, tokens, remat).sum()), static_argnames="remat")
    expected = jax.tree.leaves(grad(model, remat="none"))
    for remat in ("dots", "full"):
        for want, found in zip(expected, jax.tree.leaves(grad(model, remat=remat))):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


def test_what_remat_computes_anew(model, tokens):
    """With "dots" no product by a weight, with "full" all of the layers but what only their results need."""
    loss = lambda remat: lambda state: plain(nnx.merge(nnx.graphdef(model), state), tokens, remat).sum()  # noqa: E731
    none, dots, full = (count_flops(jax.grad(loss(remat)), nnx.state(model)) for remat in ("none", "dots", "full"))
    llama, (rows, length) = model.config.llama, tokens.shape
    attention = llama.num_hidden_layers * 4 * rows * llama.num_attention_heads * length**2 * llama.head_dim
    assert dots - none == attention
    assert full - dots > 3 * attention


def test_bfloat16_parameters_compute_in_bfloat16(model, tokens):
    small = nnx.merge(nnx.graphdef(model), cast_params(nnx.state(model), jnp.bfloat16))
    hidden = plain(small, tokens)
    assert hidden.dtype == jnp.bfloat16 and small.logits(hidden).dtype == jnp.float32
    np.testing.assert_allclose(hidden.astype(jnp.float32), plain(model, tokens), atol=0.25)


def test_sharded_equals_unsharded(model, tokens):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    graphdef, state = nnx.split(model)
    placed = [
        (path, variable.replace(jax.device_put(value, named_sharding(mesh, variable.axes, value.shape, "".join(path)))))
        for path, variable in nnx.to_flat_state(state)
        for value in [variable.get_value()]
    ]
    sharded = nnx.merge(graphdef, nnx.from_flat_state(placed))
    many = jnp.tile(tokens, (2, 1))
    with jax.set_mesh(mesh):
        found = plain(sharded, many)
    np.testing.assert_allclose(found, plain(model, many), atol=1e-5)


def test_every_parameter_names_its_axes(model):
    axes = {".".join(path): variable.axes for path, variable in nnx.to_flat_state(nnx.state(model))}
    assert axes["embedding"] == ("vocab", "embed") and axes["lm_head"] == ("embed", "vocab")
    assert axes["layers.attention.q"] == ("layers", "embed", "heads", "head")
    assert axes["layers.attention.k"] == axes["layers.attention.v"] == ("layers", "embed", "kv_heads", "head")
    assert axes["layers.attention.o"] == ("layers", "heads", "head", "embed")
    assert axes["layers.feed_forward.down"] == ("layers", "ffn", "embed")


# Against transformers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta, head_dim", [(500000.0, 128), (500000.0, 64)])
def test_llama3_frequencies_are_those_of_transformers(theta, head_dim):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    network = dataclasses.replace(
        CONFIG.llama, rope_theta=theta, head_dim=head_dim, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
    )
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **configuration.to_dict(network.rope_scaling)},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    np.testing.assert_allclose(inverse_frequencies(network), expected.numpy(), rtol=3e-7)
    unscaled = inverse_frequencies(dataclasses.replace(network, rope_scaling=None))
    assert (unscaled / inverse_frequencies(network))[-1] == pytest.approx(8.0)


# Refusals ------------------------------------------------------------------------------------------------------------


def changed(**fields):
    return configuration.to_dict(CONFIG) | {"llama": configuration.to_dict(CONFIG.llama) | fields}


@pytest.mark.parametrize(
    "values, message",
    [
        (changed(num_key_value_heads=3), "num_attention_heads 4 found, expected a multiple of num_key_value_heads 3"),
        (changed(head_dim=7), "head_dim 7 found, expected an even number"),
        (changed(num_hidden_layers=0), "num_hidden_layers 0 found, expected a positive number"),
        (changed(attention_bias=True), "attention_bias True found with 'llama'"),
        (changed(vocab_size=60), "padded_vocab_size 56 found, expected at least vocab_size 60"),
        (changed(vocab_size=48), "sound tokens 40 to 49 found, expected ids below vocab_size 48"),
        (configuration.to_dict(CONFIG) | {"eos_token_ids": [50]}, "eos_token_ids .* found, expected ids below vocab_size 50"),
    ],
)
def test_contradictory_configs_are_refused(values, message):
    with pytest.raises(InputError, match=f"^config.*{message}"):
        configuration.from_dict(LanguageModelConfig, values, "config")


def test_config_round_trip():
    assert configuration.from_dict(LanguageModelConfig, configuration.to_dict(CONFIG), "config") == CONFIG
