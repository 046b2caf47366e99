"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ichigo_jax.training.run_config import OptimizerConfig
from ichigo_jax.training.state import declarations


def learning_rate_schedule(config: OptimizerConfig, steps: int, scale: float = 1.0) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine decay to ``decay_to`` of it at the last step, or constant.

    Args:
      config: rates and steps.
      steps: length of the run.
      scale: of the peak and the warm-up alone: all parameters end at one rate, ``decay_to * learning_rate``, as with
        ``ichigo_asr``'s parameter groups under ``torch.optim.lr_scheduler.CosineAnnealingLR``.
    """
    peak = scale * config.learning_rate
    warmup = optax.linear_schedule(config.warmup_from * peak, peak, config.warmup_steps)
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - config.warmup_steps), config.decay_to / scale)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, model: nnx.Module) -> optax.GradientTransformation:
    """AdamW behind a clip of the trained parameters' global gradient norm.

    Args:
      config: rates and decays.
      steps: length of the run, for the schedule.
      model: with its arrays or abstract; what its parameters declare decides on their rate and decay.
    """
    trained = declarations(model, config.frozen)[0]

    def for_each(rule: Callable[[nnx.Variable], Any]) -> Any:
        return jax.tree.map(rule, trained, is_leaf=lambda node: isinstance(node, nnx.Variable))

    decays = {
        "matrices": is_matrix,
        "all": lambda parameter: True,
        "all_but_norms_and_embeddings": lambda parameter: not is_norm(parameter) and not is_embedding(parameter),
    }[config.weight_decay_on]
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, for_each(decays)),
        _scale_by_rates(config, steps, for_each(lambda parameter: rate_scale(config, parameter))),
    )


def rate_scale(config: OptimizerConfig, parameter: nnx.Variable) -> float:
    """What the learning rate is multiplied by for one parameter: the rule of ``ichigo_asr.models.vq_transformer``.

    A linear layer of 1024 inputs learns at 192 / 1024 of the rate where ``linear_rate_width`` is 192, its bias as well.
    """
    fan_in = parameter.get_metadata().get("fan_in")
    if fan_in is not None and config.linear_rate_width is not None:
        return config.linear_rate_width / fan_in
    return config.embedding_rate if is_embedding(parameter) else 1.0


def is_matrix(parameter: nnx.Variable) -> bool:
    """More than one axis besides ``layers``, and not a norm's or a bias."""
    return len([name for name in parameter.axes if name != "layers"]) > 1 and not {"norm", "bias"} & set(parameter.axes)


def is_norm(parameter: nnx.Variable) -> bool:
    return "norm" in parameter.axes


def is_embedding(parameter: nnx.Variable) -> bool:
    """One row for each token or position."""
    return parameter.axes[0] in ("vocab", "position")


def _scale_by_rates(config: OptimizerConfig, steps: int, scales: Any) -> optax.GradientTransformation:
    """Minus the learning rate of the step times each parameter's scale; ``scales`` is a tree of floats."""
    schedules = {scale: learning_rate_schedule(config, steps, scale) for scale in jax.tree.leaves(scales)}

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> tuple[Any, Any]:
        rates = {scale: schedule(state.count) for scale, schedule in schedules.items()}
        updates = jax.tree.map(lambda update, scale: -rates[scale] * update, updates, scales)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)
