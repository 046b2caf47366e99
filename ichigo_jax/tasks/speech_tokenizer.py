"""Training the speech tokenizer: Whisper with or without the bottleneck, on speech and its text.

Objective: cross-entropy of the text, plus, through the bottleneck, the commitment of the encoder to its codes and, by
choice, the divergence from Whisper's own predictions (``ichigo_asr``'s phase 1) and from the codes' stability under noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import grain
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
from ichigo_jax.tasks.mixture import mixed_examples, mixed_rows, source_metrics, source_report, source_shapes, source_totals
from ichigo_jax.tasks.task import Scalars, check_equal, check_evaluation, check_weights
from ichigo_jax.text.whisper import WhisperText
from ichigo_jax.training.losses import count_rows, count_targets, cross_entropy_sums, divergence_sum, token_cross_entropy
from ichigo_jax.training.run_config import RunConfig

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
class Source:
    """A manifest, the language of its texts (as Whisper abbreviates it) and how often it is drawn, relative to the others."""

    path: str
    language: str
    weight: float


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Held-out clips: the first ``limit`` rows of a manifest, reported as ``name/…``."""

    name: str
    path: str
    language: str
    limit: int


@dataclasses.dataclass(frozen=True)
class SpeechData:
    """What is read.

    Attributes:
      text_tokenizer: a Hugging Face tokenizer folder with Whisper's special tokens.
      pad: how clips fill the context. "audio", as the originals train: with zero samples, heard as silence; the mask code takes
        their place after the last encoder state. "mel", as all tokenize: with padding in the log-mel spectrogram; the mask code
        comes after the last whole code.
      text_length, predict_prompt, normalize, concatenate: see ``data.speech.Layout``.
    """

    text_tokenizer: str
    text_length: int
    predict_prompt: bool
    pad: Literal["audio", "mel"]
    normalize: bool
    concatenate: bool
    sources: tuple[Source, ...]
    evaluation: tuple[EvaluationSet, ...]

    def __post_init__(self):
        if self.text_length < 1:
            raise InputError(f"text_length {self.text_length} found, expected at least 1")
        check_weights([source.weight for source in self.sources])
        check_evaluation(self.evaluation)


@dataclasses.dataclass(frozen=True)
class SpeechObjective:
    """What is minimised.

    Attributes:
      bottleneck: whether the decoder hears through the codes, or the encoder's states as they are (plain Whisper).
      kl_weight: of the divergence from the predictions of Whisper without the bottleneck, which must be frozen.
      noise_weight: of the mean square by which noise moves what becomes the codes.
      noise_snr_db: lowest and highest signal-to-noise ratio of that noise.
    """

    bottleneck: bool
    kl_weight: float
    noise_weight: float
    noise_snr_db: tuple[float, ...]

    def __post_init__(self):
        for name in ("kl_weight", "noise_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} {getattr(self, name)} found, expected a finite number, 0 or more")
        ratios = self.noise_snr_db
        if len(ratios) != 2 or not -math.inf < ratios[0] <= ratios[1] < math.inf:
            raise InputError(f"noise_snr_db {ratios} found, expected the lowest and the highest, both finite")


