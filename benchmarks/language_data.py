"""How long the language model's data takes to be ready, how much memory that needs, and how full packing makes the rows.

    python benchmarks/language_data.py --rows 100000

Conversations are synthetic: 2 to 10 s of speech (50 to 250 codes) in the user's content, an answer of 20 to 250 words. They
are encoded once, then found again as a resumed run finds them, then read in a shuffled order. The packing is measured on
these and on the lengths of pre-training rows, 2 to 20 s of speech in a context of 512. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ichigo_jax.data.encoded import encode_rows
from ichigo_jax.data.language import pack
from ichigo_jax.data.row_formats import RowEncoder, RowFormat
from ichigo_jax.text import TextTokenizer, train_llama_tokenizer
from ichigo_jax.vocab import sound_text

LENGTH = 4096


def write_conversations(path: Path, rows: int, words: list[str]) -> None:
    generator = np.random.default_rng(0)
    with pq.ParquetWriter(
        path, pa.schema({"conversations": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))})
    ) as f:
        for first in range(0, rows, 1000):
            batch = []
            for _ in range(min(1000, rows - first)):
                codes = generator.integers(0, 512, generator.integers(50, 250)).tolist()
                answer = " ".join(generator.choice(words, generator.integers(20, 250)))
                turns = [{"role": "user", "content": sound_text(codes)}, {"role": "assistant", "content": answer}]
                batch.append({"conversations": turns})
            f.write_table(pa.Table.from_pylist(batch, schema=f.schema))


def seconds(function):
    start = time.perf_counter()
    result = function()
    return result, round(time.perf_counter() - start, 2)


def fill(lengths: np.ndarray, capacity: int) -> float:
    return round(float(lengths.sum() / (len(pack(lengths, capacity, 0)) * capacity)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=None, help="that encode at once (one for each CPU)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = Path(__file__).read_text() + (Path(__file__).parents[1] / "README.md").read_text()
        train_llama_tokenizer([text], folder / "tokenizer", 2000, sound_codes=513, durations=False)
        write_conversations(folder / "rows.parquet", arguments.rows, text.split())
        tokenizer = TextTokenizer.from_folder(folder / "tokenizer")
        encoder = RowEncoder(RowFormat("conversations", None, None, False), tokenizer, LENGTH, "all")

        def build():
            path = str(folder / "rows.parquet")
            return encode_rows(path, encoder, folder / "encoded", print, arguments.processes)

        peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _, cold = seconds(build)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
        examples, again = seconds(build)
        groups, packing = seconds(lambda: pack(examples.lengths, LENGTH, 0))
        order = np.random.default_rng(0).permutation(len(examples))[:20_000]
        _, reading = seconds(lambda: [examples[index] for index in order])
        pretraining = np.random.default_rng(0).integers(50, 500, 100_000) + 4
        print(
            json.dumps(
                {
                    "rows": arguments.rows,
                    "ids_per_row": round(float(examples.lengths.mean()), 1),
                    "encode_seconds": cold,
                    "encode_added_peak_mib": round(peak / 1024, 1),
                    "start_again_seconds": again,
                    "pack_seconds": packing,
                    "fill_4096": fill(examples.lengths, LENGTH),
                    "fill_512_pretraining": fill(pretraining, 512),
                    "read_microseconds_per_example": round(1e6 * reading / len(order), 1),
                    "bytes_per_id": round(
                        sum(f.stat().st_size for f in (folder / "encoded").iterdir()) / examples.lengths.sum(), 2
                    ),
                    "machine": platform.processor() or platform.machine(),
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
