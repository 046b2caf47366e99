"""Audio files to 16 kHz mono samples, bounded before they are decoded whole."""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import warnings
from itertools import groupby

import numpy as np
import soundfile
import soxr

from ichigo_jax.audio.containers import Damage, Part, PartFile, SourceFile, Unsupported, find_sound
from ichigo_jax.audio.faults import AudioError, AudioWarning

__all__ = ["SAMPLE_RATE", "AudioError", "AudioWarning", "check_clip", "load_audio"]

SAMPLE_RATE = 16000
LOUDEST = 100.0  # times full scale: what is louder are integers that nobody scaled, and their log-mel would overflow

_BLOCK_FRAMES = 1 << 16
_BUFFER = 1 << 16  # bytes
_UNKNOWN_FRAMES = (1 << 63) - 1  # what libsndfile says of a stream whose header has no length
_READABLE = "expected wav, flac, mp3 or ogg"

# The mean of n uncorrelated channels keeps 1/n of their mean energy. Of a block whose channels cancel it keeps less than a
# tenth of that, and if such blocks have a tenth of the clip's energy, a part of what is said may be lost.
_CANCELLED, _WORTH_A_WARNING = 0.1, 0.1
_SILENCE = 1e-8  # mean square (-80 dB) of a block with nothing to lose


def load_audio(path: str | os.PathLike, max_seconds: float, max_bytes: int) -> np.ndarray:
    """Decodes a wav, flac, mp3 or ogg file of any rate, sample width and number of channels.

    Channels are averaged, then the rate is changed (soxr, high quality) where it is not 16 kHz already. Integer samples
    come out in [-1, 1]; float files keep what they hold, as resampling keeps its small overshoots: nothing is clipped,
    and a constant offset (DC) stays.

    The file is decoded to its last byte, whatever its header says (``audio.containers``): all links of a chained ogg file,
    all files of one format that were joined, whatever their rates, and the sound behind a length that is too small, zero or
    a placeholder. A file with less sound than its header tells of was cut and is refused. Where sound may be missing but
    nobody can know, the file is decoded with a warning: an ogg stream without a page that ends it (a recorder that was
    switched off, or a file that was cut exactly between two pages), ogg pages whose numbers leave some out, and an mp3 file
    that ends within a frame and does not tell how many it had.

    Args:
      path: the file.
      max_seconds: the longest clip that is decoded.
      max_bytes: the most that decoding may produce: frames × channels × 4 bytes, and 4 bytes a sample at 16 kHz.
        Both bounds hold for all parts together. They are checked on headers and, should more come than those announce,
        again while blocks are read.

    Returns:
      float32 [T] at 16 kHz, T ≥ 1, all finite.

    Raises:
      AudioError: no such file, not audio, empty, cut short, over a bound, or samples that are not finite.

    Warns:
      AudioWarning: sound may be missing (see above), or channels cancel each other in the mean, as when one is inverted.
    """
    path = os.fspath(path)
    try:
        mode = _mode(path)
        if not stat.S_ISREG(mode):
            found = "a folder" if stat.S_ISDIR(mode) else "something else"
            raise AudioError(f"{path}: found {found}, expected an audio file")
        with open(path, "rb", buffering=0) as file:
            return _decode(SourceFile(file.fileno()), path, max_seconds, max_bytes)
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file, expected an audio file") from None
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror}), expected an audio file") from None


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


def _mode(path: str) -> int:
    """What kind of file it is, and who may read it."""
    try:
        return os.stat(path).st_mode
    except ValueError as error:  # a name that no file can have
        raise AudioError(f"{path!r}: cannot be read ({error}), expected an audio file") from None


def _decode(source: SourceFile, path: str, max_seconds: float, max_bytes: int) -> np.ndarray:
    """All parts of a file, float32 [T] at 16 kHz."""
    bounds, phase = _Bounds(path, max_seconds, max_bytes), _Phase()
    try:
        sound = find_sound(source)
        parts = [_read_part(source, part, bounds, phase) for part in sound.parts]
    except Unsupported as error:
        raise AudioError(f"{path}: found {error}, which is not read here, {_READABLE}; convert it first") from None
    except Damage as error:
        raise AudioError(f"{path}: {error}") from None
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless formats, such as .raw
        raise AudioError(f"{path}: found no audio that can be decoded ({_reason(error)}), {_READABLE}") from None
    for doubt in [*(f"{doubt}; sound may be missing" for doubt in sound.doubts), *phase.doubts()]:
        warnings.warn(f"{path}: found {doubt}", AudioWarning, stacklevel=3)
    # Parts of one rate are resampled together, so that nothing is heard where they meet.
    stretches = [(rate, _joined([block for _, blocks in group for block in blocks])) for rate, group in groupby(parts, _rate)]
    if len(stretches) > 1:
        stretches = [(rate, samples) for rate, samples in stretches if samples.size]
    return check_clip(_joined([_at_16_khz(samples, rate, path) for rate, samples in stretches]), path)


def _reason(error: Exception) -> str:
    """In libsndfile's words."""
    return getattr(error, "error_string", str(error)).strip().rstrip(".").removeprefix("Error : ")


