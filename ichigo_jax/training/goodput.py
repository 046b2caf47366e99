"""What share of its time a run spends on steps that count, across restarts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ichigo_jax.errors import writing
from ichigo_jax.storage import read_json, write_json

WRITE_EVERY = 10.0  # seconds between two writings of the file, but for those that must not wait


class Goodput:
    """Productive seconds over all seconds since the run was first started, kept in a JSON file in the workdir.

    Productive is the time from the end of a start's first step on, without what the loop spent apart from steps (evaluation,
    saving), of steps that were kept. So starting and compiling, the steps since the last checkpoint before a kill, the time
    between two starts, and everything that is apart are what is missing from 1. The productive seconds up to a step are saved
    with its checkpoint (``kept``), and a start goes on from those: a step that is taken again counts once.

    The file holds one object for each start: ``began`` and ``last_seen`` (seconds since 1970), ``from_step`` and ``last_step``,
    ``startup_seconds`` until the end of its first step, ``apart_seconds`` by kind, ``productive_seconds`` of the run so far, and
    what the restart had cost when it began: ``away_seconds`` since the one before was last seen, its ``lost_steps``, which were
    not in the checkpoint, and their ``lost_seconds``. After a kill the last two and ``away_seconds`` may be off by what happened
    since the file was last written; together they are exact.

    Args:
      path: the file.
      step: the step of the checkpoint that this start goes on from, or 0.
      kept: what ``kept`` gave when that was saved; empty where there is none.
      began: when this start began, by ``clock``.
      write: whether this process keeps the file.
      clock: seconds since 1970.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        kept: Mapping[str, float],
        began: float,
        write: bool,
        clock: Callable[[], float] = time.time,
    ):
        self._path, self._write, self._clock = path, write, clock
        self._kept = kept.get("productive_seconds", 0.0)
        self._ready: float | None = None  # when the first step was finished
        self._apart = 0.0  # seconds since then
        self._written = float("-inf")
        starts: list[dict[str, Any]] = read_json(path)["starts"] if path.exists() else []
        start = {"began": began, "from_step": step}
        if starts:
            before = starts[-1]
            start["away_seconds"] = began - before["last_seen"]
            start["lost_steps"] = max(0, before["last_step"] - step)
            start["lost_seconds"] = max(0.0, before["productive_seconds"] - self._kept)
        self._first_began = min([began, kept.get("first_began", began), *(each["began"] for each in starts)])
        self._starts = [*starts, start]
        self._start = start
        start["startup_seconds"], start["apart_seconds"] = 0.0, {}
        self.note(step, now=True)

    def first_step_done(self) -> None:
        """From now on time is productive."""
        self._ready = self._clock()
        self._start["startup_seconds"] = self._ready - self._start["began"]

    def spend(self, kind: str, seconds: float) -> None:
        """So much of the time until now went into something else than steps."""
        self._start["apart_seconds"][kind] = self._start["apart_seconds"].get(kind, 0.0) + seconds
        if self._ready is not None:
            self._apart += seconds

    def productive_seconds(self) -> float:
        """Of the whole run until now."""
        return self._kept if self._ready is None else self._kept + self._clock() - self._ready - self._apart

    def kept(self, step: int) -> dict[str, float]:
        """What belongs to a checkpoint of ``step``, which is made now."""
        self.note(step, now=True)
        return {"productive_seconds": self._start["productive_seconds"], "first_began": self._first_began}

    def finish(self) -> None:
        """The start is over, with a checkpoint; what came since then were no steps."""
        self.spend("finishing", self.productive_seconds() - self._start["productive_seconds"])
        self.note(self._start["last_step"], now=True)

    def share(self) -> float:
        """Productive seconds over all seconds since the very first start, from 0 to 1."""
        total = self._clock() - self._first_began
        return self.productive_seconds() / total if total > 0 else 0.0

    def note(self, step: int, now: bool = False) -> None:
        """The run has come to ``step``. Writes the file when the last writing is some seconds ago, or ``now``."""
        time_now = self._clock()
        self._start |= {"last_seen": time_now, "last_step": step, "productive_seconds": self.productive_seconds()}
        if self._write and (now or time_now - self._written >= WRITE_EVERY):
            with writing(self._path):
                write_json(self._path, {"starts": self._starts})
            self._written = time_now
