"""What the benchmarks share: turns of several programs on one machine, and their figures as Markdown and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """Of one call, which must wait for its own result."""
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def turn_by_turn(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The median seconds of each, called one after the other again and again, so that a busy machine slows all of them."""
    turns = [[seconds(run) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*turns)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)  # noqa: E731
    lines = [[name.replace("_", " ") for name in rows[0]], ["---"] * len(rows[0]), *([*map(shown, row.values())] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(tables: dict[str, list[dict[str, Any]]], packages: Sequence[str], load: float) -> None:
    """Prints every table, then one line of JSON with the figures, the device, the versions and how busy the machine was.

    Args:
      tables: name to rows.
      packages: whose versions belong to the figures.
      load: processes that ran or wanted to, on average over the minute before the measurement (``load_average``).
    """
    for rows in tables.values():
        print(table(rows), end="\n\n")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    machine = {"device": jax.devices()[0].device_kind, "cpus": os.cpu_count(), "load_before": load}
    print(json.dumps({**machine, "versions": versions, **tables}))


def load_average() -> float:
    return os.getloadavg()[0]
