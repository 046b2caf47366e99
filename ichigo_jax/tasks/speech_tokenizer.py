"""Training the speech tokenizer: Whisper with or without the bottleneck, on speech and its text.

Objective: cross-entropy of the text, plus, through the bottleneck, the commitment of the encoder to its codes and, by
choice, the divergence from Whisper's own predictions (``ichigo_asr``'s phase 1) and from the codes' stability under noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax import configuration
from ichigo_jax.audio.log_mel import frame_count
from ichigo_jax.audio.noise import add_noise
from ichigo_jax.data.faults import FaultLog
from ichigo_jax.data.speech import Layout, SpeechExamples, check_clips, read_transcripts
from ichigo_jax.errors import InputError
from ichigo_jax.evaluation.codebook import codebook_statistics
from ichigo_jax.evaluation.text import error_rates
from ichigo_jax.inference.speech_tokenizer import MAX_BYTES, MAX_SECONDS, SpeechTokenizer
from ichigo_jax.models.quantizer import Quantizer
from ichigo_jax.models.speech_tokenizer import FRAMES_PER_STATE, SpeechTokenizerConfig, SpeechTokenizerModel
from ichigo_jax.models.whisper import Whisper, WhisperConfig
from ichigo_jax.parallel import hosts, replicated
from ichigo_jax.storage import read_json
from ichigo_jax.storage.model_folder import fingerprint, load_config, load_model, save_model
from ichigo_jax.tasks.mixture import Mixture, source_metrics, source_report, source_shapes, source_totals
from ichigo_jax.tasks.task import check_equal
from ichigo_jax.text.whisper import WhisperText
from ichigo_jax.training.losses import Scalars, count_rows, count_targets, cross_entropy_sums, divergence_sum
from ichigo_jax.training.run_config import RunConfig
from ichigo_jax.training.speech_config import EvaluationSet, Source, SpeechData, SpeechObjective

KIND = "speech_tokenizer"
ERROR_RATES = ("wer", "cer")  # what ``error_rates`` gives
# Numbers of the quantiser that a run may set otherwise than the model that it starts from.
OF_TRAINING = (
    "codebook_decay",
    "threshold_ema_dead_code",
    "laplace_eps",
    "commitment_weight",
    "statistics_over",
    "init_std",
    "embeddings_std",
)
NOISE = 0x6E6F  # keeps the random numbers of the noise apart from the quantisers'


@dataclasses.dataclass(frozen=True)
class SpeechSections:
    """The config's sections in the fields of this task."""

    model: SpeechTokenizerConfig
    data: SpeechData
    objective: SpeechObjective

    @classmethod
    def of(cls, config: RunConfig) -> SpeechSections:
        """Raises ``InputError`` where sections are wrong, or do not go together."""
        sections = cls(
            configuration.from_dict(SpeechTokenizerConfig, config.model, "config.model"),
            configuration.from_dict(SpeechData, config.data, "config.data"),
            configuration.from_dict(SpeechObjective, config.objective, "config.objective"),
        )
        objective, frozen, attention = sections.objective, config.optimizer.frozen, config.train.attention
        if attention != "xla":
            raise InputError(f"train.attention {attention!r} found, expected 'xla': Whisper has no other")
        if not objective.bottleneck and (objective.kl_weight or objective.noise_weight):
            raise InputError("kl_weight or noise_weight found without the bottleneck, expected 0: they train it")
        if objective.kl_weight and "whisper" not in frozen:
            raise InputError(f"kl_weight {objective.kl_weight} found with frozen {frozen}, expected 'whisper' in it: it teaches")
        return sections


# ---- what is trained -------------------------------------------------------------------------------------------------


class Masks(NamedTuple):
    """Which positions of a batch count, bool.

    Attributes:
      heard: [B, code positions], the codes that a clip keeps.
      statistics: [B, code positions], the codes that count for the commitment.
      frames: [B, T], where the decoder hears codes and not the mask code.
    """

    heard: jax.Array
    statistics: jax.Array
    frames: jax.Array


