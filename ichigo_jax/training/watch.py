"""What a run tells of itself: how fast it is, how much of what its chips could do that is, and what its time is lost to."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import hosts
from ichigo_jax.training.goodput import Goodput
from ichigo_jax.training.run_config import OutputConfig
from ichigo_jax.training.watchdog import Watchdog


class StepWork(NamedTuple):
    """What one step does, over all chips together.

    Attributes:
      tokens: in a batch, see ``tasks.task.Task.tokens_per_step``.
      chips: that share it.
      model_flops: what it must compute (``tasks.model_flops``); None where ``peak_flops`` is.
      peak_flops: bfloat16 operations a second of one chip; None where they are not known, as on a CPU.
    """

    tokens: int
    chips: int
    model_flops: float | None
    peak_flops: float | None


class ProfiledSteps(NamedTuple):
    """The steps to trace, both included."""

    first: int
    last: int


def parse_profile(text: str, steps: int) -> ProfiledSteps:
    """``"10:12"`` -> steps 10, 11 and 12.

    Raises:
      InputError: not two steps of a run of so many.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]) <= steps:
        raise InputError(f"--profile {text!r} found, expected START:STOP with 1 <= START <= STOP <= {steps}, as 10:12")
    return ProfiledSteps(int(found[1]), int(found[2]))


class Watch:
    """Beside the loop, from its first step to its last.

    Within ``with watch:``, which ends without an error only after a checkpoint, the loop says ``begin`` once, then around each
    step ``next_batch`` and ``took``, and does whatever is no step within ``apart``. What is measured is the time between two
    ``measured``, when nothing waits on the device any more, less what is apart; a start's first step, which compiles, is left
    out.

    Args:
      workdir: of the run; gets ``goodput.json`` and ``profile``.
      output: of the config.
      work: what a step does.
      profile: steps that are traced into ``WORKDIR/profile``; None: none. Of a run that resumes within them, those that are left.
      began: when the start began, in seconds since 1970.
    """

    def __init__(self, workdir: Path, output: OutputConfig, work: StepWork, profile: ProfiledSteps | None, began: float):
        self._workdir, self._work, self._profile, self._began = workdir, work, profile, began
        self._watchdog = Watchdog(output.stall_seconds)
        self._goodput: Goodput | None = None
        self._trace: contextlib.ExitStack | None = None
        self._step, self._last_metrics = 0, None
        self._first_done = False

    def __enter__(self) -> Watch:
        self._watchdog.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._stop_trace()
        if self._goodput is not None:
            if error[0] is None:
                self._goodput.finish()
            else:
                with contextlib.suppress(InputError):  # of a full disk; the error that ends the run says more
                    self._goodput.note(self._step, now=True)
        self._watchdog.__exit__(*error)

    def begin(self, step: int, kept: Mapping[str, Any]) -> None:
        """The loop goes on from ``step``, whose checkpoint holds ``kept``; 0 and nothing for a new run."""
        path = self._workdir / "goodput.json"
        self._goodput = Goodput(path, step, kept, self._began, write=hosts.is_first())
        self._step = step
        self._new_interval()

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """The next of ``batches``; the time that this takes is what the loop waits for data."""
        if self._profile is not None and self._profile.first <= self._step + 1 <= self._profile.last and self._trace is None:
            self._start_trace()
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def took(self, step: int, metrics: Any) -> None:
        """A step has been given to the devices; ``metrics`` are its results, which need not be there yet.

        Waits for the step before, so that the loop is never more than one step ahead: devices have the next step while they
        work, and a step that hangs is noticed when it does.
        """
        jax.block_until_ready(self._last_metrics)
        self._step, self._last_metrics = step, metrics
        if self._profile is not None and step >= self._profile.last:
            self._stop_trace()
        finished = step - 1
        if not self._first_done:
            jax.block_until_ready(metrics)
            finished = step
            self._first_done = True
            self._goodput.first_step_done()
            self._new_interval()
        self._watchdog.beat(finished)

    @contextlib.contextmanager
    def apart(self, kind: str, state: Any) -> Iterator[None]:
        """What the loop does within is no step. Waits for ``state`` first, so that steps' own time is not counted to it."""
        jax.block_until_ready(state)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._apart += seconds
            self._goodput.spend(kind, seconds)

    def kept(self) -> dict[str, float]:
        """What ``begin`` is to be given by a run that resumes from a checkpoint of now."""
        return self._goodput.kept(self._step)

    def measured(self) -> dict[str, float]:
        """Since the last call, to be made when the last step's results are there. docs/training.md says what each field is.

        Returns:
          ``step_seconds``, ``steps_per_second``, ``tokens_per_second_per_chip``, ``mfu`` where the chip is known,
          ``data_wait_seconds``, ``data_wait_share``; these where a step was finished that could be measured; ``goodput``; and
          ``memory_bytes/N`` and ``memory_peak_bytes/N`` for each device N of this process that tells.
        """
        values = _memory()
        steps, seconds = self._step - self._since, time.perf_counter() - self._clock - self._apart
        if steps and seconds > 0:
            work = self._work
            values |= {
                "step_seconds": seconds / steps,
                "steps_per_second": steps / seconds,
                "tokens_per_second_per_chip": steps * work.tokens / seconds / work.chips,
                "data_wait_seconds": self._waited,
                "data_wait_share": self._waited / seconds,
            }
            if work.model_flops is not None:
                values["mfu"] = steps * work.model_flops / (seconds * work.chips * work.peak_flops)
        self._goodput.note(self._step)
        self._new_interval()
        return {**values, "goodput": self._goodput.share()}

    def _new_interval(self) -> None:
        self._clock, self._since = time.perf_counter(), self._step
        self._waited = self._apart = 0.0

    def _start_trace(self) -> None:
        with self.apart("profiling", self._last_metrics):  # else the trace began with a step that is still under way
            self._trace = contextlib.ExitStack()
            self._trace.enter_context(jax.profiler.trace(self._workdir / "profile"))

    def _stop_trace(self) -> None:
        if self._trace is not None:
            with self.apart("profiling", self._last_metrics):
                self._trace.close()
            self._trace = None


def _memory() -> dict[str, float]:
    values = {}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        for field, name in (("bytes_in_use", "memory_bytes"), ("peak_bytes_in_use", "memory_peak_bytes")):
            if field in stats:
                values[f"{name}/{device.id}"] = stats[field]
    return values
