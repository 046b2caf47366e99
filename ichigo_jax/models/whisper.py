"""Whisper (Radford et al. 2022, https://arxiv.org/abs/2212.04356) as the package ``openai-whisper`` computes it.

All released sizes are this code with other numbers. GELU is the exact (erf) one, keys have no bias, the output projection
is the token embedding. The blocks are also what the quantiser is built of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ichigo_jax.errors import InputError
from ichigo_jax.models.attention import CAUSAL, EVERYWHERE, Mask, attend, causal_to
from ichigo_jax.models.declare import Buffer, Initializer, fan_in_normal, linear_param, param, zeros
from ichigo_jax.models.kv_cache import KVCache
from ichigo_jax.models.linear import project
from ichigo_jax.models.norm import LayerNorm
from ichigo_jax.models.rotary import rotate
from ichigo_jax.models.stack import Remat, scan_layers, stack_layers
from ichigo_jax.parallel import constrain

MLP_MULT = 4
KERNEL = 3
LONGEST_WAVELENGTH = 10_000.0


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """OpenAI's dimensions (``whisper.model.ModelDimensions``) under OpenAI's names, and the LayerNorm epsilon.

    Attributes:
      n_mels: 80, or 128 for large-v3.
      n_audio_ctx: encoder positions, 50 a second; 1500 in the released models.
    """

    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_vocab: int
    n_text_ctx: int
    n_text_state: int
    n_text_head: int
    n_text_layer: int
    layer_norm_eps: float

    def __post_init__(self) -> None:
        for part in ("audio", "text"):
            state, head = getattr(self, f"n_{part}_state"), getattr(self, f"n_{part}_head")
            if state % head:
                raise InputError(f"n_{part}_state {state} found, expected a multiple of n_{part}_head {head}")
        if self.n_text_state != self.n_audio_state:
            raise InputError(f"n_text_state {self.n_text_state} found, expected n_audio_state, {self.n_audio_state}")


# ---- blocks ----------------------------------------------------------------------------------------------------------


class LinearInit(NamedTuple):
    """How the weights and biases of linear layers start, each given the layer's fan-in."""

    weight: Callable[[int], Initializer]
    bias: Callable[[int], Initializer]


WHISPER_INIT = LinearInit(weight=fan_in_normal, bias=lambda fan_in: zeros)