class SpeechTokenizerTask:
    """See ``tasks.task.Task``."""

    def __init__(self, config: RunConfig):
        self._config, sections = config, SpeechSections.of(config)
        self.model_config, self._data, self._objective = sections.model, sections.data, sections.objective

    def make_model(self, rngs: nnx.Rngs) -> SpeechTokenizerModel:
        return SpeechTokenizerModel(self.model_config, rngs)

    def load_model(self, folder: str, mesh: Mesh) -> SpeechTokenizerModel:
        """From a speech tokenizer, or from a Whisper alone; then the bottleneck starts from random parameters."""
        if read_json(Path(folder) / "config.json").get("kind") != "whisper":
            found = load_config(folder, KIND, SpeechTokenizerConfig)
            check_equal(folder, found.whisper, self.model_config.whisper)
            check_equal(folder, found.quantizer, self.model_config.quantizer, but=OF_TRAINING)
            return load_model(folder, self.make_model, self._config.train.param_dtype, mesh)
        expected = self.model_config.whisper
        check_equal(folder, load_config(folder, "whisper", WhisperConfig), expected)
        model = nnx.eval_shape(lambda: self.make_model(nnx.Rngs(0)))
        model.whisper = load_model(folder, lambda rngs: Whisper(expected, rngs), self._config.train.param_dtype, mesh)
        random = lambda: nnx.state(Quantizer(self.model_config.quantizer, nnx.Rngs(self._config.seed)))  # noqa: E731
        nnx.update(model.quantizer, jax.jit(random, out_shardings=replicated(mesh))())
        return model

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        B, S, L = self._config.train.batch_size, self.model_config.context_samples, self._data.text_length
        text = jax.ShapeDtypeStruct((B, L), jnp.int32)
        audio = {"audio": jax.ShapeDtypeStruct((B, S), jnp.float32), "samples": jax.ShapeDtypeStruct((B,), jnp.int32)}
        return {**audio, "inputs": text, "targets": text, **source_shapes(self._data.sources, B)}

    def tokens_per_step(self) -> int:
        return self._config.train.batch_size * self.model_config.quantizer.code_positions

    def totals(self, batch: Mapping[str, jax.Array]) -> Scalars:
        masks = self._masks(batch)
        return {
            "targets": count_targets(batch["targets"]),
            "rows": count_rows(batch["targets"]),
            "codes": _count(masks.statistics),
            "heard_codes": _count(masks.heard),
            **source_totals(batch, self._data),
        }

    def loss(
        self, model: SpeechTokenizerModel, batch: Mapping[str, jax.Array], totals: Scalars, key: jax.Array
    ) -> tuple[jax.Array, Scalars]:
        objective, remat, masks = self._objective, self._config.train.remat, self._masks(batch)
        encoded = self._encode(model, batch["audio"], batch)
        states, loss, metrics = encoded, 0.0, {}
        if objective.noise_weight:
            loss, metrics = self._noise_loss(model, encoded, batch, masks.heard, totals, key)
        if objective.bottleneck:
            out = model.quantizer(encoded, masks.frames, train=True, key=key, remat=remat)
            states = out.states
            commitment = out.commitment * masks.statistics.sum() / totals["codes"]
            counts = self._count_codes(out.codes[..., 0], masks.heard)
            loss, metrics = loss + commitment, {**metrics, "commitment": commitment, "code_counts": counts}

        logits = model.whisper.decoder(batch["inputs"], states, remat)
        if objective.kl_weight:
            teacher = jax.lax.stop_gradient(model.whisper.decoder(batch["inputs"], encoded, remat))
            divergence = divergence_sum(logits, teacher, batch["targets"]) / totals["rows"]
            loss, metrics = loss + objective.kl_weight * divergence, {**metrics, "kl": divergence}
        sums = cross_entropy_sums(logits, batch["targets"])
        cross_entropy, correct = sums.total / totals["targets"], sums.correct / totals["targets"]
        by_source = source_metrics(batch, sums.of_tokens, totals)
        return loss + cross_entropy, {"cross_entropy": cross_entropy, "accuracy": correct, **by_source, **metrics}

    def report(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        values = source_report(metrics, [source.path for source in self._data.sources])
        counts = values.pop("code_counts", None)
        return values if counts is None else {**values, **codebook_statistics(counts)}

    def _encode(self, model: SpeechTokenizerModel, audio: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Whisper's states of the batch's audio, or of a noisy version. [B, S] -> [B, T, D]."""
        lengths = batch["samples"] if self._data.pad == "mel" else jnp.full_like(batch["samples"], audio.shape[1])
        mel = model.log_mel(audio, lengths).astype(self._config.train.compute_dtype)
        return model.whisper.encoder(mel, self._config.train.remat)

    def _noise_loss(
        self,
        model: SpeechTokenizerModel,
        encoded: jax.Array,
        batch: Mapping[str, jax.Array],
        heard: jax.Array,
        totals: Scalars,
        key: jax.Array,
    ) -> tuple[jax.Array, Scalars]:
        """How far noise moves what becomes the codes, weighted, and the share of codes that it leaves as they are."""
        noisy_audio = add_noise(batch["audio"], batch["samples"], self._objective.noise_snr_db, jax.random.fold_in(key, NOISE))
        noisy = self._encode(model, noisy_audio, batch)
        clean = jax.lax.stop_gradient(model.quantizer.projections(encoded))
        moved = jnp.square(model.quantizer.projections(noisy) - clean).mean(-1)
        consistency = (moved * heard).sum() / totals["heard_codes"]
        kept = (model.quantizer.codes(noisy) == model.quantizer.codes(encoded)).all(-1)
        metrics = {"noise_consistency": consistency, "codes_kept_under_noise": (kept & heard).sum() / totals["heard_codes"]}
        return self._objective.noise_weight * consistency, metrics

    def _masks(self, batch: Mapping[str, jax.Array]) -> Masks:
        quantizer, samples = self.model_config.quantizer, batch["samples"]
        heard = jnp.arange(quantizer.code_positions) < self.model_config.code_count(samples)[:, None]
        if self._data.pad == "mel":
            frames = jnp.repeat(heard, quantizer.downsample, axis=1)
        else:
            frames = jnp.arange(quantizer.positions) < (frame_count(samples) // FRAMES_PER_STATE)[:, None]
        return Masks(heard, heard if quantizer.statistics_over == "audio_frames" else jnp.ones_like(heard), frames)

    def _count_codes(self, codes: jax.Array, heard: jax.Array) -> jax.Array:
        """How often each code but the mask code occurs in the first codebook. [B, n] twice -> [vq_codes]."""
        quantizer = self.model_config.quantizer
        counts = jnp.zeros(quantizer.codes).at[codes].add(heard)
        return counts if quantizer.mask_code is None else jnp.delete(counts, quantizer.mask_code, assume_unique_indices=True)


def _count(mask: jax.Array) -> jax.Array:
    """Number of True, at least 1, as a float32 scalar."""
    return jnp.maximum(mask.sum(), 1).astype(jnp.float32)


planned_task = SpeechTokenizerTask  # as ``tasks`` calls it: the config says all of the model


# ---- the model folder ------------------------------------------------------------------------------------------------


class SpeechTokenizerFiles:
    """See ``tasks.task.ModelFiles``.

    Attributes:
      text: Whisper's text tokenizer.
    """

    def __init__(self, config: RunConfig):
        self._config, self._sections = config, SpeechSections.of(config)
        self.task = SpeechTokenizerTask(config)
        folder, n_vocab = self._sections.data.text_tokenizer, self._sections.model.whisper.n_vocab
        self.text = WhisperText.from_folder(folder)
        if self.text.size > n_vocab:
            raise InputError(f"{folder}: ids up to {self.text.size - 1}, expected fewer than n_vocab {n_vocab}")

    def open_evaluation(self) -> SpeechEvaluation:
        return SpeechEvaluation(self._sections, self.text)

    def open_data(self, workdir: Path) -> Mixture:
        data = self._sections.data
        faults_file = hosts.own_file(workdir / "skipped_clips.jsonl")
        faults = FaultLog(faults_file)
        layout = Layout(
            samples=self._sections.model.context_samples,
            text_length=data.text_length,
            predict_prompt=data.predict_prompt,
            normalize=data.normalize,
            concatenate=data.concatenate,
        )

        def examples(source: Source) -> SpeechExamples:
            prompt = self.text.prompt_in(source.language)
            return SpeechExamples(read_transcripts(source.path), self.text.encode, prompt, self.text.end, layout, faults)

        return Mixture([*map(examples, data.sources)], data, self._config, faults_file)

    def save(self, model: SpeechTokenizerModel, folder: Path, origin: Mapping[str, Any]) -> None:
        state = nnx.to_pure_dict(nnx.state(model))
        provenance = {**origin, "init_from": self._config.init_from, "fingerprint": fingerprint(state)}
        save_model(folder, KIND, self._sections.model, state, provenance, self._sections.data.text_tokenizer)


open_files = SpeechTokenizerFiles  # as ``tasks`` calls it


# ---- the evaluation --------------------------------------------------------------------------------------------------


class SpeechEvaluation:
    """See ``tasks.task.Evaluation``: error rates of what is heard through the codes; without the bottleneck, nothing.

    Attributes:
      rows: of each evaluation set, by its name: the path and the text of each clip.
    """

    def __init__(self, sections: SpeechSections, text: WhisperText):
        self._model_config, self._text, self._sets = sections.model, text, sections.data.evaluation
        self.rows = {each.name: self._read(each) for each in self._sets}
        names = [f"{each.name}/{rate}" for each in self._sets for rate in ERROR_RATES]
        self.measures = tuple(names if sections.objective.bottleneck else ())

    def _read(self, item: EvaluationSet) -> list[dict[str, Any]]:
        """Decodes each clip once, so that a bad clip ends the run before its first step."""
        self._text.prompt_in(item.language)  # refuses a language that the vocabulary lacks
        rows = read_transcripts(item.path)[: item.limit]
        check_clips(item.path, rows, MAX_SECONDS, MAX_BYTES)
        return rows

    def __call__(self, model: SpeechTokenizerModel) -> dict[str, float]:
        if not self.measures:
            return {}
        tokenizer = SpeechTokenizer(model, self._model_config, self._text)
        values: dict[str, float] = {}
        for item in self._sets:
            rows = self.rows[item.name]
            found = tokenizer.transcribe([row["path"] for row in rows], language=item.language)
            rates = error_rates([row["text"] for row in rows], found)
            values |= {f"{item.name}/{name}": rate for name, rate in rates.items()}
        return values
