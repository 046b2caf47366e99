"""Training the language model on sound tokens and text: next-token cross-entropy."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax import configuration
from ichigo_jax.data.encoded import EncodedExamples, encode_rows
from ichigo_jax.data.faults import FaultLog
from ichigo_jax.data.language import Rows, pack
from ichigo_jax.data.row_files import read_first_rows
from ichigo_jax.data.row_formats import Format, RowEncoder, RowFormat
from ichigo_jax.errors import InputError
from ichigo_jax.evaluation.text import exact_fraction
from ichigo_jax.inference.language_model import LanguageModel, check_tokenizer
from ichigo_jax.models import lora
from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig
from ichigo_jax.models.lora import LoraConfig
from ichigo_jax.parallel import hosts
from ichigo_jax.storage import atomic_write, read_json
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER, load_config, load_model, recorded_chat_date, save_model
from ichigo_jax.tasks.mixture import mixed_examples, mixed_rows, source_metrics, source_report, source_shapes, source_totals
from ichigo_jax.tasks.task import Scalars, check_equal, check_evaluation, check_weights
from ichigo_jax.text.chat import encode_chat
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.training.losses import count_targets, vocabulary_loss
from ichigo_jax.training.run_config import RunConfig

KIND = "language_model"


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


class HeldOut(NamedTuple):
    """A row of an evaluation set: what is asked, as messages, and the answer that is expected."""

    request: list[dict[str, Any]]
    answer: str


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


class LanguageModelTask:
    """See ``tasks.task.Task``."""

    def __init__(self, config: RunConfig, workdir: Path | None):
        self.config = config
        self.data = configuration.from_dict(LanguageData, config.data, "config.data")
        self.objective = configuration.from_dict(LanguageObjective, config.objective, "config.objective")
        self.starting = StartingModel(None, None, None)
        if config.init_from is not None and config.model is not None:
            self.starting = _starting_model(config.model)
        if workdir is None and self.starting.llama is not None:
            network = self.starting.llama
            self.model_config = LanguageModelConfig(network, None, (), network.vocab_size).padded_to(max(1, config.mesh.tensor))
            return
        if workdir is None:
            self.model_config = self._read_model_config()
            return
        self.read_model()
        self._read_data(workdir)

    def read_model(self) -> None:
        self.model_config = self._read_model_config()
        check_tokenizer(self.model_config, self.tokenizer)
        self._listener = self._read_listener()

    def _read_model_config(self) -> LanguageModelConfig:
        init_from, expected = self.config.init_from, self.starting.llama
        if init_from is None:
            new = configuration.from_dict(NewModel, self.config.model, "config.model")
            self.tokenizer_folder = Path(new.text_tokenizer)
            self.tokenizer = TextTokenizer.from_folder(self.tokenizer_folder, self.data.chat_date)
            return _model_config(new, self.tokenizer)
        self.tokenizer_folder = Path(init_from) / TOKENIZER_FOLDER
        self.tokenizer = TextTokenizer.from_folder(self.tokenizer_folder, self.data.chat_date or recorded_chat_date(init_from))
        found = load_config(init_from, KIND, LanguageModelConfig)
        if expected is not None:
            check_equal(init_from, found.llama, expected, but=("vocab_size",))
        if self.starting.adapter is not None:
            lora.check_fits(self.starting.adapter, found.llama)
        # Whatever ends the texts and turns of training ends those of the trained model; a base model has not all of them.
        ends = dict.fromkeys((*found.eos_token_ids, *self.tokenizer.eos_ids))
        return dataclasses.replace(found, eos_token_ids=tuple(ends))

    def _read_data(self, workdir: Path) -> None:
        if self.tokenizer.chat_date is not None and hosts.is_first():
            print(f"the chat template is told the date {self.tokenizer.chat_date} (data.chat_date)", file=sys.stderr)
        self.faults_file = workdir / "skipped_rows.jsonl"
        self._evaluation = [(item, self._held_out(item)) for item in self.data.evaluation]
        encoders = [self._encoder(source) for source in self.data.sources]
        self._sources = [self._rows(*each, workdir) for each in zip(self.data.sources, encoders)]

    def _read_listener(self) -> dict[str, str]:
        """What the provenance says of the speech tokenizer whose codes the data holds."""
        path = Path(self.data.speech_tokenizer) / "provenance.json"
        found = read_json(path)
        fingerprint = found.get("fingerprint") if isinstance(found, dict) else None
        if not isinstance(fingerprint, str):
            raise InputError(f"{path}: no fingerprint found, expected the provenance of a speech tokenizer's model folder")
        return {"speech_tokenizer": self.data.speech_tokenizer, "speech_tokenizer_fingerprint": fingerprint}

    def _held_out(self, item: EvaluationSet) -> list[HeldOut]:
        """Rows of an evaluation set. Encodes each once, so that a row that cannot be used ends the run before its first step."""
        format = RowFormat("instruction", None, None, self._compressed)
        encoder = RowEncoder(format, self.tokenizer, self.data.length, self.objective.predict)
        context = self.model_config.llama.max_position_embeddings

        def read(row: Mapping[str, Any]) -> HeldOut:
            held_out = HeldOut(*encoder.request_and_answer(row))
            ids = encode_chat(self.tokenizer, held_out.request, add_generation_prompt=True).ids
            if len(ids) >= context:
                raise InputError(f"a request of {len(ids)} ids found, the model's context is {context}; leave the row out")
            return held_out

        return read_first_rows(item.path, format.columns, item.limit, read)

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(_measure(item) for item in self.data.evaluation)

    @property
    def _compressed(self) -> bool:
        return self.data.sound_form == "compressed"

    def _encoder(self, source: Source) -> RowEncoder:
        format = RowFormat(source.format, source.column, source.request, self._compressed)
        return RowEncoder(format, self.tokenizer, self.data.length, self.objective.predict)

    def _rows(self, source: Source, encoder: RowEncoder, workdir: Path) -> Rows:
        first_process = hosts.is_first()
        faults = FaultLog(self.faults_file if first_process else None)
        with hosts.first_alone(f"encoded {source.path}"):
            examples = encode_rows(source.path, encoder, workdir / "encoded", faults, progress=first_process)
        length = self.data.length
        groups = pack(examples.lengths, length, self.config.seed) if self.data.packing else None
        rows = Rows(examples, groups, length, self.tokenizer.pad_id)
        if first_process:
            print(_described(source.path, examples, len(rows), length), file=sys.stderr)
        return rows

    def make_model(self, rngs: nnx.Rngs) -> Llama:
        model = Llama(self.model_config, rngs)
        if self.starting.adapter is not None:
            lora.attach(model, self.starting.adapter, self.starting.base_dtype, rngs)
        return model

    def load_model(self, folder: str, mesh: Mesh) -> Llama:
        dtype = jnp.dtype(self.starting.base_dtype or self.config.train.param_dtype)
        model = load_model(folder, lambda rngs: Llama(self.model_config, rngs), dtype, mesh)
        if self.starting.adapter is not None:
            lora.attach(model, self.starting.adapter, self.starting.base_dtype, nnx.Rngs(self.config.seed), mesh)
        return model

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        size = self.config.train.batch_size
        rows = jax.ShapeDtypeStruct((size, self.data.length), jnp.int32)
        fields = ("tokens", "targets", "positions", "segment_ids")
        return {**dict.fromkeys(fields, rows), **source_shapes(self.data.sources, size)}

    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.data.length

    def examples(self) -> grain.MapDataset:
        return mixed_examples(self._sources, self.data, self.config)

    def rows_of_batch(self, number: int) -> dict[str, list[int]]:
        return mixed_rows(self._sources, self.data, self.config, number)

    def data_sizes(self) -> list[int]:
        return [len(rows) for rows in self._sources]

    def totals(self, batch: Mapping[str, jax.Array]) -> Scalars:
        return {"targets": count_targets(batch["targets"]), **source_totals(batch, self.data)}

    def loss(self, model: Llama, batch: Mapping[str, jax.Array], totals: Scalars, key: jax.Array) -> tuple[jax.Array, Scalars]:
        train, objective = self.config.train, self.objective
        segments = batch["segment_ids"] if self.data.packing else None  # else padding comes last, where no token sees it
        hidden, _ = model(batch["tokens"], batch["positions"], segment_ids=segments, remat=train.remat, backend=train.attention)
        vocab_size = self.model_config.llama.vocab_size
        sums = vocabulary_loss(
            hidden, model.output_kernel(), batch["targets"], vocab_size, objective.loss_chunk, objective.z_loss
        )
        loss, cross_entropy, correct = (value / totals["targets"] for value in sums[:3])
        by_source = source_metrics(batch, sums.of_tokens, totals)
        return loss, {"cross_entropy": cross_entropy, "accuracy": correct, **by_source}

    def report(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        return source_report(metrics, [source.path for source in self.data.sources])

    def evaluate(self, model: Llama) -> dict[str, float]:
        language_model = LanguageModel(self._merged(model), self.model_config, self.tokenizer, self._listener)
        values = {}
        for item, rows in self._evaluation:
            answers = language_model.answer([row.request for row in rows], item.max_new_tokens)
            values[_measure(item)] = exact_fraction([row.answer for row in rows], answers)
        return values

    def save(self, model: Llama, folder: Path, origin: Mapping[str, Any]) -> None:
        """Writes the model folder; that of a model with an adapter holds it beside the merged weights."""
        of_data = {"init_from": self.config.init_from, "sound_form": self.data.sound_form, **self._listener}
        dated = {} if self.tokenizer.chat_date is None else {"chat_date": self.tokenizer.chat_date}
        provenance = {**origin, **of_data, **dated}
        with hosts.first_enters(atomic_write(folder), "saved all of a model folder") as partial:
            target = partial or folder  # of which the other processes make no use
            state = nnx.to_pure_dict(nnx.state(self._merged(model)))
            save_model(target, KIND, self.model_config, state, provenance, self.tokenizer_folder)
            if self.starting.adapter is not None:
                lora.save_adapter(target, self.starting.adapter, lora.trained_state(model), provenance)

    def _merged(self, model: Llama) -> Llama:
        """What training leaves: the model itself, or its adapter added to its weights."""
        return model if self.starting.adapter is None else lora.merged(model, self.starting.base_dtype)


def _measure(item: EvaluationSet) -> str:
    return f"{item.name}/answers_exact"


def _described(path: str, examples: EncodedExamples, rows: int, length: int) -> str:
    total, skipped, cut, dropped = examples.summary
    fill = examples.lengths.sum() / (rows * length)
    parts = [
        f"{path}: {len(examples)} examples in {rows} rows of {length} ids, {len(examples) / rows:.2f} a row, {fill:.1%} full"
    ]
    if skipped:
        parts.append(f"{skipped} of {total} could not be used, see skipped_rows.jsonl")
    if cut:
        parts.append(f"{cut} cut to {length} ids, {dropped} ids left out")
    return "; ".join(parts)


def _model_config(new: NewModel, tokenizer: TextTokenizer) -> LanguageModelConfig:
    llama = configuration.from_dict(LlamaConfig, {**new.llama, "vocab_size": tokenizer.size}, "config.model.llama")
    return LanguageModelConfig(llama, tokenizer.sound, tokenizer.eos_ids, llama.vocab_size).padded_to(new.vocab_multiple)


def _starting_model(values: Any) -> StartingModel:
    if "text_tokenizer" in values:
        raise InputError(
            "config.model of a new model found beside config.init_from; expected None, or what the model folder must hold "
            "(llama, adapter, base_dtype)"
        )
    return configuration.from_dict(StartingModel, values, "config.model")
