"""Trains a small text tokenizer on the words of a manifest, for models that are trained from nothing.

    python -m ichigo_jax.train_text_tokenizer --family whisper|llama --output DIR --vocab-size N [--sound-codes C] MANIFEST…

The texts are the manifests' fields ``text`` and, where there are any, ``answer``. The output is an ordinary Hugging Face
tokenizer folder with the family's special tokens; for llama with its chat template and C sound tokens.
"""

from __future__ import annotations

import argparse

from ichigo_jax import errors
from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json_lines
from ichigo_jax.text.chat import ROLES
from ichigo_jax.text.prompts import TRANSCRIPTION_PROMPTS
from ichigo_jax.text.train_tokenizer import train_llama_tokenizer, train_whisper_tokenizer


@errors.command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ichigo_jax.train_text_tokenizer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST", help="JSON lines with a field 'text'")
    parser.add_argument("--family", choices=("whisper", "llama"), required=True)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="entries, at least 256; special and sound tokens come on top"
    )
    parser.add_argument("--sound-codes", type=int, help="llama: sound codes of the speech tokenizer, its mask code included")
    arguments = parser.parse_args()
    rows = [row for manifest in arguments.manifests for row in read_json_lines(manifest)]
    texts = [row[field] for row in rows for field in ("text", "answer") if row.get(field)]
    if not texts:
        raise InputError(f"{', '.join(arguments.manifests)}: no texts found, expected rows with a field 'text'")
    # Words occur at the beginning of a text and, with a space before them, inside it: both forms are learned.
    texts += [f" {text}" for text in texts]
    if arguments.family == "whisper":
        train_whisper_tokenizer(texts, arguments.output, arguments.vocab_size)
    elif arguments.sound_codes is None:
        raise InputError("--family llama needs --sound-codes, the number of codes of the speech tokenizer with its mask code")
    else:
        # What every conversation holds beside its contents: the headers of the chat template and the requests to transcribe.
        prompts = TRANSCRIPTION_PROMPTS["en"]
        texts += [f"{words}\n\n" for words in (*ROLES, *prompts)] * len(rows)
        train_llama_tokenizer(texts, arguments.output, arguments.vocab_size, arguments.sound_codes, durations=False)


if __name__ == "__main__":
    main()
