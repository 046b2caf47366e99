"""The vector-quantised bottleneck between Whisper's encoder and decoder (WhisperSpeech, Ichigo).

Formulas: ``ichigo.asr.arch.quantizer`` (inference), ``ichigo_asr.models.vq_transformer`` (training) and the cosine-similarity
codebook of ``vector-quantize-pytorch==1.6.22``, with residual quantisers as in SoundStream (https://arxiv.org/abs/2107.03312);
finite scalar quantisation instead of a codebook is that of Mentzer et al. 2023 (https://arxiv.org/abs/2309.15505).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ichigo_jax.errors import InputError
from ichigo_jax.models.declare import Buffer, fan_in_normal, linear_param, param, truncated_normal
from ichigo_jax.models.norm import LayerNorm
from ichigo_jax.models.rotary import rotary_angles
from ichigo_jax.models.stack import Remat, scan_layers, stack_layers
from ichigo_jax.models.whisper import MLP, Conv, EncoderBlock, LinearInit

SMALLEST_NORM = 1e-12  # below it torch.nn.functional.normalize divides by this instead
FSQ_MARGIN = 1e-3  # by this share the bounded values reach past the outermost levels
QK_SCALE = 8.0  # times query_mult / sqrt(head_width): 1 at query_mult 1 and a head of 64


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """Every number of the bottleneck, under the originals' names where they have one.

    Attributes:
      n_head: attention heads N; the width D is ``n_head * head_width`` and must be Whisper's.
      depth: transformer blocks after the codes.
      vq_codes: codes a quantiser has, the mask code not counted.
      mask_code: index of the code that stands for "no audio here" (``vq_codes``, but 2048 in the merged 2560-code model);
        None for the oldest models, which have no such code.
      num_quantizers: Q, residual quantisers one after the other.
      fsq_levels: finite scalar quantisation in place of a codebook: how many values each of ``codebook_dim`` numbers takes,
        ``vq_codes`` combinations in all; the codebook's and the commitment's numbers then have no effect. None: a codebook.
      downsample: encoder states to one code.
      positions: T, encoder states of a full context.
      codebook_decay: of the moving averages of cluster sizes and sums.
      threshold_ema_dead_code: codes whose average cluster size is below it are re-seeded from the batch; 0 is never.
      statistics_over: which frames count for the codebook's statistics and the commitment: "all_frames", padding too, as in
        the originals, or "audio_frames" alone; then the mask code is kept for padding, no audio is given it and it stays
        where it began.
      init_std: linear layers start from a normal of ``init_std / fan_in``, cut at three of these.
      embeddings_std: the same for the learned positions.
    """

    n_head: int
    head_width: int
    ffn_mult: int
    depth: int
    vq_codes: int
    mask_code: int | None
    num_quantizers: int
    fsq_levels: tuple[int, ...] | None
    codebook_dim: int
    downsample: int
    downsampling: Literal["mean", "stride", "conv"]
    positions: int
    codebook_decay: float
    threshold_ema_dead_code: float
    laplace_eps: float
    commitment_weight: float
    statistics_over: Literal["all_frames", "audio_frames"]
    query_mult: float
    rope: bool
    rope_base: float
    layer_norm_eps: float
    init_std: float
    embeddings_std: float

    def __post_init__(self) -> None:
        if self.positions % self.downsample:
            raise InputError(f"positions {self.positions} found, expected a multiple of downsample {self.downsample}")
        if self.mask_code is not None and not 0 <= self.mask_code < self.codes:
            raise InputError(f"mask_code {self.mask_code} found, expected 0 to {self.codes - 1} (vq_codes {self.vq_codes} + 1)")
        if self.codebook_dim == self.width:
            raise InputError(f"codebook_dim {self.codebook_dim} found, expected another size than the width: codes are projected")
        if self.fsq_levels is not None:
            self._check_fsq(self.fsq_levels)

    def _check_fsq(self, levels: tuple[int, ...]) -> None:
        if min(levels, default=0) < 3:
            raise InputError(f"fsq_levels {levels} found, expected numbers of at least 3: two levels saturate")
        found = (self.codebook_dim, self.vq_codes, self.num_quantizers)
        expected = (len(levels), math.prod(levels), 1)
        if found != expected or self.mask_code not in (None, self.vq_codes):
            raise InputError(
                f"(codebook_dim, vq_codes, num_quantizers) {found} and mask_code {self.mask_code} found, "
                f"expected {expected} and {expected[1]} or None with fsq_levels {levels}"
            )

    @property
    def width(self) -> int:
        """D."""
        return self.n_head * self.head_width

    @property
    def codes(self) -> int:
        """C, rows of a codebook: the mask code counted."""
        return self.vq_codes + (self.mask_code is not None)

    @property
    def reserved_code(self) -> int | None:
        """The code that no audio is given, where there is one."""
        return self.mask_code if self.statistics_over == "audio_frames" else None

    @property
    def code_positions(self) -> int:
        """Codes of a full context."""
        return self.positions // self.downsample


class QuantizerOutput(NamedTuple):
    """What a pass through the bottleneck gives.

    Attributes:
      states: [B, T, D], in place of the encoder's for the decoder.
      codes: [B, T / downsample, Q] int32.
      commitment: float32 scalar, mean over the quantisers, ``commitment_weight`` included.
    """

    states: jax.Array
    codes: jax.Array
    commitment: jax.Array


def l2_normalize(x: jax.Array) -> jax.Array:
    """Unit vectors along the last axis; shorter ones than 1e-12 are divided by that."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, SMALLEST_NORM**2))


