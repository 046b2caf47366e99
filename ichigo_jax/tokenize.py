"""Turns speech into sound tokens.

    python -m ichigo_jax.tokenize --model DIR --output tokens.parquet recordings/ one.wav list.jsonl
    python -m ichigo_jax.tokenize --model DIR --output - one.wav

A parquet file has the columns ``index``, ``path``, ``seconds`` and ``tokens`` (list of int64), and beside them the fields of
the manifests: those of all rows, empty where a row has none. A field that is called like one of these columns is kept as
``manifest_index``, ``manifest_seconds`` or ``manifest_tokens``; a field must be of one type in all rows. ``-``, ``/dev/stdout``
or a pipe gets JSON lines {"path", "seconds", "tokens"}, without the manifests' fields. Several quantisers give tokens
quantiser by quantiser within a frame. A file that cannot be read is told of on standard error and left out of the parquet file
(a JSON line has ``error``); the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ichigo_jax.arguments import ArgumentParser
from ichigo_jax.audio_command import add_arguments, go_over_files, list_files
from ichigo_jax.data.audio_files import Outcome, with_other_names
from ichigo_jax.data.token_table import COLUMNS, field_columns, write_tokens
from ichigo_jax.errors import InputError, command
from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer
from ichigo_jax.storage import check_output, is_stream, open_output, write_json_line


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m ichigo_jax.tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="speech-tokenizer folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="a .parquet file, or - for JSON lines on standard output")
    add_arguments(parser, batch_size=32)
    arguments = parser.parse_args(argv)
    as_parquet = arguments.output.endswith(".parquet")
    if not as_parquet and not is_stream(arguments.output):
        raise InputError(f"--output {arguments.output}: expected a name ending in .parquet, or -")
    check_output(arguments.output)
    files = list_files(arguments)
    fields = field_columns(with_other_names(files, COLUMNS)) if as_parquet else None
    tokenizer = SpeechTokenizer.from_pretrained(arguments.model, batch_size=arguments.batch_size)

    def tokenize(clips: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
        return ({"tokens": codes.reshape(-1).tolist()} for codes in tokenizer.encode_each(clips))

    outcomes = go_over_files(arguments, files, tokenize)
    good = _write_parquet(arguments.output, outcomes, fields) if as_parquet else _write_lines(arguments.output, outcomes)
    if not good:
        raise InputError(f"none of the {len(files)} files could be read")
    return 0 if good == len(files) else 1


def _write_lines(output: str, outcomes: Iterable[Outcome]) -> int:
    """Writes a line for each file as it comes; gives the number of those that could be read."""
    good = 0
    with open_output(output) as lines:
        for outcome in outcomes:
            good += outcome.error is None
            found = {"error": outcome.error} if outcome.error is not None else {"seconds": outcome.seconds, **outcome.results}
            write_json_line(lines, {"path": outcome.path, **found})
    return good


def _write_parquet(output: str, outcomes: Iterable[Outcome], fields: pa.Table) -> int:
    """Writes a row for each file that could be read, all at the end; gives their number."""
    good = [(index, outcome) for index, outcome in enumerate(outcomes) if outcome.error is None]
    if good:
        write_tokens(output, good, fields)
    return len(good)


if __name__ == "__main__":
    main()
