"""A signal that asks the run to stop is answered between two steps."""

from __future__ import annotations

import signal

from ichigo_jax.parallel import hosts


class StopSignals:
    """Within the block, the first SIGTERM or SIGINT is only noted; a second one acts as it always does.

    Attributes:
      received: the signal's number, or None.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def anywhere(self) -> int | None:
        """The signal that any of the processes received; they agree on it, so that all stop after the same step."""
        return hosts.max_over_hosts(self.received or 0) or None

    def _note(self, number: int, _frame) -> None:
        self.received = number
        signal.signal(number, self._before[number])
