"""Ichigo in JAX: speech as tokens, and a language model that hears them.

Names load on first use, so ``import ichigo_jax`` costs nothing.
"""

from __future__ import annotations

import importlib
import os

# transformers is here for its tokenizers, which need no PyTorch; it would tell every user of every command that there is none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"

_HOMES = {
    "PlainWhisper": "ichigo_jax.inference.plain_whisper",
    "SpeechTokenizer": "ichigo_jax.inference.speech_tokenizer",
    "LanguageModel": "ichigo_jax.inference.language_model",
    "Assistant": "ichigo_jax.inference.assistant",
    "Spoken": "ichigo_jax.inference.assistant",
    "Sampling": "ichigo_jax.decoding.sampling",
    "DecodingOptions": "ichigo_jax.inference.decoding_options",
    "WHISPER_DEFAULTS": "ichigo_jax.inference.decoding_options",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'ichigo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
