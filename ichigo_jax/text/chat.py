"""Conversations as token ids, in the model's own chat template.

The template is rendered with a placeholder for every piece of content, so it never sees what people wrote and they cannot
write its special tokens. Afterwards the template's text is read with special tokens, the contents without, and sound codes
are spliced in as integers. For contents that spell no special token the ids are those of ``apply_chat_template``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ichigo_jax.errors import InputError
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.vocab import SoundVocabulary

ROLES = ("system", "user", "assistant")

# Private-use characters, which no template writes by itself and no white-space trimming touches.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")


@dataclasses.dataclass(frozen=True)
class SoundCodes:
    """A part of a message: speech, as codes of the speech tokenizer.

    Attributes:
      codes: what was said.
      compressed: whether runs of equal codes become a duration and one code, for models that were trained so.
    """

    codes: Sequence[int]
    compressed: bool = False


@dataclasses.dataclass(frozen=True)
class SpecialToken:
    """A part of a message: a special token that our own code, never a user, puts there."""

    name: str


Part = str | SoundCodes | SpecialToken


class EncodedChat(NamedTuple):
    """ids [T] and, for each, whether it belongs to an assistant's answer (its end-of-turn token included)."""

    ids: list[int]
    answer_mask: list[bool]


class TruncatedChat(NamedTuple):
    """As ``EncodedChat``, and how many ids were dropped."""

    ids: list[int]
    answer_mask: list[bool]
    dropped: int


class _Piece(NamedTuple):
    """A stretch of the conversation: text to encode, or ids that are final."""

    text: str
    ids: list[int]
    answer: bool


def encode_chat(tokenizer: TextTokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> EncodedChat:
    """Encodes a conversation.

    Args:
      tokenizer: of the language model, with a chat template.
      messages: ``{"role": "system" | "user" | "assistant", "content": str or list of parts}``.
      add_generation_prompt: whether the header of an answer follows, for the model to go on from.

    Returns:
      The ids and the mask of the assistant's answers. An answer runs from its first visible character to the special
      token that ends the turn.

    Raises:
      InputError: an unknown role or part, sound codes for a tokenizer without sound tokens, a code out of range, or a chat
        template that loses, repeats or reorders contents or does not end answers.
    """
    contents = [_parts(message, index) for index, message in enumerate(messages)]
    placeholders = []
    for index, (message, parts) in enumerate(zip(messages, contents)):
        # White space at the edges stays visible to the template, which may trim it.
        before, after = _edges(parts)
        placeholders.append({"role": message["role"], "content": f"{before}{_PLACEHOLDER.format(index)}{after}"})
    rendered = tokenizer.render_chat(placeholders, add_generation_prompt)
    pieces = _PLACEHOLDERS.split(rendered)
    found = [int(index) for index in pieces[1::2]]
    if found != list(range(len(messages))):
        raise InputError(
            f"the chat template shows the contents of messages {found}, expected each of {len(messages)} once and in order; "
            "use a template that writes contents as they are"
        )
    stretches = _template_pieces(tokenizer, pieces[0], in_answer=False)
    for index, following in zip(found, pieces[2::2]):
        answer = messages[index]["role"] == "assistant"
        stretches += [_content_piece(tokenizer, part, answer) for part in _trim_edges(contents[index])]
        stretches += _template_pieces(tokenizer, following, in_answer=answer)
    return _encode_pieces(tokenizer, stretches)


def truncate(ids: Sequence[int], answer_mask: Sequence[bool], length: int, sound: SoundVocabulary | None) -> TruncatedChat:
    """Keeps at most the first ``length`` ids; a sound span that would be cut is left out whole.

    With sound tokens ``start`` 100 and ``end`` 101: ``[7, 100, 103, 101, 8]`` cut to 3 is ``[7]``, 4 dropped; cut to 4 it is
    ``[7, 100, 103, 101]``, 1 dropped.

    Args:
      ids: [T].
      answer_mask: [T].
      length: the most ids to keep.
      sound: where the sound tokens are, if there are any.
    """
    if len(ids) <= length:
        return TruncatedChat(list(ids), list(answer_mask), 0)
    kept = list(ids[:length])
    if sound is not None:
        opened = None
        for position, index in enumerate(kept):
            if index == sound.start_id:
                opened = position
            elif index == sound.end_id:
                opened = None
        if opened is not None:
            kept = kept[:opened]
    return TruncatedChat(kept, list(answer_mask[: len(kept)]), len(ids) - len(kept))


def _parts(message: Mapping[str, Any], index: int) -> list[Part]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise InputError(f"message {index}: found {_shown(message)}, expected {{'role': …, 'content': …}}")
    if message["role"] not in ROLES:
        raise InputError(f"message {index}: role {message['role']!r} found, expected one of {', '.join(ROLES)}")
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Part) for part in parts):
        raise InputError(
            f"message {index}: content {_shown(content)} found, expected text or a list of text and SoundCodes; audio goes into "
            "Spoken(audio), for an Assistant to hear"
        )
    return list(parts)


