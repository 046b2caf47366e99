"""The optimizers and their learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ichigo_jax.models.declare import cast_params
from ichigo_jax.training.run_config import OptimizerConfig
from ichigo_jax.training.state import declarations

# Adafactor's constants (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235, algorithm 4).
ADAFACTOR_EXPONENT = 0.8  # of the second moment's decay, 1 - step ** -0.8
ADAFACTOR_EPS = 1e-30  # added to squared gradients
ADAFACTOR_CLIP = 1.0  # bound of the root mean square of a parameter's update
# Parameters of which Adam-mini keeps one second moment a head.
QUERIES_AND_KEYS = ("q", "k", "q_bias", "k_bias", "query", "key", "query_bias")


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
    """AdamW, Adam-mini or Adafactor behind a clip of the trained parameters' global gradient norm.

    Gradients and parameters are expected in float32, and so are updates.

    Args:
      config: which one, its rates and decays.
      steps: length of the run, for the schedule.
      model: with its arrays or abstract; what its parameters declare decides on their rate, decay and moments.
    """
    trained = declarations(model, config.frozen)[0]

    def for_each(rule: Callable[..., Any], with_name: bool = False) -> Any:
        def apply(path: tuple, parameter: nnx.Variable) -> Any:
            return rule(path[-1].key, parameter) if with_name else rule(parameter)

        return jax.tree_util.tree_map_with_path(apply, trained, is_leaf=lambda node: isinstance(node, nnx.Variable))

    decays = {
        "matrices": is_matrix,
        "all": lambda parameter: True,
        "all_but_norms_and_embeddings": lambda parameter: not is_norm(parameter) and not is_embedding(parameter),
    }[config.weight_decay_on]
    scaled = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps),
        "adam_mini": lambda: scale_by_adam_mini(config.b1, config.b2, config.eps, for_each(shared_axes, with_name=True)),
        "adafactor": lambda: optax.chain(
            scale_by_adafactor(config.b2, for_each(axes_of_one_layer)),
            optax.ema(config.b1, debias=False) if config.b1 else optax.identity(),
        ),
    }[config.name]()
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        kept_in(config.state_dtype, scaled),
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


# ---------------------------------------------------------------------------------------------------------------------
# Moments
# ---------------------------------------------------------------------------------------------------------------------


def kept_in(dtype: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, computing in float32, with its floating-point state stored in ``dtype``."""

    def init(params: Any) -> Any:
        return cast_params(optimizer.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, cast_params(state, jnp.float32), params)
        return updates, cast_params(state, dtype)

    return optax.GradientTransformation(init, update)


def axes_of_one_layer(parameter: nnx.Variable) -> tuple[int, ...]:
    """All but ``layers``: stacked layers are parameters of their own."""
    return tuple(index for index, name in enumerate(parameter.axes) if name != "layers")


def shared_axes(name: str, parameter: nnx.Variable) -> tuple[int, ...]:
    """The axes of one Adam-mini block, whose elements share a second moment; stacked layers have blocks of their own.

    A block is a head of queries or keys, a token's row of the embedding or of the output, all of a norm, and otherwise
    what feeds one output (Zhang et al. 2024, https://arxiv.org/abs/2406.16793). ``("layers", "ffn", "embed")``, whose outputs
    are ``embed``, -> ``(1,)``.

    Args:
      name: what the parameter is called in its module.
      parameter: for its axes, inputs before outputs.
    """
    axes = [axis for axis in parameter.axes if axis not in ("layers", "quantizers")]
    if "norm" in axes:
        own = []
    elif name in QUERIES_AND_KEYS:
        own = ["heads", "kv_heads"]
    elif "vocab" in axes or "position" in axes:
        own = ["vocab", "position"]
    elif len(axes) == 1 or name.endswith("bias"):
        own = axes
    elif axes[0] != "embed" and axes[-1] == "embed":
        own = ["embed"]
    else:
        own = axes[2:] if axes[0] == "kernel" else axes[1:]
    return tuple(index for index, axis in enumerate(parameter.axes) if axis not in [*own, "layers", "quantizers"])


