"""A language model for inference in few bits, and how far its logits are from the exact ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import Llama
from ichigo_jax.models.quantized_weights import LARGEST, Quantization, quantize

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


def quantize_model(model: Llama, to: Quantization, group_size: int | None, device: jax.Device) -> Llama:
    """The same network with the matrices of its layers and its head in few bits, on ``device``.

    Layers stay stacked, and one array after the other is moved, quantised a layer at a time and let go, so ``device`` never
    holds more than one of them whole. A model with tied embeddings gets a head of its own.

    Args:
      model: on any device, the host's say; is used up.
      to: "int8", one scale for each output, or "int4", one for each ``group_size`` inputs of each output.
      group_size: for int4.
      device: where the result goes.
    """
    if model.config.llama.tie_word_embeddings:
        model.lm_head = nnx.Param(model.embedding[...].T, axes=model.embedding.axes[::-1])
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        value = jax.device_put(variable.get_value(), device)
        variable.set_value(None)
        axes = CONTRACTED.get(path[-1])
        if axes is None:
            variable.set_value(value)
        else:
            variable.set_value(_quantize(value, axes, to, group_size, stacked=path[0] == "layers"))
    nnx.update(model, state)
    return model


def _quantize(kernel: jax.Array, axes: int, to: Quantization, group_size: int | None, stacked: bool):
    one = lambda kernel: quantize(kernel, axes, to, group_size)  # noqa: E731
    return jax.jit(lambda kernel: jax.lax.map(one, kernel) if stacked else one(kernel))(kernel)


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
