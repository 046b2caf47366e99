"""Which ids end a text of a language model: what a Hugging Face folder says of it, and what a user should know of that."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from converters.sources import is_file, read_object
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig
from ichigo_jax.text.tokenizer import TextTokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"


def of_folder(folder: Path) -> tuple[int, ...]:
    """The ids at which ``transformers`` ends a text: those of ``generation_config.json``, else those of ``config.json``.

    Raises:
      InputError: ids that are no whole numbers.
    """
    return ids_in(generation_config(folder), folder / GENERATION) or ids_in(read_object(folder / CONFIG), folder / CONFIG)


def generation_config(folder: Path) -> dict[str, Any]:
    """The defaults of generation; nothing where there are none."""
    return read_object(folder / GENERATION) if is_file(folder / GENERATION) else {}


def ids_in(values: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    """``eos_token_id`` of a config, where one id may stand without a list.

    Raises:
      InputError: ids that are no whole numbers.
    """
    found = values.get("eos_token_id")
    found = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in found):
        raise InputError(f"{file}: eos_token_id {found} found, expected whole numbers; write the ids of the tokens there")
    return tuple(found)


def notes(folder: Path, config: LanguageModelConfig, tokenizer: TextTokenizer | None) -> list[str]:
    """What an import says of the ends that it found in a Hugging Face folder."""
    said = f"answers end at {spelled(config.eos_token_ids, tokenizer)}"
    generation, network = (ids_in(values, folder) for values in (generation_config(folder), read_object(folder / CONFIG)))
    if generation and network and {*generation} != {*network}:
        said += f" ({GENERATION}; {CONFIG} has {spelled(network, tokenizer)})"
    lines = [said]
    if tokenizer is None:
        return lines
    ordinary = [token for token in config.eos_token_ids if token not in tokenizer.added.values()]
    if ordinary:
        lines.append(
            f"{spelled(ordinary, tokenizer)}: no special token, so answers stop wherever one is written; "
            f"is eos_token_id in {GENERATION if generation else CONFIG} right?"
        )
    turn_end = tokenizer.turn_end_id
    if turn_end is not None and turn_end not in config.eos_token_ids:
        lines.append(
            f"the chat template ends a turn with {spelled([turn_end], tokenizer)}: chats stop there too, and training adds it"
        )
    return lines


def spelled(ids: Collection[int], tokenizer: TextTokenizer | None) -> str:
    """``128001 <|end_of_text|>, 128009 <|eot_id|>``."""
    if not ids:
        return "no token"
    names = {} if tokenizer is None else {token: tokenizer.spelling(token) for token in ids}
    return ", ".join(f"{token} {names[token]}" if names.get(token) else str(token) for token in ids)
