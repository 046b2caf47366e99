"""Training the language model on sound tokens and text: next-token cross-entropy."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from ichigo_jax.parallel import hosts
from ichigo_jax.storage import atomic_write, read_json
from ichigo_jax.storage.model_folder import TOKENIZER_FOLDER, load_config, load_model, recorded_chat_date, save_model
from ichigo_jax.tasks.mixture import Mixture, source_metrics, source_report, source_shapes, source_totals
from ichigo_jax.tasks.task import check_equal
from ichigo_jax.text.chat import encode_chat
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.training.language_config import EvaluationSet, LanguageData, LanguageObjective, NewModel, Source, StartingModel
from ichigo_jax.training.losses import Scalars, count_targets, vocabulary_loss
from ichigo_jax.training.run_config import RunConfig

KIND = "language_model"


@dataclasses.dataclass(frozen=True)
class LanguageSections:
    """The config's sections in the fields of this task."""

    data: LanguageData
    objective: LanguageObjective
    starting: StartingModel

    @classmethod
    def of(cls, config: RunConfig) -> LanguageSections:
        starting = StartingModel(None, None, None)
        if config.init_from is not None and config.model is not None:
            starting = _starting_model(config.model)
        return cls(
            configuration.from_dict(LanguageData, config.data, "config.data"),
            configuration.from_dict(LanguageObjective, config.objective, "config.objective"),
            starting,
        )


def _starting_model(values: Any) -> StartingModel:
    if "text_tokenizer" in values:
        raise InputError(
            "config.model of a new model found beside config.init_from; expected None, or what the model folder must hold "
            "(llama, adapter, base_dtype)"
        )
    return configuration.from_dict(StartingModel, values, "config.model")


# ---- what is trained -------------------------------------------------------------------------------------------------


