"""How the steps of a run come to an end: the model is saved, a signal stopped them, or they begin again at a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class Passed(NamedTuple):
    """Batches that a run took no steps of, since it went back to a checkpoint and on behind them; saved with checkpoints.

    Attributes:
      passed_batches: how many; step s learns from batch s - 1 + passed_batches.
      roll_backs: how often the run went back.
    """

    passed_batches: int
    roll_backs: int

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Passed:
        """What a checkpoint's data hold of it; none of a new run."""
        return cls(saved.get("passed_batches", 0), saved.get("roll_backs", 0))


@dataclasses.dataclass(frozen=True)
class Finished:
    """All steps were taken."""


@dataclasses.dataclass(frozen=True)
class Stopped:
    """A signal arrived; the checkpoint of ``step`` is saved."""

    step: int
    signal: int


@dataclasses.dataclass(frozen=True)
class RolledBack:
    """Too many steps in a row were skipped; the run begins again at the checkpoint of ``step``.

    Attributes:
      step: of that checkpoint.
      passed: what the run passes over from there on.
    """

    step: int
    passed: Passed


Outcome = Finished | Stopped | RolledBack