def _shown(value: Any) -> str:
    """The beginning of what someone gave, on one line: arrays spell themselves on several."""
    return f"{' '.join(repr(value).split()):.80}"


def _edges(parts: Sequence[Part]) -> tuple[str, str]:
    """White space at the beginning and at the end of a content; of a content that is nothing else, all before."""
    before = after = ""
    if parts and isinstance(parts[0], str):
        before = parts[0][: len(parts[0]) - len(parts[0].lstrip())]
    if parts and isinstance(parts[-1], str) and (len(parts) > 1 or parts[0].strip()):
        after = parts[-1][len(parts[-1].rstrip()) :]
    return before, after


def _trim_edges(parts: Sequence[Part]) -> list[Part]:
    """The content without what ``_edges`` returns."""
    parts = list(parts)
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def _content_piece(tokenizer: TextTokenizer, part: Part, answer: bool) -> _Piece:
    if isinstance(part, str):
        return _Piece(part, [], answer)
    if isinstance(part, SpecialToken):
        return _Piece("", [tokenizer.special_id(part.name)], answer)
    if tokenizer.sound is None:
        raise InputError("sound codes found, but the text tokenizer has no sound tokens; extend its vocabulary first")
    return _Piece("", tokenizer.sound.ids(part.codes, part.compressed), answer)


def _template_pieces(tokenizer: TextTokenizer, text: str, in_answer: bool) -> list[_Piece]:
    """The template's own text; when it follows an answer, all up to its first special token still belongs to the answer."""
    pieces = []
    for part in tokenizer.split_special(text):
        if isinstance(part, int):
            pieces.append(_Piece("", [part], in_answer))
            in_answer = False
        else:
            pieces.append(_Piece(part, [], in_answer))
    if in_answer:
        raise InputError(f"the chat template ends an answer with {text!r}, expected a special token that ends the turn")
    return pieces


def _encode_pieces(tokenizer: TextTokenizer, pieces: Sequence[_Piece]) -> EncodedChat:
    """Encodes neighbouring texts as one, as a tokenizer that sees the whole conversation would."""
    encoded = EncodedChat([], [])
    texts: list[_Piece] = []

    def flush() -> None:
        text = "".join(piece.text for piece in texts)
        answers = {piece.answer for piece in texts}
        if len(answers) == 1:
            ids = tokenizer.encode(text)
            encoded.ids.extend(ids)
            encoded.answer_mask.extend([*answers] * len(ids))
        elif answers:
            of_answer = b"".join((b"\1" if piece.answer else b"\0") * len(piece.text) for piece in texts)  # by character
            for index, start, end in tokenizer.encode_with_offsets(text):
                encoded.ids.append(index)
                encoded.answer_mask.append(1 in of_answer[start:end])
        texts.clear()

    for piece in pieces:
        if piece.ids:
            flush()
            encoded.ids.extend(piece.ids)
            encoded.answer_mask.extend([piece.answer] * len(piece.ids))
        elif piece.text:
            texts.append(piece)
    flush()
    return encoded
