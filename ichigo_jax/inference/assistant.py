"""The whole system: speech or text in, text out."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ichigo_jax.audio.faults import AudioError
from ichigo_jax.decoding.sampling import GREEDY, Sampling
from ichigo_jax.errors import InputError
from ichigo_jax.inference.clips import Audio, is_file
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.text import SoundCodes, StreamDecoder, encode_chat, transcription_request

if TYPE_CHECKING:  # an assistant that only reads needs nothing of it
    from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer

Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Spoken:
    """A message's content, or a part of it, that was said.

    Attributes:
      audio: float32 [T] at 16 kHz, or a file.
    """

    audio: Audio


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

    def replies(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> list[str]:
        """The next answer in each of several conversations. An answer does not depend on the other conversations.

        All clips of all conversations are heard together, and all answers are written together. One conversation of two
        spoken turns::

            [
                {"role": "system", "content": "Answer in one sentence."},
                {"role": "user", "content": Spoken("first.wav")},
                {"role": "assistant", "content": "Yes, it is."},
                {"role": "user", "content": ["And this one? ", Spoken(samples)]},
            ]

        Args:
          conversations: messages as ``text.chat.encode_chat`` takes them, whose content may be ``Spoken`` or have such parts.
          max_new_tokens: the longest answer.
          sampling, seed: as for ``LanguageModel.generate``, for all conversations or for each.
          stop_ids: tokens that end an answer; None takes those that end one in a chat.

        Raises:
          InputError: a conversation without a message, speech without a speech tokenizer, or what the models refuse.
          AudioError: a clip that cannot be used. Clips without a name are numbered over all conversations, from 0.
        """
        if not conversations:
            return []
        heard = self._heard_conversations(conversations)
        return self.language_model.answer(heard, max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids)

    def reply(
        self,
        audio: Audio | None = None,
        messages: Messages = (),
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> str:
        """The next answer in one conversation.

        Args:
          audio: float32 [T] at 16 kHz or a file, the newest turn of the user; None when ``messages`` end with it.
          messages: the conversation before, as for ``replies``.
          max_new_tokens, sampling, seed, stop_ids: as for ``replies``.

        Raises:
          InputError, AudioError: as ``replies``.
        """
        conversations = [_with_turn(messages, audio)]
        options = {"sampling": sampling, "seed": seed, "stop_ids": stop_ids}
        return self.replies(conversations, max_new_tokens=max_new_tokens, **options)[0]

    def stream(
        self,
        audio: Audio | None = None,
        messages: Messages = (),
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[str]:
        """As ``reply``, in pieces of whole characters as they are written; joined they are what ``reply`` returns."""
        tokenizer = self.language_model.chat_tokenizer
        (heard,) = self._heard_conversations([_with_turn(messages, audio)])
        prompt = encode_chat(tokenizer, heard, add_generation_prompt=True).ids
        decoder = StreamDecoder(tokenizer)
        stop_ids = self.language_model.chat_stop_ids(stop_ids)
        for token in self.language_model.stream(prompt, max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids):
            if token not in stop_ids and (piece := decoder.push(token)):
                yield piece
        if piece := decoder.finish():
            yield piece

    def transcribe(
        self,
        audio: Audio,
        *,
        language: str | None = "en",
        wording: int = 0,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> str:
        """Asks the language model for the words; there are none (``""``) in a clip too short for one sound token.

        Args:
          audio: float32 [T] at 16 kHz or a file.
          language: "en" or "vi", of the request; None for models trained with the transcribe token.
          wording: which of the request's wordings, an index from 0 (``text.prompts.TRANSCRIPTION_PROMPTS``).
          max_new_tokens, sampling, seed, stop_ids: as for ``replies``.

        Raises:
          InputError: a language or a wording that there is not, or as ``replies``.
          AudioError: as ``replies``.
        """
        (heard,) = self._codes([audio])
        request = transcription_request(heard, language, wording)
        if not heard.codes:
            return ""
        options = {"sampling": sampling, "seed": seed, "stop_ids": stop_ids}
        return self.replies([[{"role": "user", "content": request}]], max_new_tokens=max_new_tokens, **options)[0]

    def hear(self, audio: Sequence[Audio]) -> list[SoundCodes]:
        """Each clip as a part of a message, in the form (``SoundCodes.compressed``) that the language model was trained on.

        Raises:
          InputError: this assistant has no speech tokenizer, or what that refuses.
          AudioError: a clip too short for one sound token; a model that is asked about nothing makes something up.
        """
        heard = self._codes(audio)
        for index, (clip, sound) in enumerate(zip(audio, heard)):
            if not sound.codes:
                name = clip if is_file(clip) else f"clip {index}"
                raise AudioError(f"{name}: found too little sound for one sound token, expected at least one; record it again")
        return heard

    def _codes(self, audio: Sequence[Audio]) -> list[SoundCodes]:
        if self.speech_tokenizer is None:
            raise InputError("audio found, but this assistant has no speech tokenizer; give the model's own one")
        compressed = self.language_model.provenance.get("sound_form") == "compressed"
        return [SoundCodes(codes.tolist(), compressed) for codes in self.speech_tokenizer.encode(audio)]

    def _heard_conversations(self, conversations: Sequence[Messages]) -> list[Messages]:
        """The conversations with sound codes in place of speech. What is wrong with other parts, ``encode_chat`` tells."""
        for number, messages in enumerate(conversations):
            if not messages:
                raise InputError(f"conversation {number}: found neither audio nor messages, expected something to answer")
        spoken = [
            part
            for messages in conversations
            for message in messages
            for part in _content_parts(message)
            if isinstance(part, Spoken)
        ]
        heard = iter(self.hear([part.audio for part in spoken]) if spoken else ())

        def with_codes(message: Mapping[str, Any]) -> Mapping[str, Any]:
            parts = _content_parts(message)
            if not any(isinstance(part, Spoken) for part in parts):
                return message
            return {**message, "content": [next(heard) if isinstance(part, Spoken) else part for part in parts]}

        return [[with_codes(message) for message in messages] for messages in conversations]


def _with_turn(messages: Messages, audio: Audio | None) -> list[Mapping[str, Any]]:
    return [*messages, *([] if audio is None else [{"role": "user", "content": Spoken(audio)}])]


def _content_parts(message: Mapping[str, Any]) -> Sequence[Any]:
    """The parts of a message's content; of one that is no message, none."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, Spoken):
        return [content]
    return content if isinstance(content, list | tuple) else []


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
