"""Speech from text with espeak-ng, called in-process: an utterance takes less than 10 ms.

The engine comes as a wheel (``pip install espeakng-loader``) that carries the library and its voices, so no root and no
download at run time are needed. It is GPL software and therefore an optional extra, imported only when it is used.
Interface of the library: espeak-ng's ``speak_lib.h``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
from collections.abc import Iterator

import numpy as np
import soxr

from ichigo_jax.audio.decode import SAMPLE_RATE
from ichigo_jax.errors import InputError

SILENCE_BELOW = 0.02  # of the peak: what is quieter at either end of an utterance counts as silence
MARGIN_SECONDS = 0.05  # of that silence are kept

# speak_lib.h
_SYNCHRONOUS_OUTPUT = 2  # samples come to the callback before espeak_Synth returns
_DO_NOT_EXIT = 0x8000  # a fault at start is returned; without it the library ends the process
_RATE, _PITCH = 1, 3
_UTF8 = 1
_BY_CHARACTER = 1

_unload = ctypes.CDLL(None).dlclose


@dataclasses.dataclass(frozen=True)
class Voice:
    """One speaker.

    Attributes:
      name: how corpora call the speaker.
      language: an espeak-ng language, such as ``"en-us"``.
      variant: an espeak-ng variant, such as ``"f2"``; empty for the language's own voice.
      rate_wpm: speed in words a minute, 80 to 450.
      pitch: 0 (lowest) to 99.
    """

    name: str
    language: str
    variant: str
    rate_wpm: int
    pitch: int


def synthesize(text: str, voice: Voice) -> np.ndarray:
    """Speaks ``text``; the same text and voice give the same samples, whatever was spoken before.

    Returns:
      float32 [T] at 16 kHz in [-1, 1], silence at both ends trimmed to ``MARGIN_SECONDS`` at most.

    Raises:
      InputError: the engine is not installed, does not know the voice, or says nothing for this text.
    """
    samples, rate = _speak(text, voice)
    samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    peak = np.abs(samples).max(initial=0.0)
    if peak == 0.0:
        raise InputError(f"voice {voice.name!r} says nothing for the text {text!r}; expected words of {voice.language}")
    loud = np.flatnonzero(np.abs(samples) > SILENCE_BELOW * peak)
    margin = round(MARGIN_SECONDS * SAMPLE_RATE)
    return np.clip(samples[max(loud[0] - margin, 0) : loud[-1] + 1 + margin], -1.0, 1.0)


def _speak(text: str, voice: Voice) -> tuple[np.ndarray, int]:
    """float32 [T] and its sample rate."""
    blocks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, events):
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 32768)
        return 0  # go on

    name = f"{voice.language}+{voice.variant}" if voice.variant else voice.language
    data = text.encode()
    with _library() as (library, rate):
        library.espeak_SetSynthCallback(receive)
        if library.espeak_SetVoiceByName(name.encode()) != 0:
            raise InputError(f"espeak-ng has no voice {name!r}; expected a language with an optional variant, as 'en-us+f2'")
        library.espeak_SetParameter(_RATE, voice.rate_wpm, 0)  # after the voice, which resets it
        library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, _BY_CHARACTER, 0, _UTF8, None, None)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


@contextlib.contextmanager
def _library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """espeak-ng, started, and its sample rate; unloaded at the end.

    The library keeps the phase of its voices' flutter in variables that only loading resets. Loaded afresh for each
    utterance, which takes a few milliseconds, it says the same words in the same way every time.
    """
    try:
        loader = importlib.import_module("espeakng_loader")
    except ImportError:
        raise InputError("speech synthesis needs espeak-ng, found none; run: pip install espeakng-loader (GPL)") from None
    library = ctypes.CDLL(loader.get_library_path())
    data_path = loader.get_data_path()
    try:
        rate = library.espeak_Initialize(_SYNCHRONOUS_OUTPUT, 0, data_path.encode(), _DO_NOT_EXIT)
        if rate <= 0:
            raise InputError(f"espeak-ng did not start with the voices in {data_path}; reinstall espeakng-loader")
        library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # it seeds the noise of breath from the clock
        yield library, rate
    finally:
        library.espeak_Terminate()
        _unload(ctypes.c_void_p(library._handle))
