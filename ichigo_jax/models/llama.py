"""Llama 3.x and Qwen2.5 language models, sound tokens in the vocabulary or not.

Formulas as Hugging Face ``transformers`` computes them (``LlamaForCausalLM``, ``Qwen2ForCausalLM``): pre-RMSNorm blocks of
grouped-query attention with rotary positions and a SiLU-gated feed-forward. Qwen2.5 differs by biases on queries, keys
and values.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ichigo_jax.errors import InputError
from ichigo_jax.models.attention import Backend, attend, causal_segments, causal_to
from ichigo_jax.models.declare import normal, param, zeros
from ichigo_jax.models.kv_cache import Caches, KVCache
from ichigo_jax.models.linear import Adaptable, project
from ichigo_jax.models.norm import RMSNorm
from ichigo_jax.models.rotary import rotary_angles, rotate
from ichigo_jax.models.stack import Remat, scan_layers, stack_layers
from ichigo_jax.parallel import constrain
from ichigo_jax.vocab import SoundVocabulary

# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if not 0 < self.factor < math.inf:
            raise InputError(f"factor {self.factor} of the rotary scaling found, expected a positive number")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                f"low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor} found, "
                "expected 0 < low_freq_factor < high_freq_factor"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The network. Fields are named as in Hugging Face's ``config.json``; ``attention_bias`` means queries, keys and values."""

    architecture: Literal["llama", "qwen2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    initializer_range: float

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_theta",
        ):
            if not 0 < getattr(self, name) < math.inf:  # NaN is no such number either
                raise InputError(f"{name} {getattr(self, name)} found, expected a positive number")
        if self.num_attention_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} found, "
                f"expected a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} found, expected an even number (rotary positions pair its halves)")
        if self.attention_bias != (self.architecture == "qwen2"):
            raise InputError(
                f"attention_bias {self.attention_bias} found with {self.architecture!r}, expected it with 'qwen2' only"
            )


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """A language-model folder's ``config.json``.

    Attributes:
      llama: the network.
      sound: where sound tokens live among the ids, or None for a text-only model.
      eos_token_ids: ids that end a generation. Kept here because generation must stop the same way with and without a text
        tokenizer; other special ids and sampling defaults stay in the tokenizer's files.
      padded_vocab_size: rows of the embedding as stored; those from ``llama.vocab_size`` on exist only so that a mesh
        divides them. They have no logits and no export has them.
    """

    llama: LlamaConfig
    sound: SoundVocabulary | None
    eos_token_ids: tuple[int, ...]
    padded_vocab_size: int

    def __post_init__(self):
        vocab_size = self.llama.vocab_size
        if self.padded_vocab_size < vocab_size:
            raise InputError(f"padded_vocab_size {self.padded_vocab_size} found, expected at least vocab_size {vocab_size}")
        if any(not 0 <= token < vocab_size for token in self.eos_token_ids):
            raise InputError(f"eos_token_ids {self.eos_token_ids} found, expected ids below vocab_size {vocab_size}")
        if self.sound is not None and not 0 <= self.sound.first_id <= vocab_size - self.sound.size:
            last = self.sound.first_id + self.sound.size - 1
            raise InputError(f"sound tokens {self.sound.first_id} to {last} found, expected ids below vocab_size {vocab_size}")

    def padded_to(self, multiple: int) -> LanguageModelConfig:
        """With the fewest embedding rows that ``multiple`` divides."""
        return dataclasses.replace(self, padded_vocab_size=-(-self.llama.vocab_size // multiple) * multiple)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary inverse frequencies, float32 [H/2].

    With Llama 3.1 scaling, wavelengths longer than original/low_freq_factor are stretched by ``factor``, those shorter than
    original/high_freq_factor are left alone, and between the two the frequency is blended linearly in original/wavelength
    (``transformers.modeling_rope_utils``, ``llama3``).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = np.float32(2 * math.pi) / frequencies
    blend = scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor
    blend = np.clip(blend / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """A row of the table for each token. [V, D], [B, T] -> [B, T, D].

    Every device looks its part of the columns up for all rows of the batch, and what it found is exchanged after that. So the
    gradient of the table is made where it is stored; otherwise all of it would be summed over all devices.
    """
    return constrain(jnp.take(table, tokens, axis=0), "lookup", "time", "embed")


class SelfAttention(Adaptable):
    """Grouped-query attention with rotary positions. [B, T, D] -> [B, T, D]."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        init = normal(config.initializer_range)
        self.q = param(rngs, init, (D, N, H), ("embed", "heads", "head"))
        self.k = param(rngs, init, (D, K, H), ("embed", "kv_heads", "head"))
        self.v = param(rngs, init, (D, K, H), ("embed", "kv_heads", "head"))
        self.o = param(rngs, init, (N, H, D), ("heads", "head", "embed"))
        self.has_bias = config.attention_bias
        if self.has_bias:
            self.q_bias = param(rngs, zeros, (N, H), ("heads", "head"))
            self.k_bias = param(rngs, zeros, (K, H), ("kv_heads", "head"))
            self.v_bias = param(rngs, zeros, (K, H), ("kv_heads", "head"))

    def queries_keys_values(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H]; queries and keys rotated to their positions."""
        q = self.linear("q", x)
        k = self.linear("k", x)
        v = self.linear("v", x)
        if self.has_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def output(self, heads: jax.Array) -> jax.Array:
        return self.linear("o", heads, axes=2)


class FeedForward(Adaptable):
    """down(silu(gate(x)) · up(x)). [B, T, D] -> [B, T, D]."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        init = normal(config.initializer_range)
        self.gate = param(rngs, init, (D, F), ("embed", "ffn"))
        self.up = param(rngs, init, (D, F), ("embed", "ffn"))
        self.down = param(rngs, init, (F, D), ("ffn", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear("down", jax.nn.silu(self.linear("gate", x)) * self.linear("up", x))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind an RMSNorm and added to the residual."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        self.attention = SelfAttention(config, rngs)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        self.feed_forward = FeedForward(config, rngs)

    def finish(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        """Everything after the attention itself: residual x [B, T, D] and heads [B, T, N, H] -> [B, T, D]."""
        x = x + self.attention.output(heads)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return constrain(x, "batch", "time", "activation")


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class Llama(nnx.Module):
    """The language model: token ids to hidden states, hidden states to logits."""

    def __init__(self, config: LanguageModelConfig, rngs: nnx.Rngs):
        llama, rows = config.llama, config.padded_vocab_size
        init = normal(llama.initializer_range)
        self.config = config
        self.embedding = param(rngs, init, (rows, llama.hidden_size), ("vocab", "embed"))
        self.layers = stack_layers(lambda rngs: Block(llama, rngs), llama.num_hidden_layers, rngs)
        self.norm = RMSNorm(llama.hidden_size, llama.rms_norm_eps, rngs)
        if not llama.tie_word_embeddings:
            self.lm_head = param(rngs, init, (llama.hidden_size, rows), ("embed", "vocab"))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: Caches | None = None,
        remat: Remat = "none",
        backend: Backend = "xla",
    ) -> tuple[jax.Array, Caches | None]:
        """Runs the network up to its last norm.

        Args:
          tokens: int32 [B, T]; callers check on the host that every id is below ``vocab_size``.
          positions: int32 [B, T], each token's place in its own sequence (or segment), from 0.
          segment_ids: int32 [B, T] for packed rows: tokens attend only within equal ids. Not together with ``cache``; without
            both, a token sees all that stand before it in its row.
          cache: what earlier calls left; this call's keys and values are added at ``positions`` (those beyond the cache's
            length are dropped).
          remat: what the backward pass computes anew (``stack.scan_layers``).
          backend: of the attention (``attention.attend``); with a cache it is always XLA's.

        Returns:
          Hidden states [B, T, D] and the cache with this call's tokens (None without a cache).
        """
        assert cache is None or segment_ids is None, "packed rows and a cache do not go together"
        cos, sin = rotary_angles(positions, jnp.asarray(inverse_frequencies(self.config.llama)))
        x = constrain(embed(self.embedding[...], tokens), "batch", "time", "activation")
        if cache is None:
            x = self._layers(x, cos, sin, causal_segments(segment_ids), backend, remat)
        else:
            x, cache = self._cached_layers(x, cos, sin, positions, cache, remat)
        return self.norm(x), cache

    def _layers(self, x, cos, sin, mask, backend, remat):
        def layer(block, x, _):
            q, k, v = block.attention.queries_keys_values(block.attention_norm(x), cos, sin)
            return block.finish(x, attend(q, k, v, mask, backend)), None

        return scan_layers(self.layers, layer, x, remat=remat)[0]

    def _cached_layers(self, x, cos, sin, positions, cache, remat):
        mask = causal_to(positions)

        def layer(block, x, cache):
            q, k, v = block.attention.queries_keys_values(block.attention_norm(x), cos, sin)
            cache = cache.write(positions, k, v)
            return block.finish(x, attend(q, cache.k.astype(q.dtype), cache.v.astype(q.dtype), mask)), cache

        return scan_layers(self.layers, layer, x, cache, remat=remat)

    def init_cache(self, batch: int, length: int) -> Caches:
        """An empty cache for ``length`` positions, in the dtype that the model computes in and as its layers are kept."""
        llama, dtype = self.config.llama, self.embedding[...].dtype
        shape = (batch, length, llama.num_key_value_heads, llama.head_dim)
        if isinstance(self.layers, nnx.List):
            return [KVCache.empty(shape, dtype) for _ in self.layers]
        return KVCache.empty((llama.num_hidden_layers, *shape), dtype)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, cache: Caches, wanted: jax.Array | None = None
    ) -> tuple[jax.Array, Caches]:
        """Goes on from a cache.

        Args:
          tokens, positions, cache: as in ``__call__``.
          wanted: int32 [B, n], indices along T of the tokens whose logits are returned; None: all.

        Returns:
          float32 logits [B, n or T, V] and the new cache.
        """
        hidden, cache = self(tokens, positions, cache=cache)
        return self.logits(hidden if wanted is None else jnp.take_along_axis(hidden, wanted[..., None], axis=1)), cache

    def output_kernel(self) -> jax.Array:
        """What hidden states are multiplied by for logits, [D, V']; the padding rows' columns come last."""
        # A tied model whose matrices are quantised has a head of its own, since its embedding stays as it is.
        return self.lm_head[...] if hasattr(self, "lm_head") else self.embedding[...].T

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> float32 logits [B, T, V], padding rows left out."""
        out = project(hidden, self.output_kernel(), dtype=jnp.float32)
        return out[..., : self.config.llama.vocab_size]
