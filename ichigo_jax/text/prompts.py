"""How the language model is asked for a transcription."""

from __future__ import annotations

import numpy as np

from ichigo_jax.errors import InputError
from ichigo_jax.text.chat import Part, SoundCodes, SpecialToken
from ichigo_jax.vocab import RELEASED_TASK_TOKEN

TRANSCRIPTION_PROMPTS = {
    "en": (
        "Write down what is said in this recording: ",
        "Transcribe the following speech word for word: ",
        "Which words do you hear? Write them out: ",
        "Turn this speech into text: ",
        "Please give me the text of this audio: ",
        "Note down the spoken sentence: ",
    ),
    "vi": (
        "Hãy viết lại lời nói trong đoạn ghi âm này: ",
        "Chép lại từng từ của đoạn nói sau: ",
        "Bạn nghe thấy những từ nào? Hãy viết ra: ",
        "Chuyển lời nói này thành văn bản: ",
        "Cho tôi nội dung bằng chữ của âm thanh này: ",
        "Ghi lại câu vừa được nói: ",
    ),
}


def transcription_prompt(language: str, seed: int) -> str:
    """One of the wordings of ``language`` ("en" or "vi"), chosen by ``seed``; the sound follows it.

    Raises:
      InputError: a language without wordings.
    """
    if language not in TRANSCRIPTION_PROMPTS:
        raise InputError(f"language {language!r} found, expected one of {', '.join(TRANSCRIPTION_PROMPTS)}")
    prompts = TRANSCRIPTION_PROMPTS[language]
    return prompts[np.random.default_rng(seed).integers(len(prompts))]


def transcription_request(
    speech: SoundCodes, language: str | None, seed: int, task_token: str = RELEASED_TASK_TOKEN
) -> list[Part]:
    """The content of a user's message that asks for the words of ``speech``.

    Args:
      speech: what was said.
      language: of the wording, or None for the older form, ``task_token`` alone.
      seed: chooses the wording.
      task_token: the special token of the older form; the released models' unless given.
    """
    request: Part = SpecialToken(task_token) if language is None else transcription_prompt(language, seed)
    return [request, speech]
