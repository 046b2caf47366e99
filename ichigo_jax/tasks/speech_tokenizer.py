"""Training the speech tokenizer: Whisper with or without the bottleneck, on speech and its text.

Objective: cross-entropy of the text, plus, through the bottleneck, the commitment of the encoder to its codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax import configuration
from ichigo_jax.data.loading import training_batches
from ichigo_jax.data.speech import FaultLog, SpeechExamples, read_transcripts
from ichigo_jax.errors import InputError
from ichigo_jax.evaluation.codebook import codebook_statistics
from ichigo_jax.evaluation.text import error_rates
from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer
from ichigo_jax.models.folder import fingerprint, load_config, load_model, save_model
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig, SpeechTokenizerModel
from ichigo_jax.tasks.task import Scalars
from ichigo_jax.text.whisper import WhisperText
from ichigo_jax.training.losses import count_targets, cross_entropy_sums
from ichigo_jax.training.run_config import RunConfig

KIND = "speech_tokenizer"


@dataclasses.dataclass(frozen=True)
class Source:
    """A manifest and how often it is drawn, relative to the others."""

    path: str
    weight: float


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Held-out clips: the first ``limit`` rows of a manifest, reported as ``name/…``."""

    name: str
    path: str
    limit: int


@dataclasses.dataclass(frozen=True)
class SpeechData:
    """What is read.

    Attributes:
      text_tokenizer: a Hugging Face tokenizer folder with Whisper's special tokens.
      language: of the texts, as Whisper abbreviates it.
      text_length: tokens of prompt, text and end together.
    """

    text_tokenizer: str
    language: str
    text_length: int
    sources: tuple[Source, ...]
    evaluation: tuple[EvaluationSet, ...]


@dataclasses.dataclass(frozen=True)
class SpeechObjective:
    """What is minimised.

    Attributes:
      bottleneck: whether the decoder hears through the codes, or the encoder's states as they are (plain Whisper).
    """

    bottleneck: bool


class SpeechTokenizerTask:
    """See ``tasks.task.Task``."""

    def __init__(self, config: RunConfig, workdir: Path):
        self.config = config
        self.model_config = configuration.from_dict(SpeechTokenizerConfig, config.model, "config.model")
        self.data = configuration.from_dict(SpeechData, config.data, "config.data")
        self.objective = configuration.from_dict(SpeechObjective, config.objective, "config.objective")
        self.text = WhisperText.from_folder(self.data.text_tokenizer)
        if self.text.size > self.model_config.whisper.n_vocab:
            n_vocab = self.model_config.whisper.n_vocab
            raise InputError(f"{self.data.text_tokenizer}: ids up to {self.text.size - 1}, expected fewer than n_vocab {n_vocab}")
        faults = FaultLog(workdir / "skipped_clips.jsonl")
        self._sources = [self._examples(source.path, faults) for source in self.data.sources]
        self._evaluation = [(item, read_transcripts(item.path)[: item.limit]) for item in self.data.evaluation]

    def _examples(self, manifest: str, faults: FaultLog) -> SpeechExamples:
        rows = read_transcripts(manifest)
        return SpeechExamples(
            rows,
            token_ids=[self.text.encode(row["text"]) for row in rows],
            prompt=self.text.prompt_in(self.data.language),
            end=self.text.end,
            seconds=self.model_config.context_samples / 16000,
            text_length=self.data.text_length,
            faults=faults,
        )

    def make_model(self, rngs: nnx.Rngs) -> SpeechTokenizerModel:
        return SpeechTokenizerModel(self.model_config, rngs)

    def load_model(self, folder: str, mesh: Mesh) -> SpeechTokenizerModel:
        load_config(folder, KIND, SpeechTokenizerConfig)
        return load_model(folder, self.make_model, jnp.float32, mesh)

    def batches(self) -> grain.MapDataset:
        sources = [grain.MapDataset.source(source) for source in self._sources]
        weights = [source.weight for source in self.data.sources]
        return training_batches(sources, weights, self.config.train.batch_size, self.config.seed)

    def data_sizes(self) -> list[int]:
        return [len(source) for source in self._sources]

    def totals(self, batch: Mapping[str, jax.Array]) -> Scalars:
        return {"targets": count_targets(batch["targets"]), "codes": self._statistics_mask(batch).sum().astype(jnp.float32)}

    def loss(
        self, model: SpeechTokenizerModel, batch: Mapping[str, jax.Array], totals: Scalars, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        remat = self.config.train.remat
        mel = model.log_mel(batch["audio"], batch["samples"]).astype(self.config.train.compute_dtype)
        states = model.whisper.encoder(mel, remat)
        commitment, metrics = 0.0, {}
        if self.objective.bottleneck:
            heard = jnp.repeat(self._heard(batch), self.model_config.quantizer.downsample, axis=1)
            out = model.quantizer(states, heard, train=True, key=key, remat=remat)
            states = out.states
            commitment = out.commitment * self._statistics_mask(batch).sum() / totals["codes"]
            metrics = {"commitment": commitment, "code_counts": self._count(out.codes[..., 0], self._heard(batch))}
        logits = model.whisper.decoder(batch["inputs"], states, remat)
        loss, correct = cross_entropy_sums(logits, batch["targets"])
        loss, correct = loss / totals["targets"], correct / totals["targets"]
        return loss + commitment, {"cross_entropy": loss, "accuracy": correct, **metrics}

    def report(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        values = dict(metrics)
        counts = values.pop("code_counts", None)
        return values if counts is None else {**values, **codebook_statistics(counts)}

    def evaluate(self, model: SpeechTokenizerModel) -> dict[str, float]:
        if not self.objective.bottleneck:
            return {}
        tokenizer = SpeechTokenizer(model, self.model_config, self.text)
        values: dict[str, float] = {}
        for item, rows in self._evaluation:
            rates = error_rates([row["text"] for row in rows], tokenizer.transcribe([row["path"] for row in rows]))
            values |= {f"{item.name}/{name}": rate for name, rate in rates.items()}
        return values

    def save(self, model: SpeechTokenizerModel, folder: Path) -> None:
        state = nnx.to_pure_dict(nnx.state(model))
        provenance = {"trained_by": "ichigo_jax.train", "init_from": self.config.init_from, "fingerprint": fingerprint(state)}
        save_model(folder, KIND, self.model_config, state, provenance, self.data.text_tokenizer)

    def _heard(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """[B, code positions] bool: which codes a clip keeps."""
        positions = jnp.arange(self.model_config.quantizer.code_positions)
        return positions < self.model_config.code_count(batch["samples"])[:, None]

    def _statistics_mask(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """[B, code positions] bool: which codes count for the commitment."""
        heard = self._heard(batch)
        return heard if self.model_config.quantizer.statistics_over == "audio_frames" else jnp.ones_like(heard)

    def _count(self, codes: jax.Array, heard: jax.Array) -> jax.Array:
        """How often each code but the mask code occurs in the first codebook. [B, n] twice -> [vq_codes]."""
        quantizer = self.model_config.quantizer
        counts = jnp.zeros(quantizer.codes).at[codes].add(heard)
        return counts if quantizer.mask_code is None else jnp.delete(counts, quantizer.mask_code, assume_unique_indices=True)
