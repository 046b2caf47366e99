import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ichigo_jax.data.loading import IGNORE
from ichigo_jax.training.losses import count_targets, cross_entropy_sums
from ichigo_jax.training.metrics import MetricsLog
from ichigo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from ichigo_jax.training.run_config import OptimizerConfig
from ichigo_jax.training.stop import StopSignals


def optimizer_config(**changes):
    values = {
        "name": "adamw",
        "state_dtype": "float32",
        "learning_rate": 0.1,
        "linear_rate_width": None,
        "embedding_rate": 1.0,
        "warmup_steps": 10,
        "warmup_from": 0.0,
        "decay": "cosine",
        "decay_to": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.5,
        "weight_decay_on": "matrices",
        "clip_norm": 1.0,
        "frozen": (),
    }
    return OptimizerConfig(**{**values, **changes})


def test_schedule_warms_up_peaks_and_ends_where_told():
    schedule = learning_rate_schedule(optimizer_config(), steps=110)
    assert [float(schedule(step)) for step in (0, 5, 10, 60, 110)] == pytest.approx([0.0, 0.05, 0.1, 0.055, 0.01])
    constant = learning_rate_schedule(optimizer_config(decay="constant"), steps=110)
    assert float(constant(100)) == pytest.approx(0.1)


def test_weight_decay_leaves_norms_and_biases_alone():
    params = {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3)), "scale": jnp.ones(3)}
    axes = {"kernel": ("layers", "embed", "ffn"), "bias": ("layers", "ffn"), "scale": ("norm",)}
    model = nnx.Module()
    for name, value in params.items():
        setattr(model, name, nnx.Param(value, axes=axes[name]))
    optimizer = make_optimizer(optimizer_config(warmup_steps=0), 100, model)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert float(updates["kernel"][0, 0, 0]) == pytest.approx(-0.1 * 0.5)
    assert float(jnp.abs(updates["bias"]).max()) == float(jnp.abs(updates["scale"]).max()) == 0.0


def test_cross_entropy_matches_torch():
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 5, 7)).astype(np.float32)
    targets = generator.integers(0, 7, size=(2, 5))
    targets[0, 2:] = IGNORE
    loss, correct, _ = cross_entropy_sums(jnp.asarray(logits), jnp.asarray(targets))
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).flatten(0, 1), torch.tensor(targets).flatten())
    assert float(loss / count_targets(jnp.asarray(targets))) == pytest.approx(expected.item(), abs=1e-6)
    assert float(correct) == ((logits.argmax(-1) == targets) & (targets != IGNORE)).sum()


def test_metrics_of_steps_that_are_taken_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (10, 20, 30):
        log.write(step, {"loss": step / 7})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    MetricsLog(path, 20).write(30, {"loss": 1.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30] and rows[-1]["loss"] == 1.0


def test_the_first_signal_is_noted_the_second_acts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
    try:
        with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
