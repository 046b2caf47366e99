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


def transcription_prompt(language: str, wording: int) -> str:
    """The wording of ``language`` ("en" or "vi") with the index ``wording``, from 0; the sound follows it.

    Raises:
      InputError: a language without wordings, or an index that it does not have.
    """
    prompts = _wordings(language)
    _check_wording(wording, len(prompts))
    return prompts[wording]


def drawn_transcription_prompt(language: str, seed: int) -> str:
    """A wording of ``language`` drawn by ``seed``, for data: encoded data sets depend on which seed draws which wording.

    Raises:
      InputError: a language without wordings.
    """
    prompts = _wordings(language)
    return prompts[np.random.default_rng(seed).integers(len(prompts))]


def transcription_request(
    speech: SoundCodes, language: str | None, wording: int, task_token: str = RELEASED_TASK_TOKEN
) -> list[Part]:
    """The content of a user's message that asks for the words of ``speech``.

    Args:
      speech: what was said.
      language: of the wording, or None for the older form, ``task_token`` alone.
      wording: index of the wording, from 0; the older form has one.
      task_token: the special token of the older form; the released models' unless given.

    Raises:
      InputError: as ``transcription_prompt``.
    """
    if language is not None:
        return [transcription_prompt(language, wording), speech]
    _check_wording(wording, 1)
    return [SpecialToken(task_token), speech]


def _wordings(language: str) -> tuple[str, ...]:
    if language not in TRANSCRIPTION_PROMPTS:
        raise InputError(f"language {language!r} found, expected one of {', '.join(TRANSCRIPTION_PROMPTS)}")
    return TRANSCRIPTION_PROMPTS[language]


def _check_wording(wording: int, wordings: int) -> None:
    if isinstance(wording, bool) or not isinstance(wording, int | np.integer) or not 0 <= wording < wordings:
        raise InputError(f"wording {wording!r} found, expected {'0' if wordings == 1 else f'0 to {wordings - 1}'}")
