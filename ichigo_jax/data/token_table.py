"""Sound tokens of audio files as a parquet file, beside the fields of the manifests that named them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from ichigo_jax.data.audio_files import Outcome, Row
from ichigo_jax.errors import InputError
from ichigo_jax.storage import atomic_write, is_stream

COLUMNS = ("index", "seconds", "tokens")  # beside ``path``; a manifest's field cannot have such a name


def field_columns(rows: Sequence[Row]) -> pa.Table:
    """The manifests' own fields, one column for each that any row has, null where a row lacks it; [R] rows.

    Args:
      rows: with a ``path``, which is no column here.

    Raises:
      InputError: a field that no parquet column can hold, such as numbers in some rows and texts in others.
    """
    names = {name: None for row in rows for name in row if name != "path"}  # in the order in which they occur
    columns = {name: _column(name, rows) for name in names}
    return pa.table(columns) if columns else pa.table({"path": pa.nulls(len(rows))}).select([])


def write_tokens(output: str | os.PathLike, good: Sequence[tuple[int, Outcome]], fields: pa.Table) -> None:
    """Writes the columns ``index``, ``path``, ``seconds``, ``tokens`` and the manifests' fields.

    Args:
      output: the file, which appears when it is whole, or a named pipe.
      good: the number of each file that could be read among all, and what was found in it, ``{"tokens": [int, …]}``.
      fields: of all files, from ``field_columns``.
    """
    indices = pa.array([index for index, _ in good], pa.int64())
    table = pa.table(
        {
            "index": indices,
            "path": pa.array([outcome.path for _, outcome in good], pa.string()),
            "seconds": pa.array([outcome.seconds for _, outcome in good], pa.float64()),
            "tokens": pa.array([outcome.results["tokens"] for _, outcome in good], pa.list_(pa.int64())),
        }
    )
    chosen = fields.take(indices) if fields.num_columns else fields
    for name in chosen.column_names:
        table = table.append_column(name, chosen[name])
    if is_stream(output):
        with open(output, "wb") as file:
            file.write(_parquet(table))
    else:
        with atomic_write(output) as partial:
            partial.write_bytes(_parquet(table))


def _parquet(table: pa.Table) -> pa.Buffer:
    """In memory first: parquet asks its file for its position, which a pipe has not."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def _column(name: str, rows: Sequence[Row]) -> pa.Array:
    values = [row.get(name) for row in rows]
    try:
        name.encode("utf-8")
        column = pa.array(values)
        pq.write_table(pa.table({name: column.slice(0, 0)}), pa.BufferOutputStream())  # not every type can be written
        return column
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        first: dict[str, str] = {}
        for row in rows:
            if row.get(name) is not None:
                first.setdefault(type(row[name]).__name__, row["path"])
        found = " and ".join(f"{kind} ({path})" for kind, path in first.items())
        reason = "values of one type in all rows" if len(first) > 1 else f"values that parquet can hold ({error})"
        raise InputError(f"field {name!r} of the manifests: found {found}, expected {reason}; mend it or leave it out") from None
