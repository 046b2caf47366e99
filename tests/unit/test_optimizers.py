"""The optimizers: Adam-mini and Adafactor against their formulas, what states are kept in, and how they are laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec
from test_training_parts import optimizer_config

from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig
from ichigo_jax.parallel import make_mesh
from ichigo_jax.training.optimizer import kept_in, make_optimizer, scale_by_adafactor, scale_by_adam_mini
from ichigo_jax.training.state import logical_axes, make_state, split, state_shardings

L, D, F, N, K, H, ROWS = 2, 128, 256, 8, 4, 16, 512
LLAMA = LlamaConfig("llama", 500, D, F, L, N, K, H, 64, 1e-5, 1e4, None, False, False, 0.1)
QWEN = dataclasses.replace(LLAMA, architecture="qwen2", attention_bias=True)


def abstract(llama):
    return nnx.eval_shape(lambda: Llama(LanguageModelConfig(llama, None, (1,), ROWS), nnx.Rngs(0)))


def plain(**changes):
    """A config whose updates are minus the scaled gradients themselves."""
    values = {"learning_rate": 1.0, "warmup_steps": 0, "decay": "constant", "weight_decay": 0.0, "clip_norm": 1e9}
    return optimizer_config(**{**values, **changes})


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    random = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def states_of(optimizer, kind):
    """The state of one kind among the nested states of a chain."""
    return next(node for node in jax.tree.leaves(optimizer, is_leaf=lambda node: hasattr(node, kind)) if hasattr(node, kind))


# ---- Adam-mini -------------------------------------------------------------------------------------------------------


def test_adam_mini_keeps_one_second_moment_for_each_block_of_each_layer():
    model = abstract(QWEN)
    _, params, _, _ = split(model, ())
    state = jax.eval_shape(make_optimizer(plain(name="adam_mini"), 10, model).init, params)
    found = {".".join(path): value.shape for path, value in flatten_dict(states_of(state, "nu").nu).items()}
    assert found == {
        "embedding": (ROWS, 1),
        "lm_head": (1, ROWS),
        "norm.scale": (1,),
        "layers.attention_norm.scale": (L, 1),
        "layers.feed_forward_norm.scale": (L, 1),
        "layers.attention.q": (L, 1, N, 1),
        "layers.attention.k": (L, 1, K, 1),
        "layers.attention.v": (L, 1, K, H),
        "layers.attention.o": (L, 1, 1, D),
        "layers.attention.q_bias": (L, N, 1),
        "layers.attention.k_bias": (L, K, 1),
        "layers.attention.v_bias": (L, K, H),
        "layers.feed_forward.gate": (L, 1, F),
        "layers.feed_forward.up": (L, 1, F),
        "layers.feed_forward.down": (L, 1, D),
    }
    moments = jax.tree.leaves(states_of(state, "nu").nu)
    assert sum(moment.size for moment in moments) < 0.01 * sum(value.size for value in jax.tree.leaves(params))


def test_adam_mini_is_adam_of_blocks():
    """Each block of a [2, 3] parameter by itself, by the formula of the paper's algorithm 1."""
    b1, b2, eps = 0.9, 0.95, 1e-3
    optimizer = scale_by_adam_mini(b1, b2, eps, {"kernel": (1,)})
    state = optimizer.init({"kernel": jnp.zeros((2, 3))})
    m, v = np.zeros((2, 3)), np.zeros(2)
    for step in range(1, 4):
        gradient = np.random.default_rng(step).normal(size=(2, 3))
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient, jnp.float32)}, state)
        for block in range(2):
            m[block] = b1 * m[block] + (1 - b1) * gradient[block]
            v[block] = b2 * v[block] + (1 - b2) * np.mean(gradient[block] ** 2)
            expected = m[block] / (1 - b1**step) / (np.sqrt(v[block] / (1 - b2**step)) + eps)
            np.testing.assert_allclose(updates["kernel"][block], expected, rtol=1e-5)


def test_adam_mini_with_blocks_of_one_is_adam():
    params = {"kernel": jnp.zeros((3, 4))}
    mini, adam = scale_by_adam_mini(0.9, 0.95, 1e-8, {"kernel": ()}), optax.scale_by_adam(0.9, 0.95, 1e-8)
    states = mini.init(params), adam.init(params)
    for step in range(3):
        gradient = random_like(params, step)
        (found, first), (expected, second) = mini.update(gradient, states[0]), adam.update(gradient, states[1])
        states = first, second
        np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-5)


# ---- Adafactor -------------------------------------------------------------------------------------------------------


