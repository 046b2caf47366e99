"""Speech with its text, as training examples of the speech tokenizer."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ichigo_jax.audio.decode import SAMPLE_RATE, AudioError, load_audio
from ichigo_jax.data.audio_files import read_manifest
from ichigo_jax.data.loading import IGNORE
from ichigo_jax.errors import InputError


def read_transcripts(manifest: str) -> list[dict[str, Any]]:
    """Rows of a manifest with ``path`` and ``text``, all of whose audio files exist.

    Raises:
      InputError: what ``read_manifest`` refuses, or files that do not exist.
    """
    rows = read_manifest(manifest, ("text",))
    missing = [row["path"] for row in rows if not Path(row["path"]).is_file()]
    if missing:
        raise InputError(f"{manifest}: {len(missing)} of {len(rows)} audio files do not exist, the first is {missing[0]}")
    return rows


class FaultLog:
    """Remembers the clips that could not be used, each once, as JSON lines; reading goes on without them."""

    def __init__(self, path: Path | None):
        self.path = path
        self._lock = threading.Lock()
        self._seen: set[str] = set()

    def __call__(self, clip: str, fault: str) -> None:
        with self._lock:
            if clip not in self._seen:
                self._seen.add(clip)
                if self.path is not None:
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"path": clip, "error": fault}) + "\n")


class SpeechExamples:
    """Rows of a manifest as fixed-size arrays, decoded when asked for; a random-access source for Grain.

    Example ``{"path": "one.wav", "text": "turn on"}`` with ``seconds=2.0``, ``text_length=4``, prompt ``[1]``, text ids
    ``[7, 8]`` and end ``2``::

        audio   [32000] float32, zeros after the clip
        samples 21000                  # the clip's own length
        inputs  [1, 7, 8, 2]           # prompt, text, end; filled with the end
        targets [7, 8, 2, -100]        # what each input position is to predict; -100 carries no loss

    A clip that cannot be decoded, or is longer than ``seconds``, or whose text does not fit, goes to ``faults`` and
    comes back as silence of no samples without targets, so that the batch keeps its shape and order.

    Args:
      rows: from ``read_transcripts``.
      token_ids: for each row its text as ids.
      prompt: ids that the decoder starts from.
      end: the id that ends a text.
      seconds: length of the audio context.
      text_length: length of ``inputs``.
      faults: where unusable clips are recorded.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        token_ids: Sequence[Sequence[int]],
        prompt: Sequence[int],
        end: int,
        seconds: float,
        text_length: int,
        faults: FaultLog,
    ):
        self._rows, self._token_ids = rows, token_ids
        self._prompt, self._end = list(prompt), end
        self._samples, self._text_length = round(seconds * SAMPLE_RATE), text_length
        self._faults = faults

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        audio = np.zeros(self._samples, np.float32)
        inputs = np.full(self._text_length, self._end, np.int32)
        targets = np.full(self._text_length, IGNORE, np.int32)
        path = self._rows[index]["path"]
        clip = np.zeros(0, np.float32)
        try:
            ids = [*self._prompt, *self._token_ids[index], self._end]
            if len(ids) > self._text_length:
                raise InputError(f"{path}: text of {len(ids)} tokens, expected at most {self._text_length}")
            seconds = self._samples / SAMPLE_RATE
            clip = load_audio(path, max_seconds=seconds, max_bytes=64 * self._samples)
            audio[: len(clip)] = clip
            inputs[: len(ids)] = ids
            targets[len(self._prompt) - 1 : len(ids) - 1] = ids[len(self._prompt) :]
        except (AudioError, InputError) as error:
            self._faults(path, str(error))
        return {"audio": audio, "samples": np.int32(len(clip)), "inputs": inputs, "targets": targets}
