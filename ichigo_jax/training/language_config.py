"""The sections of a config that are the language model's own: its model, data and objective."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from ichigo_jax import configuration
from ichigo_jax.data.row_formats import Format
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LlamaConfig
from ichigo_jax.models.lora import LoraConfig
from ichigo_jax.training.mixture_config import check_evaluation, check_weights


@dataclasses.dataclass(frozen=True)
class NewModel:
    """A model from random parameters.

    Attributes:
      text_tokenizer: a Hugging Face tokenizer folder; the vocabulary is as large as its ids.
      vocab_multiple: the embedding's rows are padded to a multiple of it, for sharding.
      llama: the fields of ``LlamaConfig`` but ``vocab_size``.
    """

    text_tokenizer: str
    vocab_multiple: int
    llama: Any


@dataclasses.dataclass(frozen=True)
class StartingModel:
    """What a run that starts from ``init_from`` says of that model; None in its place: that it is whatever the folder holds.

    Attributes:
      llama: its numbers, which the folder must have (but ``vocab_size``, which is as large as its tokenizer); with them the run
        can be planned before there is a folder. None: any.
      adapter: trained in the model's stead, which stays as it is; None: the model itself is trained.
      base_dtype: with an adapter, what the frozen weights are kept in, and the merged model at the end; else None.
    """

    llama: LlamaConfig | None
    adapter: LoraConfig | None
    base_dtype: Literal["float32", "bfloat16"] | None

    def __post_init__(self):
        if (self.adapter is None) != (self.base_dtype is None):
            raise InputError(f"base_dtype {self.base_dtype!r} found, expected one with an adapter and None without")


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
      path: a parquet or JSON-lines file, or a folder of them.
      format, column, request: how its rows are read, see ``data.row_formats``.
      weight: how often it is drawn, relative to the others.
    """

    path: str
    format: Format
    column: str | None
    request: str | None
    weight: float


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Held-out rows of format ``instruction``: the first ``limit`` are answered and reported as ``name/…``."""

    name: str
    path: str
    limit: int
    max_new_tokens: int

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens} found, expected at least 1")


@dataclasses.dataclass(frozen=True)
class LanguageData:
    """What is read.

    Attributes:
      length: ids in a row.
      packing: whether several examples share a row.
      sound_form: "plain", or "compressed": runs of equal codes become a duration and one code.
      speech_tokenizer: the model folder whose codes the data holds; its fingerprint goes into the trained model's
        provenance.
      chat_date: what a chat template that asks for today's date is told, as "2026-11-27"; the same on every day of the run, and
        recorded in the trained model, which is told it again in answering. None: the date of the model that the run starts
        from, or 2024-07-26 (``text.chat_template``) where that has none.
    """

    length: int
    packing: bool
    sound_form: Literal["plain", "compressed"]
    speech_tokenizer: str
    chat_date: str | None
    sources: tuple[Source, ...]
    evaluation: tuple[EvaluationSet, ...]

    def __post_init__(self):
        if self.chat_date is not None:
            configuration.checked_date(self.chat_date, "chat_date")
        if self.length < 2:
            raise InputError(f"length {self.length} found, expected at least 2 ids: one is predicted from those before it")
        check_weights([source.weight for source in self.sources])
        check_evaluation(self.evaluation)


@dataclasses.dataclass(frozen=True)
class LanguageObjective:
    """What is minimised: the cross-entropy of the next id.

    Attributes:
      predict: "all" ids but the first, or the "answers" alone.
      loss_chunk: tokens whose logits a device holds at a time; None: those of all its tokens.
      z_loss: weight of the squared log-normaliser (``training.losses.vocabulary_loss``).
    """

    predict: Literal["all", "answers"]
    loss_chunk: int | None
    z_loss: float

    def __post_init__(self):
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise InputError(f"loss_chunk {self.loss_chunk} found, expected a positive number of tokens or None")
        if not 0 <= self.z_loss < math.inf:
            raise InputError(f"z_loss {self.z_loss} found, expected a finite number, 0 or more")
