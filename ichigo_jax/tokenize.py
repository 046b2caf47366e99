"""Turns speech into sound tokens.

    python -m ichigo_jax.tokenize --model DIR --output tokens.parquet recordings/ one.wav list.jsonl
    python -m ichigo_jax.tokenize --model DIR --output - one.wav

A parquet file has the columns ``index``, ``path``, ``seconds`` and ``tokens`` (list of int64), and a manifest's own fields
beside them; ``-`` prints JSON lines {"path", "seconds", "tokens"}. Several quantisers give tokens quantiser by quantiser
within a frame. A file that cannot be read is told of on standard error and left out of the parquet file (a JSON line has
``error``); the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ichigo_jax.audio_command import add_arguments, go_over_files
from ichigo_jax.data.audio_files import Row
from ichigo_jax.errors import InputError, command
from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer
from ichigo_jax.storage import whole


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ichigo_jax.tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="speech-tokenizer folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="a .parquet file, or - for JSON lines on standard output")
    add_arguments(parser, batch_size=32)
    arguments = parser.parse_args(argv)
    if arguments.output != "-" and not arguments.output.endswith(".parquet"):
        raise InputError(f"--output {arguments.output}: expected a name ending in .parquet, or -")
    tokenizer = SpeechTokenizer.from_pretrained(arguments.model, batch_size=arguments.batch_size)

    def tokenize(clips: Iterable[np.ndarray]) -> Iterator[Row]:
        return ({"tokens": codes.reshape(-1).tolist()} for codes in tokenizer.encode_each(clips))

    rows = []
    for index, row in enumerate(go_over_files(arguments, tokenize)):
        if arguments.output == "-":
            print(json.dumps({name: row[name] for name in ("path", "seconds", "tokens", "error") if name in row}), flush=True)
        rows.append({"index": index, **row})
    good = [row for row in rows if "error" not in row]
    if not good:
        raise InputError(f"none of the {len(rows)} files could be read")
    if arguments.output != "-":
        table = pa.Table.from_pylist(good)
        table = table.set_column(table.schema.get_field_index("tokens"), "tokens", table["tokens"].cast(pa.list_(pa.int64())))
        with whole(arguments.output) as partial:
            pq.write_table(table, partial)
    return 0 if len(good) == len(rows) else 1


if __name__ == "__main__":
    main()