class LanguageModelTask:
    """See ``tasks.task.Task``."""

    def __init__(self, config: RunConfig, model_config: LanguageModelConfig):
        self.model_config = model_config
        self._config, sections = config, LanguageSections.of(config)
        self._data, self._objective, self._starting = sections.data, sections.objective, sections.starting

    def make_model(self, rngs: nnx.Rngs) -> Llama:
        model = Llama(self.model_config, rngs)
        if self._starting.adapter is not None:
            lora.attach(model, self._starting.adapter, self._starting.base_dtype, rngs)
        return model

    def load_model(self, folder: str, mesh: Mesh) -> Llama:
        dtype = jnp.dtype(self._starting.base_dtype or self._config.train.param_dtype)
        model = load_model(folder, lambda rngs: Llama(self.model_config, rngs), dtype, mesh)
        if self._starting.adapter is not None:
            lora.attach(model, self._starting.adapter, self._starting.base_dtype, nnx.Rngs(self._config.seed), mesh)
        return model

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        size = self._config.train.batch_size
        rows = jax.ShapeDtypeStruct((size, self._data.length), jnp.int32)
        fields = ("tokens", "targets", "positions", "segment_ids")
        return {**dict.fromkeys(fields, rows), **source_shapes(self._data.sources, size)}

    def tokens_per_step(self) -> int:
        return self._config.train.batch_size * self._data.length

    def totals(self, batch: Mapping[str, jax.Array]) -> Scalars:
        return {"targets": count_targets(batch["targets"]), **source_totals(batch, self._data)}

    def loss(self, model: Llama, batch: Mapping[str, jax.Array], totals: Scalars, key: jax.Array) -> tuple[jax.Array, Scalars]:
        train, objective = self._config.train, self._objective
        segments = batch["segment_ids"] if self._data.packing else None  # else padding comes last, where no token sees it
        hidden, _ = model(batch["tokens"], batch["positions"], segment_ids=segments, remat=train.remat, backend=train.attention)
        vocab_size = self.model_config.llama.vocab_size
        sums = vocabulary_loss(
            hidden, model.output_kernel(), batch["targets"], vocab_size, objective.loss_chunk, objective.z_loss
        )
        loss, cross_entropy, correct = (value / totals["targets"] for value in sums[:3])
        by_source = source_metrics(batch, sums.of_tokens, totals)
        return loss, {"cross_entropy": cross_entropy, "accuracy": correct, **by_source}

    def report(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        return source_report(metrics, [source.path for source in self._data.sources])


def planned_task(config: RunConfig) -> LanguageModelTask:
    """See ``tasks.planned_task``."""
    return LanguageModelTask(config, planned_model_config(config))


def planned_model_config(config: RunConfig) -> LanguageModelConfig:
    """The model's config for planning: as ``config.model`` says it, and only where it does not from the files.

    Sound tokens and the ends of texts are missing where no file is read; they change neither shapes nor time.
    """
    network = LanguageSections.of(config).starting.llama
    if network is None:
        return read_model_config(config)[0]
    return LanguageModelConfig(network, None, (), network.vocab_size).padded_to(max(1, config.mesh.tensor))


def read_model_config(config: RunConfig) -> tuple[LanguageModelConfig, TextTokenizer]:
    """The model's config as its text tokenizer and the folder that it starts from make it, and that text tokenizer.

    Raises:
      InputError: one of them is missing, or the folder's model is not that of ``config.model``.
    """
    sections, folder = LanguageSections.of(config), tokenizer_folder(config)
    if config.init_from is None:
        tokenizer = TextTokenizer.from_folder(folder, sections.data.chat_date)
        return _model_config(_new_model(config), tokenizer), tokenizer
    init_from, starting = config.init_from, sections.starting
    tokenizer = TextTokenizer.from_folder(folder, sections.data.chat_date or recorded_chat_date(init_from))
    found = load_config(init_from, KIND, LanguageModelConfig)
    if starting.llama is not None:
        check_equal(init_from, found.llama, starting.llama, but=("vocab_size",))
    if starting.adapter is not None:
        lora.check_fits(starting.adapter, found.llama)
    # Whatever ends the texts and turns of training ends those of the trained model; a base model has not all of them.
    ends = dict.fromkeys((*found.eos_token_ids, *tokenizer.eos_ids))
    return dataclasses.replace(found, eos_token_ids=tuple(ends)), tokenizer


def tokenizer_folder(config: RunConfig) -> Path:
    """Where the text tokenizer of a run lies: in the model folder that it starts from, or where a new model names it."""
    if config.init_from is None:
        return Path(_new_model(config).text_tokenizer)
    return Path(config.init_from) / TOKENIZER_FOLDER


def _new_model(config: RunConfig) -> NewModel:
    return configuration.from_dict(NewModel, config.model, "config.model")


def _model_config(new: NewModel, tokenizer: TextTokenizer) -> LanguageModelConfig:
    llama = configuration.from_dict(LlamaConfig, {**new.llama, "vocab_size": tokenizer.size}, "config.model.llama")
    return LanguageModelConfig(llama, tokenizer.sound, tokenizer.eos_ids, llama.vocab_size).padded_to(new.vocab_multiple)


# ---- the model folder ------------------------------------------------------------------------------------------------


class LanguageModelFiles:
    """See ``tasks.task.ModelFiles``.

    Attributes:
      tokenizer: the text tokenizer.
    """

    def __init__(self, config: RunConfig):
        self._config, self._sections = config, LanguageSections.of(config)
        model_config, self.tokenizer = read_model_config(config)
        check_tokenizer(model_config, self.tokenizer)
        self._listener = _read_listener(self._sections.data.speech_tokenizer)
        self.task = LanguageModelTask(config, model_config)

    def open_evaluation(self) -> LanguageEvaluation:
        context = self.task.model_config.llama.max_position_embeddings
        return LanguageEvaluation(self._sections, self.tokenizer, context, self.trained)

    def open_data(self, workdir: Path) -> Mixture:
        return _open_data(self._config, self._sections, self.tokenizer, workdir)

    def trained(self, model: Llama) -> LanguageModel:
        """The model that training leaves, ready to answer: an adapter is added to the weights."""
        return LanguageModel(self._merged(model), self.task.model_config, self.tokenizer, self._listener)

    def save(self, model: Llama, folder: Path, origin: Mapping[str, Any]) -> None:
        """Writes the model folder; that of a model with an adapter holds it beside the merged weights."""
        data, starting = self._sections.data, self._sections.starting
        of_data = {"init_from": self._config.init_from, "sound_form": data.sound_form, **self._listener}
        dated = {} if self.tokenizer.chat_date is None else {"chat_date": self.tokenizer.chat_date}
        provenance = {**origin, **of_data, **dated}
        with hosts.first_enters(atomic_write(folder), "saved all of a model folder") as partial:
            target = partial or folder  # of which the other processes make no use
            state = nnx.to_pure_dict(nnx.state(self._merged(model)))
            save_model(target, KIND, self.task.model_config, state, provenance, tokenizer_folder(self._config))
            if starting.adapter is not None:
                lora.save_adapter(target, starting.adapter, lora.trained_state(model), provenance)

    def _merged(self, model: Llama) -> Llama:
        starting = self._sections.starting
        return model if starting.adapter is None else lora.merged(model, starting.base_dtype)


open_files = LanguageModelFiles  # as ``tasks`` calls it


def _read_listener(speech_tokenizer: str) -> dict[str, str]:
    """What the provenance says of the speech tokenizer whose codes the data holds."""
    path = Path(speech_tokenizer) / "provenance.json"
    found = read_json(path)
    fingerprint = found.get("fingerprint") if isinstance(found, dict) else None
    if not isinstance(fingerprint, str):
        raise InputError(f"{path}: no fingerprint found, expected the provenance of a speech tokenizer's model folder")
    return {"speech_tokenizer": speech_tokenizer, "speech_tokenizer_fingerprint": fingerprint}


# ---- the data --------------------------------------------------------------------------------------------------------


def _open_data(config: RunConfig, sections: LanguageSections, tokenizer: TextTokenizer, workdir: Path) -> Mixture:
    """Encodes the rows of every source into the workdir, where that is not done yet, and packs them."""
    data, first_process = sections.data, hosts.is_first()
    if tokenizer.chat_date is not None and first_process:
        print(f"the chat template is told the date {tokenizer.chat_date} (data.chat_date)", file=sys.stderr)
    faults_file = workdir / "skipped_rows.jsonl"

    def rows(source: Source, encoder: RowEncoder) -> Rows:
        faults = FaultLog(faults_file if first_process else None)
        with hosts.first_alone(f"encoded {source.path}"):
            examples = encode_rows(source.path, encoder, workdir / "encoded", faults, progress=first_process)
        groups = pack(examples.lengths, data.length, config.seed) if data.packing else None
        rows = Rows(examples, groups, data.length, tokenizer.pad_id)
        if first_process:
            print(_described(source.path, examples, len(rows), data.length), file=sys.stderr)
        return rows

    # All encoders before the first row: a source that no encoder fits is found before hours of encoding.
    encoders = [_encoder(sections, tokenizer, source.format, source.column, source.request) for source in data.sources]
    return Mixture([rows(*each) for each in zip(data.sources, encoders)], data, config, faults_file)


def _encoder(
    sections: LanguageSections, tokenizer: TextTokenizer, format: Format, column: str | None, request: str | None
) -> RowEncoder:
    row_format = RowFormat(format, column, request, sections.data.sound_form == "compressed")
    return RowEncoder(row_format, tokenizer, sections.data.length, sections.objective.predict)


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


# ---- the evaluation --------------------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """A row of an evaluation set: what is asked, as messages, and the answer that is expected."""

    request: list[dict[str, Any]]
    answer: str


class LanguageEvaluation:
    """See ``tasks.task.Evaluation``: the share of held-out requests that get exactly the expected answer.

    Args:
      sections: of the config.
      tokenizer: the text tokenizer.
      context: ids that the model can hold; a longer request is refused.
      trained: makes the model that answers of the one that is trained.

    Attributes:
      rows: of each evaluation set, by its name.
    """

    def __init__(
        self,
        sections: LanguageSections,
        tokenizer: TextTokenizer,
        context: int,
        trained: Callable[[Llama], LanguageModel],
    ):
        self._sets, self._trained = sections.data.evaluation, trained
        self.measures = tuple(map(_measure, self._sets))
        encoder = _encoder(sections, tokenizer, "instruction", None, None)

        def read(row: Mapping[str, Any]) -> HeldOut:
            """Encodes the row, so that one that cannot be used ends the run before its first step."""
            held_out = HeldOut(*encoder.request_and_answer(row))
            ids = encode_chat(tokenizer, held_out.request, add_generation_prompt=True).ids
            if len(ids) >= context:
                raise InputError(f"a request of {len(ids)} ids found, the model's context is {context}; leave the row out")
            return held_out

        columns = encoder.format.columns
        self.rows = {each.name: read_first_rows(each.path, columns, each.limit, read) for each in self._sets}

    def __call__(self, model: Llama) -> dict[str, float]:
        language_model = self._trained(model)
        values = {}
        for item in self._sets:
            rows = self.rows[item.name]
            answers = language_model.answer([row.request for row in rows], item.max_new_tokens)
            values[_measure(item)] = exact_fraction([row.answer for row in rows], answers)
        return values


def _measure(item: EvaluationSet) -> str:
    return f"{item.name}/answers_exact"
