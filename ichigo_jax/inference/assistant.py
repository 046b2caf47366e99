"""The whole system: speech or text in, text out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ichigo_jax.audio.faults import AudioError
from ichigo_jax.errors import InputError
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.text import SoundCodes, StreamDecoder, encode_chat, transcription_request

if TYPE_CHECKING:  # an assistant that only reads needs nothing of it
    from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer

Audio = np.ndarray | str | os.PathLike
Messages = Sequence[Mapping[str, Any]]


class Assistant:
    """A language model with ears.

    Attributes:
      language_model: writes the answers.
      speech_tokenizer: hears; None for an assistant that only reads.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        speech_tokenizer: SpeechTokenizer | None,
        allow_other_speech_tokenizer: bool = False,
    ):
        """Checks that the two belong together.

        Args:
          language_model: with a text tokenizer that has a chat template.
          speech_tokenizer: the one that the language model was trained with.
          allow_other_speech_tokenizer: whether another one is accepted. Its codes mean something else, so this is for
            tokenizers that are equal for all that matters, say after a change of dtype.

        Raises:
          InputError: no text tokenizer, no sound tokens, or another speech tokenizer than in training.
        """
        _ = language_model.chat_tokenizer  # refuses a model without one
        if speech_tokenizer is not None:
            _check_pair(language_model, speech_tokenizer, allow_other_speech_tokenizer)
        self.language_model = language_model
        self.speech_tokenizer = speech_tokenizer

    def reply(self, audio: Audio | None = None, messages: Messages = (), *, max_new_tokens: int = 256, **options: Any) -> str:
        """Answers.

        Args:
          audio: float32 [T] at 16 kHz or a file, the newest turn of the user; None when ``messages`` end with it.
          messages: the conversation before, see ``text.chat.encode_chat``.
          max_new_tokens: the longest answer.
          **options: ``seed``, ``stop_ids`` and sampling as ``LanguageModel.generate`` takes them.

        Raises:
          InputError: neither audio nor messages, audio without a speech tokenizer, or what the models refuse.
        """
        return self._answer(self._conversation(audio, messages), max_new_tokens, options)

    def stream(
        self, audio: Audio | None = None, messages: Messages = (), *, max_new_tokens: int = 256, **options: Any
    ) -> Iterator[str]:
        """As ``reply``, in pieces of whole characters as they are written; joined they are what ``reply`` returns."""
        tokenizer = self.language_model.chat_tokenizer
        prompt = encode_chat(tokenizer, self._conversation(audio, messages), add_generation_prompt=True).ids
        decoder = StreamDecoder(tokenizer)
        options["stop_ids"] = stop_ids = self.language_model.chat_stop_ids(options.get("stop_ids"))
        for token in self.language_model.stream(prompt, max_new_tokens, **options):
            if token not in stop_ids and (piece := decoder.push(token)):
                yield piece
        if piece := decoder.finish():
            yield piece

    def transcribe(
        self, audio: Audio, *, language: str | None = "en", wording: int = 0, max_new_tokens: int = 256, **options: Any
    ) -> str:
        """Asks the language model for the words; there are none (``""``) in a clip too short for one sound token.

        Args:
          audio: float32 [T] at 16 kHz or a file.
          language: "en" or "vi", of the request; None for models trained with the transcribe token.
          wording: which of the request's wordings, an index from 0 (``text.prompts.TRANSCRIPTION_PROMPTS``).
          max_new_tokens, **options: as for ``reply``.
        """
        (heard,) = self._heard([audio])
        if not heard.codes:
            return ""
        request = transcription_request(heard, language, wording)
        return self._answer([{"role": "user", "content": request}], max_new_tokens, options)

    def hear(self, audio: Sequence[Audio]) -> list[SoundCodes]:
        """Each clip as a part of a message, in the form (``SoundCodes.compressed``) that the language model was trained on.

        Raises:
          InputError: this assistant has no speech tokenizer, or what that refuses.
          AudioError: a clip too short for one sound token; a model that is asked about nothing makes something up.
        """
        heard = self._heard(audio)
        for index, (clip, sound) in enumerate(zip(audio, heard)):
            if not sound.codes:
                name = clip if isinstance(clip, str | os.PathLike) else f"clip {index}"
                raise AudioError(f"{name}: found too little sound for one sound token, expected at least one; record it again")
        return heard

    def _heard(self, audio: Sequence[Audio]) -> list[SoundCodes]:
        if self.speech_tokenizer is None:
            raise InputError("audio found, but this assistant has no speech tokenizer; give the model's own one")
        compressed = self.language_model.provenance.get("sound_form") == "compressed"
        return [SoundCodes(codes.tolist(), compressed) for codes in self.speech_tokenizer.encode(audio)]

    def _answer(self, conversation: Messages, max_new_tokens: int, options: Mapping[str, Any]) -> str:
        return self.language_model.answer([conversation], max_new_tokens, **options)[0]

    def _conversation(self, audio: Audio | None, messages: Messages) -> list[Mapping[str, Any]]:
        if audio is None and not messages:
            raise InputError("nothing to answer: found neither audio nor messages")
        heard = [] if audio is None else [{"role": "user", "content": self.hear([audio])}]
        return [*messages, *heard]


def _check_pair(language_model: LanguageModel, speech_tokenizer: SpeechTokenizer, allow_other: bool) -> None:
    sound, quantizer = language_model.config.sound, speech_tokenizer.config.quantizer
    if sound is None:
        raise InputError("the language model has no sound tokens; extend its vocabulary and train it on speech first")
    if quantizer.num_quantizers != 1 or quantizer.codes > sound.codes:
        raise InputError(
            f"speech tokenizer with {quantizer.num_quantizers} quantisers of {quantizer.codes} codes found, "
            f"the language model has one sound token for each of {sound.codes} codes"
        )
    if allow_other:
        return
    expected = language_model.provenance.get("speech_tokenizer_fingerprint")
    if expected is None:
        warnings.warn("the language model does not record its speech tokenizer; make sure that this is the one", stacklevel=3)
    elif expected != speech_tokenizer.fingerprint:
        name = language_model.provenance.get("speech_tokenizer", "unnamed")
        raise InputError(
            f"speech tokenizer {speech_tokenizer.fingerprint} found, the language model was trained with {expected} ({name}); "
            "give that one, or pass allow_other_speech_tokenizer=True (--allow-other-speech-tokenizer) to go on all the same"
        )
