"""Tells of a run that hangs, and where."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from typing import IO


class Watchdog:
    """Within the block, when ``beat`` has not been called for so long, prints so and the stacks of all Python threads.

    Once for each stall: the next ``beat`` ends it. The run is not ended; a watcher of its own may do that.

    Args:
      seconds: without a beat that are a stall; 0: nothing is watched.
      file: where to print; must be a real file. None: standard error.
    """

    def __init__(self, seconds: float, file: IO[str] | None = None):
        self._seconds, self._file = seconds, file
        self._last = (0, time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat(0)
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int) -> None:
        """The run goes on; ``step`` is the last one that is finished."""
        self._last = (step, time.monotonic())

    def _watch(self) -> None:
        told = None
        while not self._over.wait(self._seconds / 10):
            last = self._last
            quiet = time.monotonic() - last[1]
            if quiet >= self._seconds and last != told:
                told = last
                self._tell(last[0], quiet)

    def _tell(self, step: int, quiet: float) -> None:
        file = self._file or sys.stderr
        where = f"after step {step}" if step else "before the first step"
        print(f"stalled: no step was finished for {quiet:.1f} seconds, {where}; the run goes on; its stacks:", file=file)
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