def test_adafactor_is_the_papers_formula_for_each_layer():
    """Algorithm 4 of Shazeer and Stern with the decay bounded by b2, on two stacked layers of very different gradients."""
    shape, b2 = (2, 5, 7), 0.6
    optimizer = scale_by_adafactor(b2, {"kernel": (1, 2), "bias": (1,)})
    state = optimizer.init({"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[:2])})
    row, column, vector = np.zeros((2, 5)), np.zeros((2, 7)), np.zeros((2, 5))

    def clipped(update):
        return update / max(1.0, np.sqrt(np.mean(update**2)))

    for step in range(1, 5):
        gradient = np.random.default_rng(step).normal(size=shape) * np.array([1.0, 1e-3])[:, None, None] * step
        bias = gradient[..., 0]
        updates, state = optimizer.update(jax.tree.map(jnp.float32, {"kernel": gradient, "bias": bias}), state)
        decay = min(b2, 1 - step**-0.8)
        square = gradient**2 + 1e-30
        row, column = decay * row + (1 - decay) * square.mean(2), decay * column + (1 - decay) * square.mean(1)
        vector = decay * vector + (1 - decay) * bias**2
        for layer in range(2):
            second = np.outer(row[layer], column[layer]) / row[layer].mean()
            np.testing.assert_allclose(updates["kernel"][layer], clipped(gradient[layer] / np.sqrt(second)), rtol=1e-4)
            np.testing.assert_allclose(updates["bias"][layer], clipped(bias[layer] / np.sqrt(vector[layer])), rtol=1e-4)


def test_adafactor_of_a_matrix_is_optaxs():
    params = {"kernel": jnp.zeros((130, 150))}
    ours = scale_by_adafactor(1.0, {"kernel": (0, 1)})
    theirs = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    states = ours.init(params), theirs.init(params)
    for step in range(3):
        gradient = random_like(params, step)
        (found, first), (expected, second) = ours.update(gradient, states[0]), theirs.update(gradient, states[1], params)
        states = first, second
        np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-4)


def test_adafactor_factors_every_head_and_keeps_a_first_moment_if_told():
    model = abstract(LLAMA)
    _, params, _, _ = split(model, ())
    count = sum(value.size for value in jax.tree.leaves(params))
    sizes = []
    for b1 in (0.0, 0.9):
        state = jax.eval_shape(make_optimizer(plain(name="adafactor", b1=b1), 10, model).init, params)
        sizes.append(sum(value.size for value in jax.tree.leaves(state)))
    factors = states_of(state, "rows")
    assert factors.rows["layers"]["attention"]["q"].shape == (L, 1, N, H)
    assert factors.columns["layers"]["attention"]["q"].shape == (L, D, N, 1)
    assert factors.rows["norm"]["scale"].shape == (D,) and factors.columns["norm"]["scale"].shape == (1,)
    assert sizes[0] < 0.05 * count and count < sizes[1] < 1.05 * count


# ---- States ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adam_mini", "adafactor"])
def test_moments_are_kept_in_the_dtype_that_the_config_names(name):
    model = abstract(LLAMA)
    _, params, _, _ = split(model, ())
    for params_dtype in (jnp.float32, jnp.bfloat16):
        stored = jax.tree.map(lambda x, dtype=params_dtype: jax.ShapeDtypeStruct(x.shape, dtype), params)
        for dtype in ("float32", "bfloat16"):
            optimizer = make_optimizer(plain(name=name, state_dtype=dtype), 10, model)
            state = jax.eval_shape(optimizer.init, stored)
            _, after = jax.eval_shape(optimizer.update, params, state, params)
            for tree in (state, after):
                assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype), jnp.dtype("int32")}


def test_half_precision_moments_follow_the_full_ones():
    params = {"kernel": jnp.zeros((16, 16))}
    full, half = (kept_in(dtype, optax.scale_by_adam(0.9, 0.95, 1e-8)) for dtype in ("float32", "bfloat16"))
    states = full.init(params), half.init(params)
    for step in range(20):
        gradient = random_like(params, step)
        (expected, first), (found, second) = full.update(gradient, states[0]), half.update(gradient, states[1])
        states = first, second
        assert found["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(found["kernel"], expected["kernel"], atol=0.05)
    assert np.abs(found["kernel"] - expected["kernel"]).max() > 0, "rounding should show, else nothing was kept in half"


@pytest.mark.parametrize("name", ["adamw", "adam_mini", "adafactor"])
def test_moments_lie_where_their_parameters_do(name):
    """Whatever has both of a matrix's axes is split by eight, what has one of them by that."""
    model = abstract(LLAMA)
    _, *parts = split(model, ())
    optimizer = make_optimizer(plain(name=name, b1=0.9), 10, model)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    state = jax.eval_shape(lambda: make_state(*parts, optimizer, 8))
    shardings = state_shardings(state, logical_axes(model, ()), mesh)
    share = lambda x, sharding: int(np.prod(sharding.shard_shape(x.shape)))  # noqa: E731
    held = sum(jax.tree.leaves(jax.tree.map(share, state.opt_state, shardings.opt_state)))
    total = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert held < 1.05 * total / 8, "only norms and what is reduced to rows may be on more devices than one"
    if name == "adam_mini":
        nu = states_of(shardings.opt_state, "nu").nu
        assert nu["layers"]["attention"]["v"].spec == PartitionSpec(None, None, "tensor", None)
        assert nu["layers"]["feed_forward"]["down"].spec == PartitionSpec(None, None, "fsdp")
    if name == "adafactor":
        factors = states_of(shardings.opt_state, "rows")
        assert factors.rows["layers"]["feed_forward"]["gate"].spec == PartitionSpec(None, "fsdp", None)
        assert factors.columns["layers"]["feed_forward"]["gate"].spec == PartitionSpec(None, None, "tensor")
