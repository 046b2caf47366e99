"""Metrics as JSON lines: one object a line, ``step`` always among its fields; and in other places that a run asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ichigo_jax.models.declare import cast_params
from ichigo_jax.parallel import hosts
from ichigo_jax.storage import atomic_write, writing
from ichigo_jax.training.trackers import Tracker


@jax.jit
def parameter_norm(params: Any) -> jax.Array:
    """Square root of the sum of all squares, float32 whatever the parameters are. Not part of the step: it reads them all."""
    return optax.global_norm(cast_params(params, jnp.float32))


class MetricsLog:
    """Appends to ``metrics.jsonl`` on the first host; the other hosts write nothing.

    Args:
      path: the file.
      step: the step that the run resumes from; what an interrupted run logged after it is dropped, since those steps
        are taken again.
      trackers: which get the same metrics (``trackers.make_trackers``).

    Raises:
      InputError: here and in ``write``, the file cannot be written.
    """

    def __init__(self, path: Path, step: int, trackers: Sequence[Tracker] = ()):
        self.path, self._trackers = path, trackers
        self.active = hosts.is_first()
        self._last_step: set[str] = set()  # the fields that the file has of ``step``
        if self.active and path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was cut off by a kill
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self._last_step = {name for row in map(json.loads, kept) if row["step"] == step for name in row}
            with atomic_write(path, replace=True) as partial:
                partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def lacks(self, names: Sequence[str]) -> bool:
        """Whether the file has not all of these fields of the step that the run resumes from; False on the other hosts."""
        return self.active and not self._last_step.issuperset(names)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line."""
        if self.active:
            rounded = {name: round(float(value), 6) for name, value in values.items()}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **rounded}) + "\n")
            for tracker in self._trackers:
                tracker.write(step, rounded)

    def close(self) -> None:
        """Nothing more comes."""
        for tracker in self._trackers:
            tracker.close()
