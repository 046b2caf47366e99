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
import sys
import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ichigo_jax.data.audio_files import for_each_clip, list_audio
from ichigo_jax.errors import InputError, command
from ichigo_jax.inference.speech_tokenizer import MAX_BYTES, MAX_SECONDS, SpeechTokenizer
from ichigo_jax.storage import whole


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ichigo_jax.tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="speech-tokenizer folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="a .parquet file, or - for JSON lines on standard output")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="files at a time (32)")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="audio files, folders, manifests (.jsonl)")
    arguments = parser.parse_args(argv)
    if arguments.output != "-" and not arguments.output.endswith(".parquet"):
        raise InputError(f"--output {arguments.output}: expected a name ending in .parquet, or -")
    files = list_audio(arguments.paths)
    tokenizer = SpeechTokenizer.from_pretrained(arguments.model, batch_size=arguments.batch_size)

    def tokenize(clips):
        return [{"tokens": codes.reshape(-1).tolist()} for codes in tokenizer.encode(clips)]

    limits = {"batch_size": arguments.batch_size, "max_seconds": MAX_SECONDS, "max_bytes": MAX_BYTES}
    start = time.perf_counter()
    good, faults = [], 0
    for row in tqdm(for_each_clip(files, tokenize, **limits), total=len(files), unit="file", disable=None):
        if arguments.output == "-":
            print(json.dumps({name: row[name] for name in ("path", "seconds", "tokens", "error") if name in row}), flush=True)
        if "error" in row:
            faults += 1
            print(row["error"], file=sys.stderr)
        else:
            good.append({"index": len(good) + faults, **row})
    if not good:
        raise InputError(f"none of the {len(files)} files could be read")
    if arguments.output != "-":
        table = pa.Table.from_pylist(good)
        table = table.set_column(table.schema.get_field_index("tokens"), "tokens", table["tokens"].cast(pa.list_(pa.int64())))
        with whole(arguments.output) as partial:
            pq.write_table(table, partial)
    spoken, spent = sum(row["seconds"] for row in good), time.perf_counter() - start
    print(
        f"{len(good)} of {len(files)} files, {spoken:.0f} s of speech in {spent:.1f} s: {spoken / spent:.0f}x real time",
        file=sys.stderr,
    )
    return 1 if faults else 0


if __name__ == "__main__":
    main()
