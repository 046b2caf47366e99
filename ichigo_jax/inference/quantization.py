"""A language model for inference in few bits, and how far its logits are from the exact ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import Llama
from ichigo_jax.models.quantized_weights import LARGEST, Quantization, QuantizedKernel, quantize
from ichigo_jax.parallel import dividing_spec, named_sharding, partition_spec

# How many leading axes each matrix contracts. Embedding, norms and biases stay as they are.
CONTRACTED = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "lm_head": 1}


def check_quantization(to: Quantization | None, group_size: int | None) -> None:
    """Refuses what cannot be meant.

    Raises:
      InputError: an unknown format, int4 without a group size, or a group size without int4.
    """
    if to is not None and to not in LARGEST:
        raise InputError(f"quantize {to!r} found, expected one of {', '.join(LARGEST)} or None")
    if (to == "int4") != (group_size is not None):
        raise InputError(
            f"quantize {to!r} with group_size {group_size} found, expected a group size (64, say) with int4 and only there"
        )


def quantize_model(model: Llama, to: Quantization, group_size: int | None, mesh: Mesh | None) -> Llama:
    """The same network with the matrices of its layers and its head in few bits.

    Layers stay stacked, and one array after the other is moved, quantised a layer at a time and let go, so devices never hold
    more than one of them in its full precision. A model with tied embeddings gets a head of its own.

    Args:
      model: on any device, the host's say; is used up.
      to: "int8", one scale for each output, or "int4", one for each ``group_size`` inputs of each output.
      group_size: for int4.
      mesh: over whose devices every array of the result is laid out by its logical axes; None: all on the default device.

    Raises:
      InputError: an axis that the mesh does not divide.
    """
    if model.config.llama.tie_word_embeddings:
        model.lm_head = nnx.Param(model.embedding[...].T, axes=model.embedding.axes[::-1])
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        if mesh is None:
            sharding = SingleDeviceSharding(jax.devices()[0])
        else:
            sharding = named_sharding(mesh, variable.axes, value.shape, ".".join(map(str, path)))
        value = jax.device_put(value, sharding)
        variable.set_value(None)
        contracted = CONTRACTED.get(path[-1])
        if contracted is not None:
            value = _quantize(value, contracted, to, group_size, stacked=path[0] == "layers", axes=variable.axes, mesh=mesh)
        variable.set_value(value)
    nnx.update(model, state)
    return model


def _quantize(
    kernel: jax.Array,
    contracted: int,
    to: Quantization,
    group_size: int | None,
    stacked: bool,
    axes: Sequence[str],
    mesh: Mesh | None,
) -> QuantizedKernel:
    def every_layer(kernel: jax.Array) -> QuantizedKernel:
        one = lambda kernel: quantize(kernel, contracted, to, group_size)  # noqa: E731
        return jax.lax.map(one, kernel) if stacked else one(kernel)

    if mesh is None:
        return jax.jit(every_layer)(kernel)
    layers, inputs, outputs = axes[:stacked], axes[stacked], axes[stacked + contracted :]
    layout = lambda shape, axes: NamedSharding(mesh, dividing_spec(mesh, axes, shape))  # noqa: E731
    shapes = jax.eval_shape(every_layer, kernel)
    # Devices share the groups of inputs out, or, where the mesh does not divide their number (one, say), each group's inputs.
    groups = shapes.values.shape[len(layers)]
    of_inputs = (inputs, None) if dividing_spec(mesh, [inputs], [groups]) == partition_spec([inputs]) else (None, inputs)
    shardings = QuantizedKernel(
        values=layout(shapes.values.shape, (*layers, *of_inputs, *outputs)),
        scales=layout(shapes.scales.shape, (*layers, of_inputs[0], *outputs)),
    )
    return jax.jit(every_layer, out_shardings=shardings)(kernel)


class QuantizationError(NamedTuple):
    """Logits of a quantised model beside those of the exact one, over all positions.

    Attributes:
      relative: root mean square of the difference, relative to that of the exact logits about their mean.
      largest: the largest difference.
      same_choice: the part of positions with the same likeliest token.
    """

    relative: float
    largest: float
    same_choice: float


def quantization_error(exact: np.ndarray, quantized: np.ndarray) -> QuantizationError:
    """Compares the logits [B, T, V] of two loads of one model on the same tokens, the first of them in float32."""
    # The softmax does not see what all logits of a position have in common.
    expected, found = (logits - logits.mean(-1, keepdims=True) for logits in (exact, quantized))
    return QuantizationError(
        relative=float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())),
        largest=float(np.abs(found - expected).max()),
        same_choice=float((expected.argmax(-1) == found.argmax(-1)).mean()),
    )