def inverse_frequencies(config: QuantizerConfig) -> np.ndarray:
    """Rotary [H/2] float32, rounded where the original rounds: at position 1500 one unit in the last place shows."""
    exponents = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
    return np.float32(1.0) / (config.rope_base ** exponents.astype(np.float64)).astype(np.float32)


class Codebook(nnx.Module):
    """Q codebooks of unit vectors that follow the data by moving averages; float32 whatever the parameters are.

    Buffers:
      embed: [Q, C, d] the codes.
      cluster_size: [Q, C] moving average of how many vectors a batch gives each code.
      embed_avg: [Q, C, d] moving average of these vectors' sums.
      initted: [Q] ones; never read here, kept so that export gives back what import found.
    """

    def __init__(self, config: QuantizerConfig, rngs: nnx.Rngs):
        Q, C, d = config.num_quantizers, config.codes, config.codebook_dim
        embed = l2_normalize(jax.random.uniform(rngs.params(), (Q, C, d), jnp.float32, -1.0, 1.0))
        self.embed = Buffer(embed, axes=("quantizers", "codes", "code"))
        self.cluster_size = Buffer(jnp.zeros((Q, C)), axes=("quantizers", "codes"))
        # A copy: two buffers that share one array could not both be donated to a training step.
        self.embed_avg = Buffer(jnp.copy(embed), axes=("quantizers", "codes", "code"))
        self.initted = Buffer(jnp.ones((Q,)), axes=("quantizers",))
        self.config = config

    def nearest(self, q: int, z: jax.Array) -> jax.Array:
        """Index of the code with the largest dot product. [B, T, d] unit vectors -> [B, T] int32."""
        similarity = jnp.einsum("btd,cd->btc", z, self.embed[...][q], precision="highest")
        if self.config.reserved_code is not None:
            similarity = similarity.at[..., self.config.reserved_code].set(-jnp.inf)
        return jnp.argmax(similarity, axis=-1).astype(jnp.int32)

    def lookup(self, q: int, codes: jax.Array) -> jax.Array:
        """[...] int32 -> [..., d]."""
        return self.embed[...][q][codes]

    def update(self, q: int, z: jax.Array, codes: jax.Array, valid: jax.Array, key: jax.Array | None) -> None:
        """Moves codebook ``q`` towards one (global) batch, in place.

        Args:
          q: which codebook.
          z: [B, T, d] unit vectors.
          codes: [B, T] the codes that they were given.
          valid: [B, T] bool, the vectors that count.
          key: for re-seeding; needed where ``threshold_ema_dead_code`` is above 0.
        """
        config = self.config
        members = jax.nn.one_hot(codes, config.codes) * valid[..., None]
        sums = jnp.einsum("btd,btc->cd", z, members, precision="highest")
        rate = 1.0 - config.codebook_decay
        size, average = self.cluster_size[...][q], self.embed_avg[...][q]
        size = size + rate * (members.sum((0, 1)) - size)
        average = average + rate * (sums - average)

        total = size.sum()
        smooth_size = (size + config.laplace_eps) / (total + config.codes * config.laplace_eps) * total
        # Twice, as the package does: the averages of codes long unused are so small that once gives no unit vector.
        embed = l2_normalize(l2_normalize(average / smooth_size[:, None]))

        if config.threshold_ema_dead_code > 0:
            dead = size < config.threshold_ema_dead_code
            seeds = self._seeds(z, dead, valid, key)
            embed = jnp.where(dead[:, None], seeds, embed)
            average = jnp.where(dead[:, None], seeds * config.threshold_ema_dead_code, average)
            size = jnp.where(dead, config.threshold_ema_dead_code, size)

        for buffer, value in ((self.embed, embed), (self.embed_avg, average), (self.cluster_size, size)):
            if config.reserved_code is not None:
                value = value.at[config.reserved_code].set(buffer[...][q, config.reserved_code])
            buffer[...] = buffer[...].at[q].set(value)

    def _seeds(self, z: jax.Array, dead: jax.Array, valid: jax.Array, key: jax.Array | None) -> jax.Array:
        """A vector of the batch for each dead code: no vector twice as long as there are enough. -> [C, d]."""
        if key is None:
            raise ValueError("threshold_ema_dead_code is above 0: update needs a random key")
        z, valid = z.reshape(-1, z.shape[-1]), valid.reshape(-1)
        shuffled = jnp.argsort(jnp.where(valid, jax.random.uniform(key, valid.shape), jnp.inf))
        rank = jnp.cumsum(dead) - 1
        return z[shuffled[rank % jnp.maximum(valid.sum(), 1)]]