class SpeechTokenizerTask:
    """See ``tasks.task.Task``."""

    def __init__(self, config: RunConfig, workdir: Path | None):
        self.config = config
        self.model_config = configuration.from_dict(SpeechTokenizerConfig, config.model, "config.model")
        self.data = configuration.from_dict(SpeechData, config.data, "config.data")
        self.objective = configuration.from_dict(SpeechObjective, config.objective, "config.objective")
        self._check_objective()
        if workdir is not None:
            self.read_model()
            self._read_data(workdir)

    def read_model(self) -> None:
        self.text = WhisperText.from_folder(self.data.text_tokenizer)
        if self.text.size > self.model_config.whisper.n_vocab:
            n_vocab = self.model_config.whisper.n_vocab
            raise InputError(f"{self.data.text_tokenizer}: ids up to {self.text.size - 1}, expected fewer than n_vocab {n_vocab}")

    def _read_data(self, workdir: Path) -> None:
        self.faults_file = hosts.own_file(workdir / "skipped_clips.jsonl")
        faults = FaultLog(self.faults_file)
        self._sources = [self._examples(source, faults) for source in self.data.sources]
        self._evaluation = [(item, self._held_out(item)) for item in self.data.evaluation]

    def _held_out(self, item: EvaluationSet) -> list[dict[str, Any]]:
        """Rows of an evaluation set. Decodes each clip once, so that a bad clip ends the run before its first step."""
        self.text.prompt_in(item.language)  # refuses a language that the vocabulary lacks
        rows = read_transcripts(item.path)[: item.limit]
        check_clips(item.path, rows, MAX_SECONDS, MAX_BYTES)
        return rows

    @property
    def measures(self) -> tuple[str, ...]:
        if not self.objective.bottleneck:
            return ()
        return tuple(f"{item.name}/{rate}" for item in self.data.evaluation for rate in ERROR_RATES)

    def _check_objective(self) -> None:
        objective, frozen = self.objective, self.config.optimizer.frozen
        if self.config.train.attention != "xla":
            raise InputError(f"train.attention {self.config.train.attention!r} found, expected 'xla': Whisper has no other")
        if not objective.bottleneck and (objective.kl_weight or objective.noise_weight):
            raise InputError("kl_weight or noise_weight found without the bottleneck, expected 0: they train it")
        if objective.kl_weight and "whisper" not in frozen:
            raise InputError(f"kl_weight {objective.kl_weight} found with frozen {frozen}, expected 'whisper' in it: it teaches")

    def _examples(self, source: Source, faults: FaultLog) -> SpeechExamples:
        data = self.data
        layout = Layout(
            samples=self.model_config.context_samples,
            text_length=data.text_length,
            predict_prompt=data.predict_prompt,
            normalize=data.normalize,
            concatenate=data.concatenate,
        )
        prompt = self.text.prompt_in(source.language)
        return SpeechExamples(read_transcripts(source.path), self.text.encode, prompt, self.text.end, layout, faults)

    def make_model(self, rngs: nnx.Rngs) -> SpeechTokenizerModel:
        return SpeechTokenizerModel(self.model_config, rngs)

    def load_model(self, folder: str, mesh: Mesh) -> SpeechTokenizerModel:
        """From a speech tokenizer, or from a Whisper alone; then the bottleneck starts from random parameters."""
        if read_json(Path(folder) / "config.json").get("kind") != "whisper":
            found = load_config(folder, KIND, SpeechTokenizerConfig)
            check_equal(folder, found.whisper, self.model_config.whisper)
            check_equal(folder, found.quantizer, self.model_config.quantizer, but=OF_TRAINING)
            return load_model(folder, self.make_model, self.config.train.param_dtype, mesh)
        expected = self.model_config.whisper
        check_equal(folder, load_config(folder, "whisper", WhisperConfig), expected)
        model = nnx.eval_shape(lambda: self.make_model(nnx.Rngs(0)))
        model.whisper = load_model(folder, lambda rngs: Whisper(expected, rngs), self.config.train.param_dtype, mesh)
        random = lambda: nnx.state(Quantizer(self.model_config.quantizer, nnx.Rngs(self.config.seed)))  # noqa: E731
        nnx.update(model.quantizer, jax.jit(random, out_shardings=replicated(mesh))())
        return model

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        B, S, L = self.config.train.batch_size, self.model_config.context_samples, self.data.text_length
        text = jax.ShapeDtypeStruct((B, L), jnp.int32)
        audio = {"audio": jax.ShapeDtypeStruct((B, S), jnp.float32), "samples": jax.ShapeDtypeStruct((B,), jnp.int32)}
        return {**audio, "inputs": text, "targets": text, **source_shapes(self.data.sources, B)}

    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.model_config.quantizer.code_positions

    def examples(self) -> grain.MapDataset:
        return mixed_examples(self._sources, self.data, self.config)

    def rows_of_batch(self, number: int) -> dict[str, list[int]]:
        return mixed_rows(self._sources, self.data, self.config, number)

    def data_sizes(self) -> list[int]:
        return [len(source) for source in self._sources]

    def totals(self, batch: Mapping[str, jax.Array]) -> Scalars:
        return {
            "targets": count_targets(batch["targets"]),
            "rows": count_rows(batch["targets"]),
            "codes": _count(self._statistics_mask(batch)),
            "heard_codes": _count(self._heard(batch)),
            **source_totals(batch, self.data),
        }

    def loss(
        self, model: SpeechTokenizerModel, batch: Mapping[str, jax.Array], totals: Scalars, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        objective, remat = self.objective, self.config.train.remat
        encoded = self._encode(model, batch["audio"], batch)
        states, loss, metrics = encoded, 0.0, {}
        if objective.noise_weight:
            loss, metrics = self._noise_loss(model, encoded, batch, totals, key)
        if objective.bottleneck:
            out = model.quantizer(encoded, self._frame_mask(batch), train=True, key=key, remat=remat)
            states = out.states
            commitment = out.commitment * self._statistics_mask(batch).sum() / totals["codes"]
            counts = self._count_codes(out.codes[..., 0], self._heard(batch))
            loss, metrics = loss + commitment, {**metrics, "commitment": commitment, "code_counts": counts}

        logits = model.whisper.decoder(batch["inputs"], states, remat)
        if objective.kl_weight:
            teacher = jax.lax.stop_gradient(model.whisper.decoder(batch["inputs"], encoded, remat))
            divergence = divergence_sum(logits, teacher, batch["targets"]) / totals["rows"]
            loss, metrics = loss + objective.kl_weight * divergence, {**metrics, "kl": divergence}
        cross_entropy, correct = cross_entropy_sums(logits, batch["targets"])
        cross_entropy, correct = cross_entropy / totals["targets"], correct / totals["targets"]
        by_source = source_metrics(batch, token_cross_entropy(logits, batch["targets"]), totals)
        return loss + cross_entropy, {"cross_entropy": cross_entropy, "accuracy": correct, **by_source, **metrics}

    def _encode(self, model: SpeechTokenizerModel, audio: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Whisper's states of the batch's audio, or of a noisy version. [B, S] -> [B, T, D]."""
        lengths = batch["samples"] if self.data.pad == "mel" else jnp.full_like(batch["samples"], audio.shape[1])
        mel = model.log_mel(audio, lengths).astype(self.config.train.compute_dtype)
        return model.whisper.encoder(mel, self.config.train.remat)

    def _noise_loss(
        self, model: SpeechTokenizerModel, encoded: jax.Array, batch: Mapping[str, jax.Array], totals: Scalars, key: jax.Array
    ) -> tuple[jax.Array, Scalars]:
        """How far noise moves what becomes the codes, weighted, and the share of codes that it leaves as they are."""
        noisy_audio = add_noise(batch["audio"], batch["samples"], self.objective.noise_snr_db, jax.random.fold_in(key, NOISE))
        noisy = self._encode(model, noisy_audio, batch)
        clean = jax.lax.stop_gradient(model.quantizer.projections(encoded))
        heard = self._heard(batch)
        moved = jnp.square(model.quantizer.projections(noisy) - clean).mean(-1)
        consistency = (moved * heard).sum() / totals["heard_codes"]
        kept = (model.quantizer.codes(noisy) == model.quantizer.codes(encoded)).all(-1)
        metrics = {"noise_consistency": consistency, "codes_kept_under_noise": (kept & heard).sum() / totals["heard_codes"]}
        return self.objective.noise_weight * consistency, metrics

    def report(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        values = source_report(metrics, [source.path for source in self.data.sources])
        counts = values.pop("code_counts", None)
        return values if counts is None else {**values, **codebook_statistics(counts)}

    def evaluate(self, model: SpeechTokenizerModel) -> dict[str, float]:
        if not self.objective.bottleneck:
            return {}
        tokenizer = SpeechTokenizer(model, self.model_config, self.text)
        values: dict[str, float] = {}
        for item, rows in self._evaluation:
            found = tokenizer.transcribe([row["path"] for row in rows], language=item.language)
            rates = error_rates([row["text"] for row in rows], found)
            values |= {f"{item.name}/{name}": rate for name, rate in rates.items()}
        return values

    def save(self, model: SpeechTokenizerModel, folder: Path, origin: Mapping[str, Any]) -> None:
        state = nnx.to_pure_dict(nnx.state(model))
        provenance = {**origin, "init_from": self.config.init_from, "fingerprint": fingerprint(state)}
        save_model(folder, KIND, self.model_config, state, provenance, self.data.text_tokenizer)

    def _heard(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """[B, code positions] bool: which codes a clip keeps."""
        positions = jnp.arange(self.model_config.quantizer.code_positions)
        return positions < self.model_config.code_count(batch["samples"])[:, None]

    def _frame_mask(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """[B, T] bool: where the decoder hears codes and not the mask code."""
        quantizer = self.model_config.quantizer
        if self.data.pad == "mel":
            return jnp.repeat(self._heard(batch), quantizer.downsample, axis=1)
        return jnp.arange(quantizer.positions) < (frame_count(batch["samples"]) // FRAMES_PER_STATE)[:, None]

    def _statistics_mask(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """[B, code positions] bool: which codes count for the commitment."""
        heard = self._heard(batch)
        return heard if self.model_config.quantizer.statistics_over == "audio_frames" else jnp.ones_like(heard)

    def _count_codes(self, codes: jax.Array, heard: jax.Array) -> jax.Array:
        """How often each code but the mask code occurs in the first codebook. [B, n] twice -> [vq_codes]."""
        quantizer = self.model_config.quantizer
        counts = jnp.zeros(quantizer.codes).at[codes].add(heard)
        return counts if quantizer.mask_code is None else jnp.delete(counts, quantizer.mask_code, assume_unique_indices=True)


def _count(mask: jax.Array) -> jax.Array:
    """Number of True, at least 1, as a float32 scalar."""
    return jnp.maximum(mask.sum(), 1).astype(jnp.float32)