class AdamMiniState(NamedTuple):
    """``mu`` as the parameters; ``nu`` as well, but of size 1 along the axes of a block."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam_mini(b1: float, b2: float, eps: float, blocks: Any) -> optax.GradientTransformation:
    """Adam with one second moment, of the mean squared gradient, for each block of a parameter (Zhang et al. 2024).

    Args:
      b1, b2, eps: as Adam's.
      blocks: for each parameter the axes that make up a block, from ``shared_axes``.
    """

    def mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return x.mean(axes, keepdims=True)

    def init(params: Any) -> AdamMiniState:
        mu = jax.tree.map(jnp.zeros_like, params)
        return AdamMiniState(jnp.zeros((), jnp.int32), mu, jax.tree.map(mean, mu, blocks))

    def update(updates: Any, state: AdamMiniState, params: Any = None) -> tuple[Any, AdamMiniState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda n, g, axes: b2 * n + (1 - b2) * mean(jnp.square(g), axes), state.nu, updates, blocks)
        first, second = 1 - b1**count, 1 - b2**count
        updates = jax.tree.map(lambda m, n: (m / first) / (jnp.sqrt(n / second) + eps), mu, nu)
        return updates, AdamMiniState(count, mu, nu)

    return optax.GradientTransformation(init, update)


class AdafactorState(NamedTuple):
    """``rows`` and ``columns`` as the parameters, but of size 1 along one axis; of a vector, all and their mean."""

    count: jax.Array
    rows: Any
    columns: Any


def scale_by_adafactor(b2: float, layer_axes: Any) -> optax.GradientTransformation:
    """Adafactor's clipped update, without its first moment and its own learning rates (Shazeer and Stern 2018).

    The second moment of a matrix is its mean along rows times its mean along columns; of a parameter of more axes, along the
    two largest, for every index of the others: for queries, every head has a matrix of its own. Its decay rises with the
    steps, to b2 at most (Zhai et al. 2021, https://arxiv.org/abs/2106.04560). Every layer's update is clipped by itself.

    Args:
      b2: the highest decay.
      layer_axes: for each parameter the axes of one layer, from ``axes_of_one_layer``.
    """

    def two_largest(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        largest = sorted(axes, key=lambda axis: shape[axis])[-2:]
        return ((largest[1],), (largest[0],)) if len(largest) == 2 else ((), axes)

    def means(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        along_rows, along_columns = two_largest(x.shape, axes)
        return x.mean(along_rows, keepdims=True), x.mean(along_columns, keepdims=True)

    def init(params: Any) -> AdafactorState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        rows = jax.tree.map(lambda x, axes: means(x, axes)[0], zeros, layer_axes)
        columns = jax.tree.map(lambda x, axes: means(x, axes)[1], zeros, layer_axes)
        return AdafactorState(jnp.zeros((), jnp.int32), rows, columns)

    def update(updates: Any, state: AdafactorState, params: Any = None) -> tuple[Any, AdafactorState]:
        count = state.count + 1
        decay = jnp.minimum(b2, 1 - count.astype(jnp.float32) ** -ADAFACTOR_EXPONENT)
        square = jax.tree.map(lambda g, axes: means(jnp.square(g) + ADAFACTOR_EPS, axes), updates, layer_axes)
        moving = lambda which: lambda old, new: decay * old + (1 - decay) * new[which]  # noqa: E731
        rows = jax.tree.map(moving(0), state.rows, square)
        columns = jax.tree.map(moving(1), state.columns, square)

        def scaled(g: jax.Array, row: jax.Array, column: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            _, along_columns = two_largest(g.shape, axes)
            # Of a vector, the column is the mean of the row and cancels out.
            g = g * jax.lax.rsqrt(row / row.mean(along_columns, keepdims=True)) * jax.lax.rsqrt(column)
            size = jnp.sqrt(jnp.square(g).mean(axes, keepdims=True))
            return g / jnp.maximum(1.0, size / ADAFACTOR_CLIP)

        return jax.tree.map(scaled, updates, rows, columns, layer_axes), AdafactorState(count, rows, columns)

    return optax.GradientTransformation(init, update)
