"""Writes down what is said in audio files: one JSON line {"path", "text"} each, in the order of the files.

    python -m ichigo_jax.transcribe --model DIR --output text.jsonl recordings/ one.wav list.jsonl
    python -m ichigo_jax.transcribe --model DIR --language auto --beam-size 5 --temperature 0,0.2,0.4,0.6,0.8,1 interview.mp3

With ``--language auto`` the line has the ``language`` that was found as well. Of several temperatures the next is tried where
an answer repeats itself or is unlikely, as Whisper does. A file that cannot be read becomes {"path", "error"}; the others go
on, and the exit code is 1. A manifest's own fields do not come into the lines, whatever they are called.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ichigo_jax.arguments import ArgumentParser, unicode_text
from ichigo_jax.audio_command import add_arguments, go_over_files, list_files
from ichigo_jax.errors import command
from ichigo_jax.inference.decoding_options import WHISPER_DEFAULTS
from ichigo_jax.inference.plain_whisper import load_speech_to_text
from ichigo_jax.inference.speech_to_text import spoken_text
from ichigo_jax.storage import check_output, open_output, write_json_line


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m ichigo_jax.transcribe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a speech tokenizer, or a Whisper by itself")
    parser.add_argument("--language", default="en", help="spoken language, en or English, as Whisper has it, or auto (en)")
    parser.add_argument("--beam-size", type=int, metavar="N", help="follow so many answers at temperature 0 (one)")
    parser.add_argument(
        "--temperature", type=temperatures, default=(0.0,), metavar="T[,T…]", help="of sampling; several to fall back on (0)"
    )
    parser.add_argument("--prompt", type=unicode_text, metavar="TEXT", help="what was said before, or words to expect")
    parser.add_argument("--output", default="-", metavar="FILE", help="where the lines go; - (default) is standard output")
    add_arguments(parser, batch_size=16)
    arguments = parser.parse_args(argv)
    options = WHISPER_DEFAULTS.replace(
        language=None if arguments.language.lower() == "auto" else arguments.language,
        beam_size=arguments.beam_size,
        temperature=arguments.temperature,
        prompt=arguments.prompt,
    )
    check_output(arguments.output)
    files = list_files(arguments)
    model = load_speech_to_text(arguments.model, batch_size=arguments.batch_size)

    def transcribe(clips: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
        for pieces in model.transcribe_each(clips, options):
            found = {"language": pieces[0].language} if options.language is None else {}
            yield {"text": spoken_text(pieces, options), **found}

    faults = 0
    with open_output(arguments.output) as lines:
        for outcome in go_over_files(arguments, files, transcribe):
            faults += outcome.error is not None
            found = outcome.results if outcome.error is None else {"error": outcome.error}
            write_json_line(lines, {"path": outcome.path, **found})
    return 1 if faults else 0


def temperatures(text: str) -> tuple[float, ...]:
    """``"0,0.2"`` -> (0.0, 0.2)."""
    return tuple(map(float, text.split(",")))


if __name__ == "__main__":
    main()
