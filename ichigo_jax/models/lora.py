"""Low-rank adapters (LoRA) on a language model whose own weights stay as they are.

Formulas as PEFT (``peft.LoraConfig``) has them: a linear layer gives x W + x A B · scale, where scale is alpha / r, or
alpha / sqrt(r) with rank-stabilised LoRA. A starts uniform within ±1 / sqrt(inputs) (``kaiming_uniform_(a=sqrt(5))``), B
at zero. W + A B · scale exists only in ``merged``.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax.errors import InputError
from ichigo_jax.models.declare import Initializer, freeze, is_frozen, param, zeros
from ichigo_jax.models.linear import project
from ichigo_jax.models.llama import Llama, LlamaConfig
from ichigo_jax.parallel import named_sharding
from ichigo_jax.storage.model_folder import load_arrays, load_config, save_model

KIND = "lora_adapter"
ADAPTER_FOLDER = "adapter"  # inside the folder of the merged model
ArrayPath = tuple[str, ...]

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A linear layer of a block: the module that holds its weight, and how many of the weight's axes are inputs."""

    module: str
    inputs: int


LINEARS = {
    "q": Linear("attention", 1),
    "k": Linear("attention", 1),
    "v": Linear("attention", 1),
    "o": Linear("attention", 2),
    "gate": Linear("feed_forward", 1),
    "up": Linear("feed_forward", 1),
    "down": Linear("feed_forward", 1),
}