class ResidualVQ(nnx.Module):
    """Q quantisers, each with its projections to and from its codes; each quantises what those before it left over."""

    def __init__(self, config: QuantizerConfig, init: LinearInit, rngs: nnx.Rngs):
        Q, D, d = config.num_quantizers, config.width, config.codebook_dim
        self.project_in = linear_param(rngs, init.weight, D, (Q, D, d), ("quantizers", "embed", "code"))
        self.project_in_bias = linear_param(rngs, init.bias, D, (Q, d), ("quantizers", "code"))
        self.project_out = linear_param(rngs, init.weight, d, (Q, d, D), ("quantizers", "code", "embed"))
        self.project_out_bias = linear_param(rngs, init.bias, d, (Q, D), ("quantizers", "bias"))
        self.codebook = Codebook(config, rngs)
        self.config = config

    def __call__(
        self, x: jax.Array, valid: jax.Array, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Quantises, with the codebook as it was before this batch moves it.

        Args:
          x: [B, T, D].
          valid: [B, T] bool, the vectors that count for statistics and commitment.
          train: whether the codebook's buffers are updated.
          key: see ``Codebook.update``.

        Returns:
          [B, T, D] quantised, whose gradient passes straight through to the normalised projection; [B, T, Q] int32 codes;
          the commitment loss.
        """
        residual, quantized, codes, commitments = x, jnp.zeros_like(x), [], []
        weight = valid[..., None] / (jnp.maximum(valid.sum(), 1) * self.config.codebook_dim)
        for q in range(self.config.num_quantizers):
            z = self._project(q, residual)
            code = self.codebook.nearest(q, z)
            embedded = self.codebook.lookup(q, code)
            commitments.append((jnp.square(z - jax.lax.stop_gradient(embedded)) * weight).sum())
            if train:
                layer_key = None if key is None else jax.random.fold_in(key, q)
                self.codebook.update(q, jax.lax.stop_gradient(z), code, valid, layer_key)
            out = self._project_out(q, z + jax.lax.stop_gradient(embedded - z))
            residual = residual - jax.lax.stop_gradient(out)
            quantized = quantized + out
            codes.append(code)
        commitment = self.config.commitment_weight * jnp.stack(commitments).mean()
        return quantized, jnp.stack(codes, axis=-1), commitment

    def decode(self, codes: jax.Array) -> jax.Array:
        """What codes stand for: [..., Q] int32 -> [..., D]."""
        return sum(self._project_out(q, self.codebook.lookup(q, codes[..., q])) for q in range(self.config.num_quantizers))

    def projections(self, x: jax.Array) -> jax.Array:
        """What the first quantiser compares with its codes: [B, T, D] -> unit vectors [B, T, d], float32."""
        return self._project(0, x)

    def _project(self, q: int, x: jax.Array) -> jax.Array:
        """[B, T, D] -> unit vectors [B, T, d], float32."""
        z = jnp.einsum("btd,dc->btc", x, self.project_in[...][q], preferred_element_type=jnp.float32)
        return l2_normalize(z + self.project_in_bias[...][q].astype(jnp.float32))

    def _project_out(self, q: int, z: jax.Array) -> jax.Array:
        """[..., d] -> [..., D]."""
        kernel = self.project_out[...][q]
        return z.astype(kernel.dtype) @ kernel + self.project_out_bias[...][q]


class FiniteScalarQuantizer(nnx.Module):
    """Finite scalar quantisation: a few numbers, each bounded and rounded to its levels; a code counts their combinations.

    With levels (4, 3) the codes 0, 1, … 11 are the roundings (-2, -1), (-1, -1), (0, -1), (1, -1), (-2, 0), … (1, 1). The mask
    code, which follows them, stands for numbers of its own that are learned.
    """

    def __init__(self, config: QuantizerConfig, init: LinearInit, rngs: nnx.Rngs):
        D, d = config.width, config.codebook_dim
        # Whisper's states are of size 1: from a smaller start than this all of them would be rounded to the same code.
        self.project_in = linear_param(rngs, fan_in_normal, D, (D, d), ("embed", "code"))
        self.project_in_bias = linear_param(rngs, init.bias, D, (d,), ("code",))
        self.project_out = linear_param(rngs, init.weight, d, (d, D), ("code", "embed"))
        self.project_out_bias = linear_param(rngs, init.bias, d, (D,), ("bias",))
        if config.mask_code is not None:
            self.mask = param(rngs, truncated_normal(config.embeddings_std), (d,), ("code",))
        self.config = config
        self.levels = config.fsq_levels

    def __call__(
        self, x: jax.Array, valid: jax.Array, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As ``ResidualVQ``; there is nothing to update and nothing to commit to."""
        bounded = self.projections(x)
        rounded = jnp.round(bounded)
        half = np.array(self.levels) // 2
        codes = ((rounded + half) * self._place_values()).sum(-1).astype(jnp.int32)
        straight_through = bounded + jax.lax.stop_gradient(rounded - bounded)
        return self._project_out(straight_through / half), codes[..., None], jnp.zeros((), jnp.float32)

    def decode(self, codes: jax.Array) -> jax.Array:
        """What codes stand for: [..., 1] int32 -> [..., D]."""
        levels = np.array(self.levels)
        values = (codes // self._place_values() % levels - levels // 2) / (levels // 2)
        if self.config.mask_code is not None:
            values = jnp.where(codes == self.config.mask_code, self.mask[...].astype(jnp.float32), values)
        return self._project_out(values)

    def projections(self, x: jax.Array) -> jax.Array:
        """What is rounded: [B, T, D] -> [B, T, d] float32, number i between -levels[i] // 2 and (levels[i] - 1) // 2."""
        z = jnp.einsum("btd,dc->btc", x, self.project_in[...], preferred_element_type=jnp.float32)
        z = z + self.project_in_bias[...].astype(jnp.float32)
        levels = np.array(self.levels)
        reach = (levels - 1) * (1 + FSQ_MARGIN) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)  # an even number of levels has one more below 0 than above
        return jnp.tanh(z + np.arctanh(offset / reach)) * reach - offset

    def _place_values(self) -> np.ndarray:
        """By how much a code grows with a step of each number: levels (4, 3) -> [1, 4]."""
        return np.cumprod([1, *self.levels[:-1]])

    def _project_out(self, values: jax.Array) -> jax.Array:
        """[..., d] -> [..., D]."""
        kernel = self.project_out[...]
        return values.astype(kernel.dtype) @ kernel + self.project_out_bias[...]


class Quantizer(nnx.Module):
    """Encoder states to codes, and codes to states for the decoder."""

    def __init__(self, config: QuantizerConfig, rngs: nnx.Rngs):
        D, eps = config.width, config.layer_norm_eps
        scaled = lambda fan_in: truncated_normal(config.init_std / fan_in)  # noqa: E731
        init = LinearInit(weight=scaled, bias=scaled)
        if config.downsampling == "conv":
            self.downsample_conv = Conv(D, D, config.downsample, "embed", rngs)
        self.mlp_norm = LayerNorm(D, eps, rngs)
        self.mlp = MLP(D, config.ffn_mult * D, init, rngs)
        self.vq = (ResidualVQ if config.fsq_levels is None else FiniteScalarQuantizer)(config, init, rngs)
        self.positions = param(rngs, truncated_normal(config.embeddings_std), (config.positions, D), ("position", "embed"))
        qk_scale = config.query_mult * QK_SCALE / config.head_width**0.5

        def block(rngs: nnx.Rngs) -> EncoderBlock:
            return EncoderBlock(D, config.n_head, config.ffn_mult * D, qk_scale, eps, init, rngs)

        self.blocks = stack_layers(block, config.depth, rngs)
        self.norm = LayerNorm(D, eps, rngs)
        self.config = config

    def __call__(
        self,
        states: jax.Array,
        frame_mask: jax.Array | None,
        train: bool,
        key: jax.Array | None,
        remat: Remat = "none",
    ) -> QuantizerOutput:
        """The whole bottleneck, as in training.

        With ``train`` the codebook's buffers move in place, over the global batch when it is sharded under ``jax.jit``; the
        output is made with the codes as they were, but the mask code as it is afterwards, as in the original.

        Args:
          states: [B, T, D] of the encoder.
          frame_mask: [B, T] bool, True where there is audio; elsewhere the mask code takes the states' place. None: all audio.
          train: whether to update the codebook.
          key: random key for re-seeding dead codes; needed in training where ``threshold_ema_dead_code`` is above 0.
          remat: what the backward pass computes anew, see ``scan_layers``.
        """
        config = self.config
        x = self._downsample(states)
        valid = jnp.ones(x.shape[:2], bool)
        if frame_mask is not None and config.statistics_over == "audio_frames":
            valid = frame_mask.reshape(*valid.shape, config.downsample).all(-1)
        x, codes, commitment = self.vq(x, valid, train, key)
        x = jnp.repeat(x, config.downsample, axis=1)
        if frame_mask is not None and config.mask_code is not None:
            x = jnp.where(frame_mask[..., None], x, self.vq.decode(jnp.full((config.num_quantizers,), config.mask_code)))
        return QuantizerOutput(self._contextualize(x, remat), codes, commitment)

    def codes(self, states: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T / downsample, Q] int32."""
        x = self._downsample(states)
        return self.vq(x, jnp.ones(x.shape[:2], bool), train=False, key=None)[1]

    def projections(self, states: jax.Array) -> jax.Array:
        """What becomes the (first) code: [B, T, D] -> [B, T / downsample, codebook_dim] float32."""
        return self.vq.projections(self._downsample(states))

    def dequantize(self, codes: jax.Array) -> jax.Array:
        """States for the decoder; fewer codes than a full context's are filled up with the mask code (0 where there is none).

        [B, at most T / downsample, Q] int32 -> [B, T, D].

        Raises:
          InputError: more codes than a context holds.
        """
        missing = self.config.code_positions - codes.shape[1]
        if missing < 0:
            raise InputError(f"{codes.shape[1]} codes found, expected at most {self.config.code_positions} (one context)")
        codes = jnp.pad(codes, ((0, 0), (0, missing), (0, 0)), constant_values=self.config.mask_code or 0)
        return self._contextualize(jnp.repeat(self.vq.decode(codes), self.config.downsample, axis=1), "none")

    def _downsample(self, states: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T / downsample, D], ready to be quantised."""
        B, T, D = states.shape
        if (T, D) != (self.config.positions, self.config.width):
            raise InputError(f"states of {(T, D)} (time, width) found, expected {(self.config.positions, self.config.width)}")
        step = self.config.downsample
        if self.config.downsampling == "mean":
            x = states.reshape(B, T // step, step, D).mean(2)
        else:
            x = states[:, ::step]
        if self.config.downsampling == "conv":
            x = x + self.downsample_conv(states)
        return x + self.mlp(self.mlp_norm(x))

    def _contextualize(self, x: jax.Array, remat: Remat) -> jax.Array:
        """Positions, transformer blocks and the last norm. [B, T, D] -> [B, T, D]."""
        config = self.config
        angles = None
        if config.rope:
            angles = rotary_angles(jnp.arange(config.positions)[None], inverse_frequencies(config))
        x = x + self.positions[...]
        x, _ = scan_layers(self.blocks, lambda block, x, _: (block(x, angles), None), x, remat=remat)
        return self.norm(x)
