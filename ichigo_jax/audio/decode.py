"""Audio files to 16 kHz mono samples, bounded before they are decoded whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

from ichigo_jax.errors import InputError

SAMPLE_RATE = 16000
LOUDEST = 100.0  # times full scale: what is louder are integers that nobody scaled, and their log-mel would overflow

_BLOCK_FRAMES = 1 << 16
_UNKNOWN_FRAMES = (1 << 63) - 1  # what libsndfile says of a flac stream whose header has no length
_TOLERATED = 0.05  # of the frames may be missing, of the bytes left over: mp3 headers estimate, and tags come last
_TAG_BYTES = 512  # may be left over anyway


class AudioError(InputError):
    """A clip that cannot be used; the message names it. Corpora record such a clip and skip it."""


def load_audio(path: str | os.PathLike, max_seconds: float, max_bytes: int) -> np.ndarray:
    """Decodes a wav, flac, mp3 or ogg file of any rate, sample width and number of channels.

    Channels are averaged, then the rate is changed (soxr, high quality) where it is not 16 kHz already. Integer samples
    come out in [-1, 1]; float files keep what they hold, as resampling keeps its small overshoots: nothing is clipped,
    and a constant offset (DC) stays.

    Args:
      path: the file.
      max_seconds: the longest clip that is decoded.
      max_bytes: the most that decoding may produce: frames × channels × 4 bytes, and 4 bytes a sample at 16 kHz.
        Both bounds are checked on the header and, should more come than it announces, again while blocks are read.

    Returns:
      float32 [T] at 16 kHz, T ≥ 1, all finite.

    Raises:
      AudioError: no such file, not audio, empty, over a bound, samples that are not finite; or a length in the header
        that does not fit the file, which would lose sound silently (shown by flac, mp3 and ogg; a wav file is read as
        far as it goes).
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: {'found a folder' if path.is_dir() else 'no such file'}, expected an audio file")
    try:
        # By its descriptor: a file object would be read through Python, which takes most of a short file's time.
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as source:
            samples, rate = _read_mono(source, path, max_seconds, max_bytes), source.samplerate
            size = path.stat().st_size
            unread = size - os.lseek(file.fileno(), 0, os.SEEK_CUR)
            if source.format in ("MP3", "OGG", "FLAC") and unread > _TAG_BYTES + _TOLERATED * size:
                raise AudioError(
                    f"{path}: found {unread} bytes after the {source.frames} frames of its header, expected none; encode it again"
                )
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless formats, such as .raw
        reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
        raise AudioError(f"{path}: found no audio that can be decoded ({reason}), expected wav, flac, mp3 or ogg") from None
    check_clip(samples, str(path))  # before resampling, which would smear one NaN over the clip
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    return check_clip(samples, str(path))


def check_clip(samples: np.ndarray, name: str) -> np.ndarray:
    """Checks a clip that was handed in as an array.

    Args:
      samples: [T] at 16 kHz, floats in [-1, 1].
      name: how to call the clip in an error.

    Returns:
      the samples as float32 [T].

    Raises:
      AudioError: not one-dimensional, empty, not floats, not finite, or far out of [-1, 1].
    """
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise AudioError(f"{name}: found an array of shape {samples.shape}, expected [T]; average the channels first")
    if samples.size == 0:
        raise AudioError(f"{name}: found no samples, expected at least one; leave empty clips out")
    if not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(
            f"{name}: found samples of type {samples.dtype}, expected floats in [-1, 1]; divide int16 samples by 32768"
        )
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is refused below
        samples = samples.astype(np.float32, copy=False)
    bad = samples.size - np.count_nonzero(np.isfinite(samples))
    if bad:
        raise AudioError(f"{name}: found {bad} samples that are NaN or infinite, expected finite ones; repair or drop the clip")
    peak = np.abs(samples).max()
    if peak > LOUDEST:
        raise AudioError(f"{name}: found a sample of size {peak:g}, expected [-1, 1]; divide 16-bit samples by 32768")
    return samples


def _read_mono(source: soundfile.SoundFile, path: Path, max_seconds: float, max_bytes: int) -> np.ndarray:
    """Reads block by block and averages the channels: float32 [T] at the file's own rate."""
    rate, channels = source.samplerate, source.channels
    if source.frames == _UNKNOWN_FRAMES:
        raise AudioError(f"{path}: found no length in the header, expected the number of frames; encode it again")
    _check_bounds(source.frames, rate, channels, path, max_seconds, max_bytes)
    blocks, frames = [], 0
    while len(block := source.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
        frames += len(block)
        _check_bounds(frames, rate, channels, path, max_seconds, max_bytes)
        blocks.append(block.mean(axis=1))
    if frames < (1 - _TOLERATED) * source.frames:
        raise AudioError(f"{path}: found {frames} frames, expected the {source.frames} of its header; the file is cut short")
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _check_bounds(frames: int, rate: int, channels: int, path: Path, max_seconds: float, max_bytes: int) -> None:
    seconds = frames / rate
    if seconds > max_seconds:
        raise AudioError(
            f"{path}: found {seconds:.1f} s of audio, expected at most {max_seconds:g} s; split it or raise the bound"
        )
    size = max(4 * frames * channels, int(4 * seconds * SAMPLE_RATE))
    if size > max_bytes:
        raise AudioError(f"{path}: found {size} bytes once decoded, expected at most {max_bytes}; split it or raise the bound")
