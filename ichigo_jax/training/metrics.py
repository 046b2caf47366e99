"""Metrics as JSON lines: one object a line, ``step`` always among its fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ichigo_jax.storage import whole


class MetricsLog:
    """Appends to ``metrics.jsonl`` on the first host; the other hosts write nothing.

    Args:
      path: the file.
      step: the step that the run resumes from; what an interrupted run logged after it is dropped, since those steps
        are taken again.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.active = jax.process_index() == 0
        if self.active and path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was cut off by a kill
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            with whole(path, replace=True) as partial:
                partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        if self.active:
            row = {"step": step, **{name: round(float(value), 6) for name, value in values.items()}}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