WHOLE: dict[str, tuple[ArrayPath, ...]] = {
    "embedding": (("embedding",),),
    "lm_head": (("lm_head",),),
    "norms": (("layers", "attention_norm", "scale"), ("layers", "feed_forward_norm", "scale"), ("norm", "scale")),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter.

    Attributes:
      rank: r, the inner size.
      alpha: what A B is multiplied by, times rank.
      rslora: whether alpha is divided by sqrt(rank) instead of rank (Kalajdzievski, 2023).
      targets: which linear layers of every block have an adapter, or "all".
      train_also: what is trained in full beside them; with tied embeddings "embedding" is the head too.
    """

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[Literal["all", "q", "k", "v", "o", "gate", "up", "down"], ...]
    train_also: tuple[Literal["embedding", "lm_head", "norms"], ...]

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise InputError(f"rank {self.rank} and alpha {self.alpha} found, expected positive numbers")
        if not self.targets:
            raise InputError("targets () found, expected 'all' or some of the linear layers")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def linears(self) -> tuple[str, ...]:
        """The adapted linear layers."""
        return tuple(name for name in LINEARS if name in self.targets or "all" in self.targets)

    @property
    def trained_in_full(self) -> tuple[ArrayPath, ...]:
        """Paths of the parameters that are trained in full."""
        return tuple(path for name in WHOLE if name in self.train_also for path in WHOLE[name])


def check_fits(config: LoraConfig, llama: LlamaConfig) -> None:
    """Refuses an adapter that the model has no place for.

    Raises:
      InputError: the head is to be trained where the embedding is the head.
    """
    if llama.tie_word_embeddings and "lm_head" in config.train_also:
        raise InputError("train_also 'lm_head' found, but the model's head is its embedding; 'embedding' trains both")


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


class Adapter(nnx.Module):
    """What is added to one linear layer: x A B · scale. [..., inputs] -> [..., outputs].

    A is [inputs, r] and B [r, outputs] as the layer's weight is [inputs, outputs], all with a leading L while stacked.
    """

    def __init__(self, weight: nnx.Param, linear: Linear, config: LoraConfig, rngs: nnx.Rngs, mesh: Mesh | None):
        """For the stacked ``weight``; see ``attach``."""
        split = 1 + linear.inputs
        inputs, outputs, axes = weight.shape[:split], weight.shape[split:], weight.axes
        bound = 1.0 / math.sqrt(math.prod(inputs[1:]))
        self.a = _declare(rngs, _uniform(bound), (*inputs, config.rank), (*axes[:split], "rank"), mesh)
        self.b = _declare(rngs, zeros, (inputs[0], config.rank, *outputs), (axes[0], "rank", *axes[split:]), mesh)
        self.scale = config.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.a[...]
        return project(project(x, a, axes=a.ndim - 1), self.b[...]) * self.scale


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _declare(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh | None) -> nnx.Param:
    """``declare.param``, each device of the mesh making its own part of the values."""
    if mesh is not None:
        sharding = named_sharding(mesh, axes, shape, "adapter")
        init = jax.jit(init, static_argnums=(1, 2), out_shardings=sharding)
    return param(rngs, init, shape, axes)


def attach(model: Llama, config: LoraConfig, base_dtype: Any, rngs: nnx.Rngs, mesh: Mesh | None = None) -> None:
    """Freezes a model and gives its linear layers adapters; the model computes what it did until they are trained.

    Args:
      model: changed in place.
      config: the adapter.
      base_dtype: what the frozen parameters are kept in; those that are trained are float32.
      rngs: of A.
      mesh: where the adapters are laid out; None puts all on the default device.

    Raises:
      InputError: see ``check_fits``; axes that the mesh does not divide.
    """
    check_fits(config, model.config.llama)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        parameter = _parameter(model, path)
        trained = path in config.trained_in_full
        if not trained:
            freeze(parameter)
        parameter.set_value(variable.get_value().astype(jnp.float32 if trained else base_dtype))
    adapters: dict[str, dict[str, Adapter]] = {}
    for name in config.linears:
        linear = LINEARS[name]
        weight = _parameter(model, weight_path(name))
        adapters.setdefault(linear.module, {})[name] = Adapter(weight, linear, config, rngs, mesh)
    for module, of_module in adapters.items():
        getattr(model.layers, module).adapters = nnx.Dict(of_module)


def trained_state(model: Llama) -> dict[str, Any]:
    """The nested arrays that a model with adapters does not share with its base: A, B and what is trained in full."""
    return nnx.to_pure_dict(nnx.state(model, lambda path, value: isinstance(value, nnx.Param) and not is_frozen(value)))


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


def merged(model: Llama, dtype: Any) -> Llama:
    """A model without adapters, with theirs added to its weights in float32 and all of it in ``dtype``; ``model`` is kept."""
    plain = nnx.clone(model)
    for module in (plain.layers.attention, plain.layers.feed_forward):
        if module.adapters is None:
            continue
        for name, adapter in module.adapters.items():
            weight = getattr(module, name)
            weight.set_value(merge_weight(weight[...], adapter.a[...], adapter.b[...], adapter.scale))
        del module.adapters
    for path, variable in nnx.to_flat_state(nnx.state(plain)):
        _parameter(plain, path).set_value(variable.get_value().astype(dtype))
    return plain


def merge_arrays(
    base: Mapping[ArrayPath, np.ndarray], adapter: Mapping[ArrayPath, np.ndarray], config: LoraConfig
) -> dict[ArrayPath, np.ndarray]:
    """``merged`` for the arrays of a model folder and of an adapter; every array keeps the base's dtype."""
    state = dict(base)
    for name in config.linears:
        path = weight_path(name)
        a, b = (adapter[adapter_path(name, part)] for part in ("a", "b"))
        state[path] = np.asarray(merge_weight(state[path], a, b, config.scale))
    for path in config.trained_in_full:
        state[path] = np.asarray(adapter[path]).astype(state[path].dtype)
    return state


def merge_weight(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + A B · scale of stacked layers in float32, back in W's dtype: [L, inputs, outputs], [L, inputs, r], [L, r, outputs]."""
    weight = jnp.asarray(weight)
    return jax.jit(_merge_layers, out_shardings=weight.sharding)(weight, a, b, scale)


def _merge_layers(weight: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    def layer(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        w, a, b = (array.astype(jnp.float32) for array in arrays)
        return (w + scale * jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)).astype(weight.dtype)

    # A layer at a time, so that float32 copies of a whole stack never exist.
    return jax.lax.map(layer, (weight, a, b))


# ---------------------------------------------------------------------------------------------------------------------
# Adapters on disk
# ---------------------------------------------------------------------------------------------------------------------


def save_adapter(folder: str | os.PathLike, config: LoraConfig, state: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Adds an adapter to the folder of the model that it was merged into."""
    save_model(Path(folder) / ADAPTER_FOLDER, KIND, config, state, provenance, None)


def load_adapter_config(folder: str | os.PathLike) -> LoraConfig:
    """What the adapter of a merged model's folder is.

    Raises:
      InputError: a model that was trained without one.
    """
    adapter = Path(folder) / ADAPTER_FOLDER
    if not adapter.is_dir():
        raise InputError(f"{folder}: no {ADAPTER_FOLDER}/ found, expected a model that was trained with an adapter")
    return load_config(adapter, KIND, LoraConfig)


def load_adapter(folder: str | os.PathLike) -> tuple[LoraConfig, dict[ArrayPath, np.ndarray]]:
    """The adapter of a merged model's folder and its arrays; raises as ``load_adapter_config``."""
    return load_adapter_config(folder), load_arrays(Path(folder) / ADAPTER_FOLDER)


def weight_path(name: str) -> ArrayPath:
    """Where the weight of a linear layer is among a model's arrays."""
    return ("layers", LINEARS[name].module, name)


def adapter_path(name: str, part: Literal["a", "b"]) -> ArrayPath:
    """Where A or B of a linear layer's adapter is."""
    return ("layers", LINEARS[name].module, "adapters", name, part)


def _parameter(model: Llama, path: ArrayPath) -> nnx.Param:
    node: Any = model
    for name in path:
        node = getattr(node, name)
    return node
