"""Writes down what is said in audio files: one JSON line {"path", "text"} each, in the order of the files.

    python -m ichigo_jax.transcribe --model DIR --output text.jsonl recordings/ one.wav list.jsonl

A file that cannot be read becomes {"path", "error"}; the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import IO

from tqdm import tqdm

from ichigo_jax.data.audio_files import for_each_clip, list_audio
from ichigo_jax.errors import command
from ichigo_jax.inference.speech_tokenizer import MAX_BYTES, MAX_SECONDS, SpeechTokenizer
from ichigo_jax.storage import whole


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ichigo_jax.transcribe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="speech-tokenizer folder")
    parser.add_argument("--language", default="en", help="spoken language, as Whisper abbreviates it (en)")
    parser.add_argument("--output", default="-", metavar="FILE", help="where the lines go; - (default) is standard output")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="files at a time (16)")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="audio files, folders, manifests (.jsonl)")
    arguments = parser.parse_args(argv)
    files = list_audio(arguments.paths)
    tokenizer = SpeechTokenizer.from_pretrained(arguments.model, batch_size=arguments.batch_size)

    def transcribe(clips):
        return [{"text": text} for text in tokenizer.transcribe(clips, language=arguments.language)]

    faults = 0
    limits = {"batch_size": arguments.batch_size, "max_seconds": MAX_SECONDS, "max_bytes": MAX_BYTES}
    with json_lines(arguments.output) as lines:
        for row in tqdm(for_each_clip(files, transcribe, **limits), total=len(files), unit="file", disable=None):
            faults += "error" in row
            kept = {name: row[name] for name in ("path", "text", "error") if name in row}
            print(json.dumps(kept, ensure_ascii=False), file=lines, flush=True)
    if faults:
        print(f"{faults} of {len(files)} files could not be read; their lines say why", file=sys.stderr)
    return 1 if faults else 0


@contextlib.contextmanager
def json_lines(output: str) -> Iterator[IO[str]]:
    """Standard output for ``-``, else a file that appears under its name when it is whole."""
    if output == "-":
        yield sys.stdout
        return
    with whole(output) as partial, partial.open("w", encoding="utf-8") as file:
        yield file


if __name__ == "__main__":
    main()
