"""The sections of a config that are the speech tokenizer's own: its data and objective."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ichigo_jax.errors import InputError
from ichigo_jax.training.mixture_config import check_evaluation, check_weights


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
