"""The training step itself: parts and meshes change where sums are made, not what they are."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ichigo_jax.models.declare import cast_params
from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig
from ichigo_jax.parallel import batch_sharding, make_mesh
from ichigo_jax.tasks.language_model import LanguageModelTask
from ichigo_jax.train import make_step
from ichigo_jax.training.checkpoint import Checkpoints
from ichigo_jax.training.run_config import load
from ichigo_jax.training.state import is_spike, logical_axes, make_state, split, state_shardings

CONFIG = LanguageModelConfig(
    LlamaConfig("llama", 60, 32, 64, 2, 4, 2, 8, 128, 1e-5, 1e4, None, False, False, 0.1), None, (1,), 64
)

WINDOW, Z_LOSS = 4, 1e-3
NANO = str(Path(__file__).parents[2] / "configs" / "nano_llama.py")


def task(paths=("rows.parquet",)):
    """What is trained; it needs none of the data that its config names."""
    source = {"format": "sound", "column": None, "request": None, "weight": 1.0}
    fields = [
        f"data.sources={json.dumps([{'path': path, **source} for path in paths])}",
        *("data.packing=true", "objective.predict=all", "objective.loss_chunk=5", f"objective.z_loss={Z_LOSS}"),
        *("train.remat=none", "train.attention=xla"),
    ]
    return LanguageModelTask(load(NANO, [f"--config.{field}" for field in fields]), CONFIG)


def run_config(accumulation, spike_factor=None):
    train = {"accumulation": accumulation, "compute_dtype": "float32", "remat": "none", "attention": "xla"}
    return SimpleNamespace(seed=0, train=SimpleNamespace(**train, spike_factor=spike_factor))


def batch():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 60, (8, 12))
    targets[:3, 4:] = -100  # rows of different weight, so that a mean of means would show
    return {
        "tokens": jnp.asarray(generator.integers(0, 60, (8, 12)), jnp.int32),
        "targets": jnp.asarray(targets, jnp.int32),
        "positions": jnp.asarray(np.tile(np.arange(6), (8, 2)), jnp.int32),
        "segment_ids": jnp.asarray(np.repeat([[1] * 6 + [2] * 6], 8, axis=0), jnp.int32),
    }


def three_steps(mesh_sizes=None, accumulation=1, make=lambda: Llama(CONFIG, nnx.Rngs(0))):
    """Parameters and losses after three steps of plain gradient descent, whose updates are the gradients themselves."""
    optimizer = optax.sgd(0.5)
    model = make()
    graphdef, *parts = split(model, ())
    state, data = make_state(*parts, optimizer, WINDOW), batch()
    step = make_step(task(), run_config(accumulation), graphdef, optimizer)
    losses = []
    with contextlib.ExitStack() as stack:
        step_function = jax.jit(step)
        if mesh_sizes is not None:
            mesh = make_mesh(mesh_sizes)
            stack.enter_context(jax.set_mesh(mesh))
            shardings = state_shardings(state, logical_axes(model, ()), mesh)
            state, data = jax.device_put(state, shardings), jax.device_put(data, batch_sharding(mesh))
            step_function = jax.jit(step, out_shardings=(shardings, None))
        for _ in range(3):
            state, metrics = step_function(state, data)
            losses.append(float(metrics["loss"]))
        return jax.device_get(state.params), losses


@pytest.fixture(scope="module")
def expected():
    return three_steps()


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        (None, 4),
        ({"data": 8}, 1),
        ({"fsdp": 8}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"fsdp": 4, "context": 2}, 1),
    ],
)
def test_parts_and_meshes_give_the_same_step(expected, mesh, accumulation):
    params, losses = three_steps(mesh, accumulation)
    assert losses == pytest.approx(expected[1], abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected[0])


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing_and_is_counted():
    optimizer = optax.adam(0.1)
    graphdef, params, frozen, buffers = split(Llama(CONFIG, nnx.Rngs(0)), ())
    state = make_state(params, frozen, buffers, optimizer, WINDOW)
    step = jax.jit(make_step(task(), run_config(1), graphdef, optimizer))
    bad = dataclasses.replace(state, params={**params, "norm": {"scale": jnp.full_like(params["norm"]["scale"], jnp.nan)}})
    after, metrics = step(bad, batch())
    assert int(after.step) == 1 and int(after.skipped) == int(metrics["skipped_in_a_row"]) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, bad.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, bad.opt_state)
    good, metrics = step(dataclasses.replace(after, params=params), batch())
    assert int(good.skipped) == 1 and int(metrics["skipped_in_a_row"]) == 0
    assert np.abs(good.params["embedding"] - params["embedding"]).max() > 0


def jump(state, factor):
    """The same state with an output ``factor`` times as large, whose gradient is as well, about."""
    return dataclasses.replace(state, params={**state.params, "lm_head": factor * state.params["lm_head"]})


def test_a_step_whose_gradient_spikes_is_skipped_once_enough_are_known():
    optimizer = optax.sgd(1e-3)
    graphdef, *parts = split(Llama(CONFIG, nnx.Rngs(0)), ())
    step = jax.jit(make_step(task(), run_config(1, spike_factor=2.0), graphdef, optimizer))
    start, seen = make_state(*parts, optimizer, WINDOW), []
    early, metrics = step(jump(start, 30.0), batch())
    assert int(early.skipped) == 0, "with no norm to compare with nothing is a spike"
    wild = float(metrics["grad_norm"])

    state = start
    for number in range(WINDOW + 2):
        state, metrics = step(state, batch())
        seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        assert int(state.skipped) == 0 and wild > 2 * seen[-1][1]
        assert np.isnan(state.recent).sum() == 2 * max(0, WINDOW - 1 - number)
    np.testing.assert_allclose(state.recent, np.transpose(seen[-WINDOW:]), rtol=1e-6)

    spiking = jump(state, 30.0)
    after, metrics = step(spiking, batch())
    assert metrics["grad_norm"] > 2 * np.median([norm for _, norm in seen[-WINDOW:]])
    assert int(after.step) == WINDOW + 3 and int(after.skipped) == int(metrics["skipped_steps"]) == 1
    assert int(after.skipped_in_a_row) == int(metrics["skipped_in_a_row"]) == 1
    for name in ("params", "opt_state", "buffers", "recent"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(spiking, name))

    calm, metrics = step(dataclasses.replace(after, params=state.params), batch())
    assert int(calm.skipped) == 1 and int(metrics["skipped_in_a_row"]) == 0
    np.testing.assert_allclose(calm.recent[:, -1], [metrics["loss"], metrics["grad_norm"]], rtol=1e-6)
    np.testing.assert_array_equal(calm.recent[:, :-1], state.recent[:, 1:])


def test_a_loss_or_a_norm_above_its_own_median_is_a_spike():
    recent = jnp.array([[1.0, 1.0, 9.0], [4.0, 4.0, 4.0]])
    spikes = {(1.5, 7.9): False, (2.1, 4.0): True, (1.0, 8.1): True, (0.1, 0.1): False}
    for now, expected in spikes.items():
        assert bool(is_spike(recent, jnp.array(now), 2.0)) == expected, now
        assert not is_spike(recent, jnp.array(now), None)
        assert not is_spike(recent.at[:, 0].set(jnp.nan), jnp.array(now), 2.0), "not all are known yet"


def test_what_a_spike_is_compared_with_survives_a_checkpoint(tmp_path):
    optimizer = optax.sgd(1e-3)
    graphdef, *parts = split(Llama(CONFIG, nnx.Rngs(0)), ())
    step = jax.jit(make_step(task(), run_config(1, spike_factor=2.0), graphdef, optimizer))
    state, _ = step(make_state(*parts, optimizer, WINDOW), batch())
    checkpoints = Checkpoints(tmp_path / "checkpoints", kept=1, keep_every=0, best=None)
    checkpoints.save(state, 1, {}, {})
    checkpoints.close()
    found = (
        Checkpoints(tmp_path / "checkpoints", kept=1, keep_every=0, best=None).restore(jax.tree.map(jnp.zeros_like, state)).state
    )
    assert np.isnan(found.recent).sum() == 2 * (WINDOW - 1)
    jax.tree.map(np.testing.assert_array_equal, vars(found), vars(state))


def test_without_a_factor_nothing_spikes():
    optimizer = optax.sgd(1e-3)
    graphdef, *parts = split(Llama(CONFIG, nnx.Rngs(0)), ())
    step = jax.jit(make_step(task(), run_config(1), graphdef, optimizer))
    state = make_state(*parts, optimizer, 1)
    state, calm = step(state, batch())
    state, wild = step(jump(state, 30.0), batch())
    assert wild["grad_norm"] > 2 * calm["grad_norm"] and int(state.skipped) == 0


def test_parameters_in_half_precision_are_updated_in_full():
    """The float32 step from the same bfloat16 parameters, rounded once."""
    optimizer = optax.sgd(0.5)
    graphdef, params, *parts = split(Llama(CONFIG, nnx.Rngs(0)), ())
    step = jax.jit(make_step(task(), run_config(2), graphdef, optimizer))
    half = cast_params(params, "bfloat16")
    found, metrics = step(make_state(half, *parts, optimizer, WINDOW), batch())
    expected, full = step(make_state(cast_params(half, "float32"), *parts, optimizer, WINDOW), batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype("bfloat16")}
    assert float(metrics["loss"]) == pytest.approx(float(full["loss"]), rel=1e-6)
    rounded = cast_params(expected.params, "bfloat16")
    close = lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2**-7, atol=1e-5)  # noqa: E731
    jax.tree.map(close, found.params, rounded)
