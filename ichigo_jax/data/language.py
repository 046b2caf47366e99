"""Rows of a data set as training examples of the language model: token ids, and which of them carry loss.

Formats of rows (a source's ``format``):

- ``sound``: ``tokens``, sound codes alone, for pre-training;
- ``instruction``: ``tokens`` and ``answer``, a spoken request and its answer in text;
- ``transcription``: ``tokens`` and ``text``, speech and its words, asked for with one of ``text.prompts``;
- ``conversations``: ``conversations`` = ``[{"role", "content"}, …]`` with sound tokens spelled inside the contents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ichigo_jax.data.loading import IGNORE
from ichigo_jax.errors import InputError
from ichigo_jax.text.chat import EncodedChat, SoundCodes, encode_chat, truncate
from ichigo_jax.text.prompts import transcription_request
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.vocab import split_sound_text

Format = Literal["sound", "instruction", "transcription", "conversations"]


class Example(NamedTuple):
    """Ids [T] int32 and which of them are to be predicted, [T] bool."""

    ids: np.ndarray
    predicted: np.ndarray


@dataclasses.dataclass
class Dropped:
    """What did not fit into the context: how many examples were cut, and how many ids that took."""

    examples: int = 0
    ids: int = 0


def read_rows(path: str, format: Format) -> list[dict[str, Any]]:
    """Rows of a parquet file with the columns that ``format`` needs.

    Raises:
      InputError: no such file, no parquet, a column missing, no rows.
    """
    columns = _FORMATS[format].columns
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        file = pq.ParquetFile(path)
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise InputError(
                f"{path}: found columns {', '.join(file.schema_arrow.names)}; format {format!r} needs {', '.join(columns)}"
            )
        rows = file.read(columns=list(columns)).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: expected a parquet file, found {error}") from None
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none")
    return rows


class LanguageExamples:
    """Rows as ``Example``, encoded when asked for; a random-access source for Grain.

    Args:
      rows: from ``read_rows``.
      format: how they are read.
      tokenizer: of the language model.
      length: the most ids of an example; a longer one is cut before a sound span rather than inside it.
      predict: "all" ids but the first, or "answers" alone.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        format: Format,
        tokenizer: TextTokenizer,
        length: int,
        predict: Literal["all", "answers"],
    ):
        self._rows, self._encode, self._tokenizer = rows, _FORMATS[format].encode, tokenizer
        self._length, self._predict = length, predict

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self.encode(index)[0]

    def encode(self, index: int) -> tuple[Example, int]:
        """Example ``index`` and how many of its ids did not fit."""
        chat = self._encode(self._rows[index], index, self._tokenizer)
        ids, mask, dropped = truncate(*chat, self._length, self._tokenizer.sound)
        predicted = np.ones(len(ids), bool) if self._predict == "all" else np.asarray(mask, bool)
        return Example(np.asarray(ids, np.int32), predicted), dropped

    def lengths(self) -> tuple[np.ndarray, Dropped]:
        """Every example's number of ids, [len(self)], and what was cut off them."""
        lengths, total = np.zeros(len(self), np.int64), Dropped()
        for index in range(len(self)):
            example, dropped = self.encode(index)
            lengths[index] = len(example.ids)
            total.examples += dropped > 0
            total.ids += dropped
        return lengths, total


