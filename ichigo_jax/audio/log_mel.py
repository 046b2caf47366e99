"""Whisper's log-mel front end, for a batch of clips of unequal length, in JAX.

Formulas: Radford et al. 2022 (https://arxiv.org/abs/2212.04356) as the package ``openai-whisper`` computes them
(``whisper.log_mel_spectrogram``, which follows ``torch.stft`` with ``center=True``), applied to each clip alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ichigo_jax.audio.decode import SAMPLE_RATE

WINDOW = 400  # samples that a frame sees
HOP = 160  # samples from frame to frame: 100 frames a second
PAD_VALUE = -1.5  # what silence comes out as, and what frames after the end of a clip hold

_SHORTEST = WINDOW // 2 + 1  # samples; reflection at the ends needs as many


def frame_count(length):
    """Frames of a clip of ``length`` samples; works on ints and arrays alike."""
    return length // HOP


@functools.partial(jax.jit, static_argnames=("mels", "frames"))
def log_mel(samples: jax.Array, lengths: jax.Array, *, mels: int, frames: int) -> jax.Array:
    """Log-mel spectrogram of each clip, as if it were computed alone.

    A clip shorter than 201 samples, which has too little to reflect, is taken as zero-padded to 201.

    Args:
      samples: float32 [B, S] at 16 kHz; what stands after a clip's length does not matter.
      lengths: int32 [B], samples of each clip, at most S.
      mels: number of filters M: 80, or 128 for large-v3.
      frames: T, frames to return; of a clip with more, the first.

    Returns:
      float32 [B, T, M]; ``PAD_VALUE`` from frame ``frame_count(length)`` on.
    """
    total = max(frames, frame_count(samples.shape[1]))  # the loudest frame may be one that is not returned
    span = (total + 2) * HOP  # covers every window, with a little over
    signal = jax.vmap(functools.partial(_reflect_ends, span=span))(samples, lengths)
    hops = signal.reshape(len(signal), total + 2, HOP)
    windows = jnp.concatenate([hops[:, :-2], hops[:, 1:-1], hops[:, 2:, : WINDOW - 2 * HOP]], axis=-1)  # [B, total, WINDOW]
    energies = jnp.dot(_power_spectrum(windows), _mel_filters(mels), precision=jax.lax.Precision.HIGHEST)
    logs = jnp.log10(jnp.maximum(energies, 1e-10))
    real = (jnp.arange(total) < frame_count(lengths)[:, None])[..., None]  # [B, total, 1]
    loudest = jnp.where(real, logs, -jnp.inf).max(axis=(1, 2), keepdims=True)
    return jnp.where(real, (jnp.maximum(logs, loudest - 8.0) + 4.0) / 4.0, PAD_VALUE)[:, :frames]


def _reflect_ends(clip: jax.Array, length: jax.Array, *, span: int) -> jax.Array:
    """The clip with half a window of its own reflection at both ends, cut or zero-padded to ``span``. [S] -> [span]."""
    edge = WINDOW // 2
    size = max(len(clip), _SHORTEST)
    clip = jnp.where(jnp.arange(len(clip)) < length, clip, 0.0)
    clip = jnp.pad(clip, (0, size - len(clip) + edge))
    length = jnp.maximum(length, _SHORTEST)
    tail = jax.lax.dynamic_slice(clip, (length - 1 - edge,), (edge,))[::-1]
    clip = jax.lax.dynamic_update_slice(clip, tail, (length,))
    signal = jnp.concatenate([clip[1 : edge + 1][::-1], clip])
    return jnp.pad(signal, (0, max(0, span - len(signal))))[:span]


def _power_spectrum(windows: jax.Array) -> jax.Array:
    """Squared magnitudes of the Hann-windowed Fourier transform. [B, T, WINDOW] -> [B, T, WINDOW // 2 + 1].

    Two matrix products, since XLA may gather a sharded batch on every device before an FFT. Around a window's middle
    cosines are even and sines odd, so the two halves are added or subtracted first, which halves the products. The Hann
    window is 0 at sample 0, which drops out.
    """
    middle = WINDOW // 2
    left, right = windows[..., 1:middle], windows[..., :middle:-1]
    even = jnp.concatenate([left + right, windows[..., middle : middle + 1]], axis=-1)
    cosines, sines = _fourier_basis()
    real = jnp.dot(even, cosines, precision=jax.lax.Precision.HIGHEST)
    imaginary = jnp.dot(left - right, sines, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(real) + jnp.square(imaginary)


@functools.cache
def _fourier_basis() -> tuple[np.ndarray, np.ndarray]:
    """Windowed cosines of samples 1 … middle and sines of samples 1 … middle - 1, a column for each frequency."""
    middle = WINDOW // 2
    sample = np.arange(1, middle + 1)[:, None]
    angle = 2 * np.pi * sample * np.arange(middle + 1) / WINDOW
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * sample / WINDOW)  # periodic
    return (hann * np.cos(angle)).astype(np.float32), (hann * np.sin(angle)).astype(np.float32)[:-1]


@functools.cache
def _mel_filters(mels: int) -> np.ndarray:
    """Slaney's filters: triangles of equal area whose corners are evenly spaced in mels, [WINDOW // 2 + 1, M].

    His mels are linear in frequency up to 1000 Hz, 15 of them, and logarithmic above, 27 to a factor of 6.4 (M. Slaney,
    Auditory Toolbox, 1998; ``librosa.filters.mel``, which takes seconds to import).
    """
    highest = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    corners = np.linspace(0, highest, mels + 2)
    corners = np.where(corners < 15, corners * 1000 / 15, 1000 * 6.4 ** ((corners - 15) / 27))
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    frequency = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    triangles = np.minimum((frequency - left) / (middle - left), (right - frequency) / (right - middle))
    return (np.maximum(triangles, 0) * 2 / (right - left)).astype(np.float32)