def _rate(part: tuple[int, list[np.ndarray]]) -> int:
    return part[0]


def _joined(blocks: list[np.ndarray]) -> np.ndarray:
    if len(blocks) == 1:
        return blocks[0]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _at_16_khz(samples: np.ndarray, rate: int, path: str) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return samples
    return soxr.resample(check_clip(samples, path), rate, SAMPLE_RATE, quality="HQ")  # one NaN would be smeared over the clip


class _Stream(soundfile.SoundFile):
    """A file that is read from its start to its end.

    ``SoundFile`` seeks to where it stands after every block. A FLAC stream without a length fails at that, and the mp3 decoder
    loses what it needs of the frames before and complains on standard error.
    """

    def seekable(self) -> bool:
        return False


def _read_part(source: SourceFile, part: Part, bounds: _Bounds, phase: _Phase) -> tuple[int, list[np.ndarray]]:
    """The rate of a part and its blocks, with channels averaged, float32 [T] each.

    Raises:
      Damage: fewer frames than its header tells of.
    """
    if part.pieces is None:  # by its descriptor: to be read through Python takes most of a short file's time
        with _Stream(source.descriptor, closefd=False) as stream:
            return stream.samplerate, _read_blocks(stream, part, bounds, phase)
    file = PartFile(source, part.pieces)
    with io.BufferedReader(file, _BUFFER) as buffered, _Stream(buffered) as stream:
        blocks = _read_blocks(stream, part, bounds, phase)
        if file.fault:
            raise file.fault
        return stream.samplerate, blocks


def _read_blocks(stream: _Stream, part: Part, bounds: _Bounds, phase: _Phase) -> list[np.ndarray]:
    announced = stream.frames if part.counted and stream.frames != _UNKNOWN_FRAMES else None
    bounds.check(announced or 0, stream.samplerate, stream.channels)
    blocks, frames = [], 0
    if part.skip:
        stream.read(part.skip, dtype="float32")
    try:
        while len(block := stream.read(_block_size(announced, frames), dtype="float32", always_2d=True)):
            frames += len(block)
            bounds.check(frames, stream.samplerate, stream.channels)
            blocks.append(phase.mix(block))
    except soundfile.LibsndfileError as error:
        expected = f"the {announced} of its header" if announced else "whole frames to its end"
        raise Damage(
            f"found {frames} frames and then an error ({_reason(error)}), expected {expected}; the file is cut short or damaged"
        ) from None
    if announced is not None and frames < announced:
        raise Damage(f"found {frames} frames, expected the {announced} of its header; the file is cut short or damaged")
    bounds.pass_over(frames, stream.samplerate, stream.channels)
    return blocks


def _block_size(announced: int | None, frames: int) -> int:
    """Frames to ask for: no more than can come, since libsndfile fills the rest with zeros."""
    return _BLOCK_FRAMES if announced is None else min(_BLOCK_FRAMES, max(1, announced - frames))


@dataclasses.dataclass
class _Phase:
    """The mean of the channels, and how much of their energy it loses."""

    energy: float = 0.0
    cancelled_energy: float = 0.0

    def mix(self, block: np.ndarray) -> np.ndarray:
        """[T, channels] -> [T]."""
        channels = block.shape[1]
        if channels == 1:
            return block[:, 0]
        mean = (block[:, 0] + block[:, 1]) * np.float32(0.5) if channels == 2 else block.mean(axis=1)
        with np.errstate(all="ignore"):  # samples may be NaN or huge, which is refused later
            flat = block.reshape(-1)
            energy, left = float(np.dot(flat, flat)) / channels, float(np.dot(mean, mean))
        self.energy += energy
        if energy > _SILENCE * len(block) and left < _CANCELLED * energy / channels:
            self.cancelled_energy += energy
        return mean

    def doubts(self) -> list[str]:
        if not self.cancelled_energy or self.cancelled_energy < _WORTH_A_WARNING * self.energy:
            return []
        share = 100 * self.cancelled_energy / self.energy
        return [
            f"channels that cancel each other where they are averaged, in {share:.0f} % of the sound's energy, as when one is "
            "inverted; keep one of them, or turn one over"
        ]


@dataclasses.dataclass
class _Bounds:
    """What may be decoded, over all parts of a file."""

    path: str
    max_seconds: float
    max_bytes: int
    seconds: float = 0.0  # of the parts before
    size: int = 0  # bytes of the same

    def check(self, frames: int, rate: int, channels: int) -> None:
        """Refuses a part of so many frames."""
        seconds = self.seconds + frames / rate
        if seconds > self.max_seconds:
            most = f"expected at most {self.max_seconds:g} s; split it or raise the bound"
            raise AudioError(f"{self.path}: found {seconds:.1f} s of audio, {most}")
        size = max(self.size + 4 * frames * channels, int(4 * seconds * SAMPLE_RATE))
        if size > self.max_bytes:
            raise AudioError(
                f"{self.path}: found {size} bytes once decoded, expected at most {self.max_bytes}; split it or raise the bound"
            )

    def pass_over(self, frames: int, rate: int, channels: int) -> None:
        """Counts a part that was decoded."""
        self.seconds += frames / rate
        self.size += 4 * frames * channels