def collate(examples: Sequence[Example], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """One row of a batch from one or several examples, each its own segment.

    Examples ``([7, 8, 9], [F, T, T])`` and ``([5, 6], [T, T])`` in a row of 7, ``pad_id`` 0::

        tokens      [7, 8,    9,    5, 6,    0,    0]
        targets     [8, 9, -100,    6, -100, -100, -100]    # what follows within the segment, if it is to be predicted
        positions   [0, 1,    2,    0, 1,    0,    1]
        segment_ids [1, 1,    1,    2, 2,    0,    0]
    """
    row = {
        "tokens": np.full(length, pad_id, np.int32),
        "targets": np.full(length, IGNORE, np.int32),
        "positions": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
    }
    start = 0
    for segment, (ids, predicted) in enumerate(examples, 1):
        end = start + len(ids)
        row["tokens"][start:end] = ids
        row["targets"][start : end - 1] = np.where(predicted[1:], ids[1:], IGNORE)
        row["positions"][start:end] = np.arange(len(ids))
        row["segment_ids"][start:end] = segment
        start = end
    row["positions"][start:] = np.arange(length - start)
    return row


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Groups of examples that share a row, each at most ``capacity`` ids together, in a shuffled order (next fit).

    ``pack(np.array([3, 3, 2]), 5, seed)`` is, for one of the orders, ``[[0, 2], [1]]``.

    Args:
      lengths: ids of each example, none above ``capacity``.
      capacity: ids in a row.
      seed: of the order in which examples are taken.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    groups, first = [], 0
    while first < len(order):
        used = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, used + capacity, side="right"))
        groups.append(order[first:last])
        first = last
    return groups


class Rows:
    """Rows of batches, one example each or packed; a random-access source for Grain.

    Args:
      examples: what the rows are made of.
      groups: which examples share a row, from ``pack``; None: one example a row.
      length: ids in a row.
      pad_id: what a row is filled with.
    """

    def __init__(self, examples: LanguageExamples, groups: list[np.ndarray] | None, length: int, pad_id: int):
        self._examples, self._groups, self._length, self._pad_id = examples, groups, length, pad_id

    def __len__(self) -> int:
        return len(self._examples) if self._groups is None else len(self._groups)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        group = [index] if self._groups is None else self._groups[index]
        return collate([self._examples[int(member)] for member in group], self._length, self._pad_id)


def _sound(row: Mapping[str, Any], index: int, tokenizer: TextTokenizer) -> EncodedChat:
    """``{"tokens": [3, 5]}`` -> begin of text, sound start, 3, 5, sound end, end of text."""
    if tokenizer.sound is None:
        raise InputError("sound codes found, but the text tokenizer has no sound tokens; extend its vocabulary first")
    ids = [*tokenizer.bos_ids, *tokenizer.sound.ids(row["tokens"]), tokenizer.end_of_text_id]
    return EncodedChat(ids, [True] * len(ids))


def _instruction(row: Mapping[str, Any], index: int, tokenizer: TextTokenizer) -> EncodedChat:
    """``{"tokens": [3, 5], "answer": "yes"}`` -> the chat of a user who says [3, 5] and is answered "yes"."""
    return _chat(tokenizer, [SoundCodes(row["tokens"])], row["answer"])


def _transcription(row: Mapping[str, Any], index: int, tokenizer: TextTokenizer) -> EncodedChat:
    """``{"tokens": [3, 5], "text": "on"}`` -> the chat of a user who asks what [3, 5] says; the row picks the wording."""
    return _chat(tokenizer, transcription_request(row["tokens"], "en", index), row["text"])


def _chat(tokenizer: TextTokenizer, request: list, answer: str) -> EncodedChat:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return encode_chat(tokenizer, messages, add_generation_prompt=False)


def _conversations(row: Mapping[str, Any], index: int, tokenizer: TextTokenizer) -> EncodedChat:
    """Contents are read for sound spans, since the data set declares them; nothing else in them is special."""
    messages = [
        {
            "role": turn["role"],
            "content": [part if isinstance(part, str) else SoundCodes(part) for part in split_sound_text(turn["content"])],
        }
        for turn in row["conversations"]
    ]
    return encode_chat(tokenizer, messages, add_generation_prompt=False)


class _Format(NamedTuple):
    columns: tuple[str, ...]
    encode: Callable[[Mapping[str, Any], int, TextTokenizer], EncodedChat]


_FORMATS: dict[str, _Format] = {
    "sound": _Format(("tokens",), _sound),
    "instruction": _Format(("tokens", "answer"), _instruction),
    "transcription": _Format(("tokens", "text"), _transcription),
    "conversations": _Format(("conversations",), _conversations),
}