class MultiHeadAttention(nnx.Module):
    """Attention with projections; key without bias.

    Args:
      size: D.
      heads: N; the head size H is D / N.
      qk_scale: queries and keys are each multiplied by its square root, before any rotation.
    """

    def __init__(self, size: int, heads: int, qk_scale: float, init: LinearInit, rngs: nnx.Rngs):
        shape, axes = (size, heads, size // heads), ("embed", "heads", "head")
        self.query = linear_param(rngs, init.weight, size, shape, axes)
        self.query_bias = linear_param(rngs, init.bias, size, shape[1:], axes[1:])
        self.key = linear_param(rngs, init.weight, size, shape, axes)
        self.value = linear_param(rngs, init.weight, size, shape, axes)
        self.value_bias = linear_param(rngs, init.bias, size, shape[1:], axes[1:])
        self.out = linear_param(rngs, init.weight, size, (*shape[1:], size), ("heads", "head", "embed"))
        self.out_bias = linear_param(rngs, init.bias, size, (size,), ("bias",))
        self.scale = qk_scale**0.5

    def keys_values(self, x: jax.Array, angles: tuple[jax.Array, jax.Array] | None = None) -> KVCache:
        """What queries look at: [B, S, D] -> keys and values [B, S, N, H].

        Args:
          x: [B, S, D].
          angles: cosine and sine [B, S, H/2] of rotary positions, or None for no rotation.
        """
        k = project(x, self.key[...]) * self.scale
        v = project(x, self.value[...]) + self.value_bias[...]
        return KVCache(k if angles is None else rotate(k, *angles), v)

    def __call__(
        self,
        x: jax.Array,
        keys_values: KVCache,
        mask: Mask = EVERYWHERE,
        angles: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]; ``mask`` as in ``attend``, ``angles`` [B, T, H/2] for the queries."""
        q = (project(x, self.query[...]) + self.query_bias[...]) * self.scale
        if angles is not None:
            q = rotate(q, *angles)
        return project(attend(q, *keys_values, mask), self.out[...], axes=2) + self.out_bias[...]


class MLP(nnx.Module):
    """Two linear layers with an exact GELU between. [..., D] -> [..., D]."""

    def __init__(self, size: int, hidden: int, init: LinearInit, rngs: nnx.Rngs):
        self.up = linear_param(rngs, init.weight, size, (size, hidden), ("embed", "ffn"))
        self.up_bias = linear_param(rngs, init.bias, size, (hidden,), ("ffn",))
        self.down = linear_param(rngs, init.weight, hidden, (hidden, size), ("ffn", "embed"))
        self.down_bias = linear_param(rngs, init.bias, hidden, (size,), ("bias",))

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(project(x, self.up[...]) + self.up_bias[...], approximate=False)
        return project(hidden, self.down[...]) + self.down_bias[...]


class Conv(nnx.Module):
    """Convolution along time, kernel 3, padding 1. [B, T, D_in] -> [B, ceil(T / stride), D_out]."""

    def __init__(self, inputs: int, size: int, stride: int, axis: str, rngs: nnx.Rngs):
        self.kernel = param(rngs, fan_in_normal(KERNEL * inputs), (KERNEL, inputs, size), ("kernel", axis, "ffn"))
        self.bias = param(rngs, zeros, (size,), ("bias",))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        # One matrix product over the three shifted copies: on CPU its gradient is several times faster than a convolution's.
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        taps = [padded[:, tap : tap + x.shape[1] : self.stride] for tap in range(KERNEL)]
        kernel = self.kernel[...]
        return project(jnp.concatenate(taps, axis=-1), kernel.reshape(-1, kernel.shape[-1])) + self.bias[...]


class EncoderBlock(nnx.Module):
    """Pre-norm self-attention over all positions, then an MLP. [B, T, D] -> [B, T, D]."""

    def __init__(self, size: int, heads: int, hidden: int, qk_scale: float, eps: float, init: LinearInit, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(size, eps, rngs)
        self.attention = MultiHeadAttention(size, heads, qk_scale, init, rngs)
        self.mlp_norm = LayerNorm(size, eps, rngs)
        self.mlp = MLP(size, hidden, init, rngs)

    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        y = self.attention_norm(x)
        x = x + self.attention(y, self.attention.keys_values(y, angles), angles=angles)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "time", "activation")


class DecoderBlock(nnx.Module):
    """Pre-norm causal self-attention, cross-attention, MLP. [B, S, D] -> [B, S, D]."""

    def __init__(self, size: int, heads: int, eps: float, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(size, eps, rngs)
        self.attention = MultiHeadAttention(size, heads, 1.0, WHISPER_INIT, rngs)
        self.cross_attention_norm = LayerNorm(size, eps, rngs)
        self.cross_attention = MultiHeadAttention(size, heads, 1.0, WHISPER_INIT, rngs)
        self.mlp_norm = LayerNorm(size, eps, rngs)
        self.mlp = MLP(size, MLP_MULT * size, WHISPER_INIT, rngs)

    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: Mask, cross: KVCache, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache]:
        """Returns the block's output and the keys and values that self-attention looked at: the cache with x's written in."""
        y = self.attention_norm(x)
        keys_values = self.attention.keys_values(y)
        if cache is not None:
            keys_values = cache.write(positions, *keys_values)
        x = x + self.attention(y, keys_values, mask)
        # Several answers to one clip (beams) look at the same states: for them they are one row of as many queries.
        queries = self.cross_attention_norm(x).reshape(len(cross.k), -1, x.shape[-1])
        x = x + self.cross_attention(queries, cross).reshape(x.shape)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "time", "activation"), keys_values


# ---- encoder, decoder, model -----------------------------------------------------------------------------------------


def sinusoids(length: int, size: int) -> jax.Array:
    """Whisper's fixed encoder positions, sines in the first half and cosines in the second. -> [T, D] float32."""
    rates = np.exp(-np.log(LONGEST_WAVELENGTH) / (size // 2 - 1) * np.arange(size // 2))
    angles = np.arange(length)[:, None] * rates.astype(np.float32)
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)


class AudioEncoder(nnx.Module):
    """Log-mel spectrogram to states, two frames to one."""

    def __init__(self, config: WhisperConfig, rngs: nnx.Rngs):
        size, eps = config.n_audio_state, config.layer_norm_eps
        self.conv1 = Conv(config.n_mels, size, 1, "mels", rngs)
        self.conv2 = Conv(size, size, 2, "embed", rngs)
        self.positions = Buffer(sinusoids(config.n_audio_ctx, size), axes=("position", "embed"))

        def block(rngs: nnx.Rngs) -> EncoderBlock:
            return EncoderBlock(size, config.n_audio_head, MLP_MULT * size, 1.0, eps, WHISPER_INIT, rngs)

        self.blocks = stack_layers(block, config.n_audio_layer, rngs)
        self.norm = LayerNorm(size, eps, rngs)
        self.config = config

    def __call__(self, mel: jax.Array, remat: Remat = "none") -> jax.Array:
        """[B, 2·T, M] log-mel frames -> [B, T, D] states, T being ``n_audio_ctx``.

        Raises:
          InputError: another number of frames or mels than the configuration has.
        """
        expected = (2 * self.config.n_audio_ctx, self.config.n_mels)
        if mel.shape[1:] != expected:
            raise InputError(f"log-mel of {mel.shape[1:]} (frames, mels) found, expected {expected}; pad it with PAD_VALUE")
        x = mel.astype(self.conv1.kernel[...].dtype)
        x = jax.nn.gelu(self.conv1(x), approximate=False)
        x = jax.nn.gelu(self.conv2(x), approximate=False)
        x = constrain(x + self.positions[...].astype(x.dtype), "batch", "time", "activation")
        x, _ = scan_layers(self.blocks, lambda block, x, _: (block(x), None), x, remat=remat)
        return self.norm(x)


class TextDecoder(nnx.Module):
    """Text tokens and audio states to logits over the next token."""

    def __init__(self, config: WhisperConfig, rngs: nnx.Rngs):
        size, heads, eps = config.n_text_state, config.n_text_head, config.layer_norm_eps
        init = fan_in_normal(size)
        self.token_embedding = param(rngs, init, (config.n_vocab, size), ("vocab", "embed"))
        self.positions = param(rngs, init, (config.n_text_ctx, size), ("position", "embed"))
        self.blocks = stack_layers(lambda rngs: DecoderBlock(size, heads, eps, rngs), config.n_text_layer, rngs)
        self.norm = LayerNorm(size, eps, rngs)
        self.config = config

    def __call__(self, tokens: jax.Array, states: jax.Array, remat: Remat = "none") -> jax.Array:
        """Logits after every token of whole sequences.

        Args:
          tokens: [B, S] int32, S at most ``n_text_ctx``.
          states: [B, T, D], the encoder's or the quantiser's.
          remat: what the backward pass computes anew, see ``scan_layers``.

        Returns:
          [B, S, V] float32.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def layer(block: DecoderBlock, x: jax.Array, _: None):
            # The cross-attention's keys and values are made here, not ahead, so that a training step holds one layer's at a time.
            return block(x, positions, CAUSAL, block.cross_attention.keys_values(states), None)[0], None

        x, _ = scan_layers(self.blocks, layer, self._embed(tokens, positions), remat=remat)
        return self._logits(x)

    def prefill_cross(self, states: jax.Array) -> KVCache:
        """Every layer's cross-attention keys and values, once for all decoding steps. [B, T, D] -> [L, B, T, N, H] each."""
        _, cross = scan_layers(self.blocks, lambda block, _, __: (None, block.cross_attention.keys_values(states)), None)
        return cross

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty self-attention cache of ``length`` slots; slot i holds position i. [L, B, length, N, H] each."""
        layers, heads = self.config.n_text_layer, self.config.n_text_head
        shape = (layers, batch, length, heads, self.config.n_text_state // heads)
        dtype = self.token_embedding[...].dtype
        return KVCache.empty(shape, dtype)

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cross: KVCache,
        cache: KVCache,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Goes on from a cache.

        Args:
          tokens: [B, S] int32.
          positions: [B, S] int32, each token's position, which is also the cache slot it is written to.
          cross: from ``prefill_cross``; of fewer rows than B, where each is of B / rows consecutive rows of tokens.
          cache: from ``init_cache`` or the previous call; all positions before each token's must have been written.
          wanted: [B, n] int32, indices along S of the tokens whose logits are returned; None: all.

        Returns:
          [B, n or S, V] float32 logits and the new cache.
        """
        mask = causal_to(positions)

        def layer(block: DecoderBlock, x: jax.Array, kept: tuple[KVCache, KVCache]):
            return block(x, positions, mask, *kept)

        x, cache = scan_layers(self.blocks, layer, self._embed(tokens, positions), (cross, cache))
        return self._logits(x if wanted is None else jnp.take_along_axis(x, wanted[..., None], axis=1)), cache

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.token_embedding[...][tokens] + self.positions[...][positions]
        return constrain(x, "batch", "time", "activation")

    def _logits(self, x: jax.Array) -> jax.Array:
        return project(self.norm(x), self.token_embedding[...].T).astype(jnp.float32)


class Whisper(nnx.Module):
    """``encoder``: log-mel to states; ``decoder``: tokens and states to logits."""

    def __init__(self, config: WhisperConfig, rngs: nnx.Rngs):
        self.encoder = AudioEncoder(config, rngs)
        self.decoder = TextDecoder(config, rngs)
        self.config = config
