"""An exported language model against the one it was exported from: the same logits, or it is not published."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.engine import TensorInfo
from ichigo_jax.errors import InputError
from ichigo_jax.models.declare import cast_params
from ichigo_jax.models.llama import LanguageModelConfig, Llama
from ichigo_jax.storage.model_folder import load_model

MAX_LOGIT_DIFFERENCE = 1e-3


def reason_not_to_compare(weights: Iterable[TensorInfo], most_bytes: int) -> str | None:
    """Why the logits of a model cannot be compared here, or None.

    Args:
      weights: the model's tensors.
      most_bytes: how much the model may take in float32.
    """
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        return f"{' and '.join(missing)} not installed"
    size = 4 * sum(math.prod(weight.shape) for weight in weights)
    if size > most_bytes:
        return f"the model takes {size / 1e9:.1f} GB in float32, more than the {most_bytes / 1e9:.1f} GB of --compare-up-to"
    return None


class Comparison(NamedTuple):
    """Largest absolute differences of logits, computed in float32; None where nothing was compared.

    Attributes:
      difference: between transformers on the exported weights and ours on the same weights.
      rounding: between our logits with the weights as they are and as they were written; None where they are the same.
    """

    difference: float | None
    rounding: float | None


def compare(exported: Path, source: os.PathLike, config: LanguageModelConfig, dtype: str | None = None) -> Comparison:
    """Runs an exported folder in transformers, and the model folder that it comes from here, both in float32.

    One model is in memory at a time.

    Args:
      exported: the Hugging Face folder.
      source: the model folder.
      config: of the model.
      dtype: what the export rounded the weights to; None: nothing.

    Raises:
      InputError: a difference of more than ``MAX_LOGIT_DIFFERENCE``, or transformers does not load the folder as it stands.
    """
    prompts = check_prompts(config)
    exact = ours = _our_logits(source, config, prompts)
    if dtype is not None:
        ours = _our_logits(source, config, prompts, dtype)
    largest = float(np.abs(_their_logits(exported, prompts) - ours).max())
    if not largest <= MAX_LOGIT_DIFFERENCE:  # NaN is refused as well
        raise InputError(
            f"the exported weights give logits in transformers that differ by {largest} from the model's, "
            f"expected at most {MAX_LOGIT_DIFFERENCE} in float32; nothing was published"
        )
    return Comparison(largest, None if dtype is None else float(np.abs(exact - ours).max()))


def _their_logits(folder: Path, prompts: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    faults = {name: sorted(map(str, keys)) for name, keys in loading.items() if keys}
    if faults:
        raise InputError(f"transformers does not load the exported weights as they stand: {faults}; nothing was published")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(prompts)).logits.numpy()


def _our_logits(
    folder: os.PathLike, config: LanguageModelConfig, prompts: np.ndarray, rounded_to: str = "float32"
) -> np.ndarray:  # fmt: skip
    @nnx.jit
    def logits(model: Llama, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = model(tokens, positions)
        return model.logits(hidden)

    model = load_model(folder, lambda rngs: Llama(config, rngs), jnp.dtype(rounded_to))
    nnx.update(model, cast_params(nnx.state(model), jnp.float32))
    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(model, jnp.asarray(prompts, jnp.int32)))


def check_prompts(config: LanguageModelConfig) -> np.ndarray:
    """A few token sequences, int64 [B, T], from all over the vocabulary; one is sound tokens where the model has them."""
    rng = np.random.default_rng(0)
    length = min(24, config.llama.max_position_embeddings)
    prompts = rng.integers(0, config.llama.vocab_size, (3, length))
    prompts[:2, 0] = 0, config.llama.vocab_size - 1
    if config.sound is not None:
        prompts[2] = config.sound.ids(rng.integers(0, config.sound.codes, length - 2))
    return prompts
