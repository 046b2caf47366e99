"""Speech with its text, as training examples of the speech tokenizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ichigo_jax.audio.ahead import map_ahead
from ichigo_jax.audio.decode import SAMPLE_RATE, AudioError, load_audio
from ichigo_jax.data.audio_files import read_manifest
from ichigo_jax.data.faults import FaultLog
from ichigo_jax.data.loading import IGNORE
from ichigo_jax.errors import InputError

LONGEST = 1e9  # seconds that a manifest can mean
MOST_UNUSABLE = 100  # clips in a row that cannot be used, of data that is there at all
ROUNDING_SAMPLES = 2  # a manifest's seconds are rounded, and so is the length after resampling


def read_transcripts(manifest: str) -> list[dict[str, Any]]:
    """Rows of a manifest with ``path`` and ``text``, all of whose audio files exist.

    Raises:
      InputError: what ``read_manifest`` refuses, or files that do not exist.
    """
    rows = read_manifest(manifest, ("text",))
    missing = [row["path"] for row in rows if not _is_file(row["path"])]
    if missing:
        raise InputError(f"{manifest}: {len(missing)} of {len(rows)} audio files do not exist, the first is {missing[0]}")
    return rows


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def check_clips(manifest: str, rows: Sequence[dict[str, Any]], max_seconds: float, max_bytes: int) -> None:
    """Decodes every clip once, in threads, for those that must all be right.

    Args:
      manifest: where the rows are from.
      rows: its first rows, in order.
      max_seconds, max_bytes: see ``audio.decode.load_audio``.

    Raises:
      InputError: clips that cannot be decoded; the message names the row of the first and counts them.
    """

    def fault_of(row: dict[str, Any]) -> str | None:
        try:
            load_audio(row["path"], max_seconds, max_bytes)
        except (AudioError, OSError) as error:
            return str(error)
        return None

    faults = [(number, fault) for number, fault in enumerate(map_ahead(fault_of, rows), 1) if fault is not None]
    if faults:
        number, fault = faults[0]
        others = f"; {len(faults)} of {len(rows)} clips cannot be used" if len(faults) > 1 else ""
        raise InputError(f"{manifest}: row {number}: {fault}{others}; mend or leave out what is to be evaluated")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How clips and texts become arrays.

    Attributes:
      samples: length of the audio context.
      text_length: ids that the decoder reads at most: prompt and text.
      predict_prompt: whether the prompt's ids after the first are targets too.
      normalize: whether each clip is scaled to a peak of 1.
      concatenate: whether clips that follow each other in the manifest share a context as long as they fit.
    """

    samples: int
    text_length: int
    predict_prompt: bool
    normalize: bool
    concatenate: bool


class SpeechExamples:
    """Rows of a manifest as fixed-size arrays, decoded when asked for; a random-access source for Grain.

    Example ``{"path": "one.wav", "text": "turn on"}`` with ``samples=32000``, ``text_length=4``, prompt ``[1, 3]``, text ids
    ``[7]`` and end ``2``::

        audio   [32000] float32, zeros after the clip
        samples 21000                  # the clip's own length
        inputs  [1, 3, 7, 2]           # prompt and text; filled with the end
        targets [-100, 7, 2, -100]     # what each input position is to predict; -100 carries no loss
                [3, 7, 2, -100]        # the same with predict_prompt

    With ``concatenate`` the next row's clip follows in the same audio and its text, after a space, in the same inputs.

    A clip that cannot be decoded or is longer than the context, or whose text does not fit, goes to ``faults`` and is left
    out; where nothing is left, silence of no samples without targets comes back, so that the batch keeps its shape and order.
    The last of ``MOST_UNUSABLE`` such clips with none between them that can be used, as when a disk is gone, raises
    ``InputError``.

    Args:
      rows: from ``read_transcripts``.
      encode: a text's ids.
      prompt: ids that the decoder starts from.
      end: the id that ends a text.
      layout: see there.
      faults: where unusable clips are recorded.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        encode: Callable[[str], Sequence[int]],
        prompt: Sequence[int],
        end: int,
        layout: Layout,
        faults: FaultLog,
    ):
        self._rows, self._encode = rows, encode
        self._prompt, self._end = list(prompt), end
        self._layout, self._faults, self._unusable = layout, faults, 0
        self._groups = self._fill_contexts() if layout.concatenate else [[index] for index in range(len(rows))]

    def __len__(self) -> int:
        return len(self._groups)

    def members(self, index: int) -> list[int]:
        """Which rows of the manifest an example is made of, from 0."""
        return self._groups[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        layout = self._layout
        audio = np.zeros(layout.samples, np.float32)
        inputs = np.full(layout.text_length, self._end, np.int32)
        targets = np.full(layout.text_length, IGNORE, np.int32)
        used, texts, ids = 0, [], []
        for row in (self._rows[number] for number in self.members(index)):
            try:
                clip = self._clip(row["path"], layout.samples - used)
                longer = [*self._prompt, *self._encode(" ".join([*texts, row["text"]]))]
                if len(longer) > layout.text_length:
                    limit = layout.text_length
                    raise InputError(f"{row['path']}: prompt and text of {len(longer)} tokens, expected at most {limit}")
            except (AudioError, InputError, OSError) as error:
                self._faults(row["path"], str(error))
                self._unusable += 1
                if self._unusable >= MOST_UNUSABLE:
                    others = MOST_UNUSABLE - 1
                    raise InputError(f"{error}; nor could the {others} clips before it be used: are they all there?") from None
                continue
            self._unusable = 0
            audio[used : used + len(clip)] = clip
            used += len(clip)
            texts.append(row["text"])
            ids = longer
        if texts:
            first = 1 if layout.predict_prompt else len(self._prompt)
            inputs[: len(ids)] = ids
            targets[first - 1 : len(ids)] = [*ids[first:], self._end]
        return {"audio": audio, "samples": np.int32(used), "inputs": inputs, "targets": targets}

    def _clip(self, path: str, room: int) -> np.ndarray:
        clip = load_audio(path, max_seconds=room / SAMPLE_RATE, max_bytes=64 * self._layout.samples)
        peak = np.abs(clip).max()
        clip = clip[:room]  # resampling may round up
        return clip / peak if self._layout.normalize and peak > 0 else clip

    def _fill_contexts(self) -> list[list[int]]:
        """Rows that share a context: each in turn joins the last group, or begins one where it does not fit."""
        groups: list[list[int]] = []
        room, text_room = 0, 0
        for index, row in enumerate(self._rows):
            samples = _expected_samples(row)
            ids = len(self._encode(f" {row['text']}"))
            if not groups or samples > room or ids > text_room:
                groups.append([])
                room, text_room = self._layout.samples, self._layout.text_length - len(self._prompt)
            groups[-1].append(index)
            room, text_room = room - samples, text_room - ids
        return groups


def _expected_samples(row: dict[str, Any]) -> int:
    """At least what the row's clip will have at 16 kHz: from its field ``seconds``, or else from the file's header.

    A field that is no duration (no number, NaN, infinite, negative) counts as none: the file knows better.
    """
    seconds = row.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < LONGEST:
        try:
            seconds = soundfile.info(row["path"]).duration
        except (soundfile.SoundFileError, OSError, TypeError):  # TypeError: headerless formats, such as .raw
            return 0  # decoding it will fail as well, and that is where it is told of
    return math.ceil(seconds * SAMPLE_RATE) + ROUNDING_SAMPLES
