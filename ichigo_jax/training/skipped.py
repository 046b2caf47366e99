"""What a run does when too many steps in a row were skipped: it tells of their batches, and goes back or ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import hosts
from ichigo_jax.storage import write_json
from ichigo_jax.training.checkpoint import Checkpoints
from ichigo_jax.training.outcome import Passed, RolledBack

SHOWN = 4  # rows of the last batch that a message names


def check_examples(step: int, metrics: Mapping[str, Any], faults: Path) -> None:
    """Ends a run that has learned from nothing so far: every step was skipped, this one because no example could be used.

    Args:
      step: the last one taken.
      metrics: of this step, as ``train.make_step`` gives them.
      faults: the file that names what cannot be used.

    Raises:
      InputError: it is such a run.
    """
    if int(metrics["examples"]) == 0 and int(metrics["skipped_steps"]) == step:
        raise InputError(
            f"step {step}: no step so far had an example that can be used, so nothing was learned; {faults} says why of each: "
            "mend the data and choose another --workdir"
        )


def go_back(
    step: int,
    skipped: int,
    passed: Passed,
    allowed: int,
    checkpoints: Checkpoints,
    rows_of_batch: Callable[[int], Mapping[str, list[int]]],
    workdir: Path,
) -> RolledBack:
    """Makes the last checkpoint before the skipped steps the newest and tells of it.

    Writes the rows of the batches that were skipped to ``WORKDIR/skipped_batches.json``.

    Args:
      step: the last one that was skipped.
      skipped: so many in a row were.
      passed: of the run so far.
      allowed: how often a run may go back.
      checkpoints: of the run; those from the first skipped step on are removed.
      rows_of_batch: for the number of a batch, the rows of each data source in it.
      workdir: of the run.

    Raises:
      InputError: the run has gone back often enough, or there is no earlier checkpoint; the message names the batches.
    """
    numbers = range(step - skipped + passed.passed_batches, step + passed.passed_batches)
    rows = {number: rows_of_batch(number) for number in numbers}
    path = workdir / "skipped_batches.json"
    if hosts.is_first():
        write_json(path, [{"batch": number, "rows": found} for number, found in rows.items()])
    source, last = next(iter(rows[numbers[-1]].items()))
    found = (
        f"step {step}: the last {skipped} steps had losses or gradients that were not finite or spiked, or no example that can "
        f"be used; they are of batches "
        f"{numbers[0]} to {numbers[-1]}, the last with rows {', '.join(map(str, last[:SHOWN]))}… of {source} (all are in {path})"
    )
    advice = "lower the learning rate or look at the data"
    if passed.roll_backs >= allowed:
        raise InputError(f"{found}; {advice}, or let the run go back more often than train.roll_backs={allowed}")
    before = checkpoints.go_back_to(step - skipped)
    if before is None:
        raise InputError(f"{found}; there is no checkpoint before them to go back to; {advice}")
    if hosts.is_first():
        print(f"{found}; going back to step {before} and on with batch {numbers.stop}", file=sys.stderr)
    return RolledBack(before, Passed(numbers.stop - before, passed.roll_backs + 1))
