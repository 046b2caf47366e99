"""Trains a small text tokenizer on the words of a manifest, for models that are trained from nothing.

    python -m ichigo_jax.train_text_tokenizer --family whisper|llama --output DIR --vocab-size N [--sound-codes C] MANIFEST…

The texts are the manifests' fields ``text`` and, where there are any, ``answer``. The output is an ordinary Hugging Face
tokenizer folder with the family's special tokens; for llama with its chat template and C sound tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ichigo_jax import errors
from ichigo_jax.arguments import ArgumentParser, whole_number
from ichigo_jax.errors import InputError
from ichigo_jax.storage import check_output, read_json_lines
from ichigo_jax.text.chat import ROLES
from ichigo_jax.text.prompts import TRANSCRIPTION_PROMPTS
from ichigo_jax.text.train_tokenizer import BYTES, train_llama_tokenizer, train_whisper_tokenizer


@errors.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m ichigo_jax.train_text_tokenizer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST", help="JSON lines with a field 'text'")
    parser.add_argument("--family", choices=("whisper", "llama"), required=True)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--vocab-size",
        type=whole_number("vocabulary of", BYTES),
        required=True,
        help="entries, at least 256; special and sound tokens come on top",
    )
    parser.add_argument(
        "--sound-codes",
        type=whole_number("sound codes", 1),
        help="llama: sound codes of the speech tokenizer, its mask code included",
    )
    arguments = parser.parse_args(argv)
    if arguments.family == "llama" and arguments.sound_codes is None:
        raise InputError("--family llama needs --sound-codes, the number of codes of the speech tokenizer with its mask code")
    check_output(arguments.output)
    manifests = [read_json_lines(manifest) for manifest in arguments.manifests]
    texts = [text for manifest, rows in zip(arguments.manifests, manifests) for text in texts_of(manifest, rows)]
    if not texts:
        raise InputError(f"{', '.join(arguments.manifests)}: no texts found, expected rows with a field 'text'")
    # Words occur at the beginning of a text and, with a space before them, inside it: both forms are learned.
    texts += [f" {text}" for text in texts]
    if arguments.family == "whisper":
        train_whisper_tokenizer(texts, arguments.output, arguments.vocab_size)
    else:
        # What every conversation holds beside its contents: the headers of the chat template and the requests to transcribe.
        prompts = TRANSCRIPTION_PROMPTS["en"]
        texts += [f"{words}\n\n" for words in (*ROLES, *prompts)] * sum(map(len, manifests))
        train_llama_tokenizer(texts, arguments.output, arguments.vocab_size, arguments.sound_codes, durations=False)


def texts_of(manifest: str, rows: Sequence[dict[str, object]]) -> list[str]:
    """The fields ``text`` and ``answer`` of a manifest's rows, those that there are.

    Raises:
      InputError: one of them is no text, or holds half a character; the message names the row.
    """
    texts = []
    for number, row in enumerate(rows, 1):
        for field in ("text", "answer"):
            value = row.get(field)
            if value is None or value == "":
                continue
            if not isinstance(value, str) or value != errors.unicode_only(value):
                raise InputError(f"{manifest}: row {number} has {field} {value!r:.60}, expected Unicode text; mend it")
            texts.append(value)
    return texts


if __name__ == "__main__":
    main()
