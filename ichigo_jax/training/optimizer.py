"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import jax
import optax

from ichigo_jax.training.run_config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine decay to ``decay_to`` of it at the last step, or constant."""
    peak = config.learning_rate
    warmup = optax.linear_schedule(config.warmup_from * peak, peak, config.warmup_steps)
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - config.warmup_steps), config.decay_to)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip.

    Args:
      config: rates and decays.
      steps: length of the run, for the schedule.
      axes: the parameters' tree with each one's logical axes as leaves; what has one axis besides ``layers`` (norms,
        biases) is no matrix.
    """

    def is_matrix(names: tuple[str, ...]) -> bool:
        return len([name for name in names if name != "layers"]) > 1 and "norm" not in names

    mask = None
    if config.weight_decay_on == "matrices":
        mask = jax.tree.map(is_matrix, axes, is_leaf=lambda node: isinstance(node, tuple))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=mask,
        ),
    )
