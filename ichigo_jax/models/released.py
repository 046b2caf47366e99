"""The sizes of the released models, each once: OpenAI's Whispers, and the text models that Ichigo starts from.

Sources: ``whisper.model.ModelDimensions`` of OpenAI's checkpoints, and ``config.json`` of the folders on the hub.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LlamaConfig, RopeScaling
from ichigo_jax.models.whisper import WhisperConfig

# ---- Whisper ---------------------------------------------------------------------------------------------------------

ENGLISH, MULTILINGUAL, MULTILINGUAL_V3 = 51_864, 51_865, 51_866  # rows of the decoder's embedding


class WhisperVocabulary(NamedTuple):
    """What a number of rows says: whether there are languages to choose from, and how many Whisper's tokenizer has."""

    multilingual: bool
    languages: int


WHISPER_VOCABULARIES = {
    ENGLISH: WhisperVocabulary(False, 99),
    MULTILINGUAL: WhisperVocabulary(True, 99),
    MULTILINGUAL_V3: WhisperVocabulary(True, 100),
}


def _whisper(width: int, layers: int, n_vocab: int, decoder_layers: int | None = None) -> WhisperConfig:
    heads = width // 64
    return WhisperConfig(
        n_mels=128 if n_vocab == MULTILINGUAL_V3 else 80,
        n_audio_ctx=1500,
        n_audio_state=width,
        n_audio_head=heads,
        n_audio_layer=layers,
        n_vocab=n_vocab,
        n_text_ctx=448,
        n_text_state=width,
        n_text_head=heads,
        n_text_layer=layers if decoder_layers is None else decoder_layers,
        layer_norm_eps=1e-5,
    )


WHISPERS = {
    "tiny": _whisper(384, 4, MULTILINGUAL),
    "tiny.en": _whisper(384, 4, ENGLISH),
    "base": _whisper(512, 6, MULTILINGUAL),
    "base.en": _whisper(512, 6, ENGLISH),
    "small": _whisper(768, 12, MULTILINGUAL),
    "small.en": _whisper(768, 12, ENGLISH),
    "medium": _whisper(1024, 24, MULTILINGUAL),
    "medium.en": _whisper(1024, 24, ENGLISH),
    "large-v2": _whisper(1280, 32, MULTILINGUAL),  # and large-v1, which differs in its weights alone
    "large-v3": _whisper(1280, 32, MULTILINGUAL_V3),
    "large-v3-turbo": _whisper(1280, 32, MULTILINGUAL_V3, decoder_layers=4),
}


def whisper_name(config: WhisperConfig) -> str | None:
    """The released model of these dimensions, whatever its audio context; None where there is none."""
    same = (name for name, released in WHISPERS.items() if dataclasses.replace(config, n_audio_ctx=1500) == released)
    return next(same, None)


def whispers_of_width(width: int) -> list[str]:
    """The released models whose encoder has this width."""
    return [name for name, released in WHISPERS.items() if released.n_audio_state == width]


# ---- text models -----------------------------------------------------------------------------------------------------


class TextModel(NamedTuple):
    """A released text model with the sound tokens of 512 codes and their mask code in its vocabulary.

    Attributes:
      name: as its folder is called.
      llama: its numbers.
      large: whether training needs more than one chip's memory.
    """

    name: str
    llama: LlamaConfig
    large: bool


def _text_model(
    family: dict[str, Any],
    name: str,
    width: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head: int,
    tied: bool,
    large: bool,
) -> TextModel:
    network = LlamaConfig(
        **family,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        tie_word_embeddings=tied,
        initializer_range=0.02,
    )
    return TextModel(name, network, large)


def _llama(factor: float) -> dict[str, Any]:
    return {
        "architecture": "llama",
        "vocab_size": 128_771,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": RopeScaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        "attention_bias": False,
    }


_QWEN: dict[str, Any] = {
    "architecture": "qwen2",
    "vocab_size": 152_180,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "attention_bias": True,
}

TEXT_MODELS = {
    "1b": _text_model(_llama(32.0), "llama-3.2-1b-instruct", 2048, 8192, 16, 32, 8, 64, tied=True, large=False),
    "3b": _text_model(_llama(32.0), "llama-3.2-3b-instruct", 3072, 8192, 28, 24, 8, 128, tied=True, large=False),
    "8b": _text_model(_llama(8.0), "llama-3.1-8b-instruct", 4096, 14_336, 32, 32, 8, 128, tied=False, large=True),
    "70b": _text_model(_llama(8.0), "llama-3.1-70b-instruct", 8192, 28_672, 80, 64, 8, 128, tied=False, large=True),
    "qwen0.5b": _text_model(_QWEN, "qwen2.5-0.5b-instruct", 896, 4864, 24, 14, 2, 64, tied=True, large=False),
    "qwen1.5b": _text_model(_QWEN, "qwen2.5-1.5b-instruct", 1536, 8960, 28, 12, 2, 128, tied=True, large=False),
    "qwen7b": _text_model(_QWEN, "qwen2.5-7b-instruct", 3584, 18_944, 28, 28, 4, 128, tied=False, large=True),
    "qwen32b": _text_model(_QWEN, "qwen2.5-32b-instruct", 5120, 27_648, 64, 40, 8, 128, tied=False, large=True),
}


def text_model(size: str) -> TextModel:
    """The released text model of that size.

    Raises:
      InputError: no such size.
    """
    if size not in TEXT_MODELS:
        raise InputError(f"size {size!r} found, expected one of {', '.join(TEXT_MODELS)}")
    return TEXT_MODELS[size]
