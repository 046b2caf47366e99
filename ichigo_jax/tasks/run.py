"""A run from its first start to its last, and what it writes while it takes steps."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from ichigo_jax.parallel import hosts
from ichigo_jax.tasks.mixture import Mixture
from ichigo_jax.tasks.task import Evaluation, ModelFiles
from ichigo_jax.training import run_config
from ichigo_jax.training.checkpoint import Checkpoints
from ichigo_jax.training.metrics import MetricsLog, parameter_norm
from ichigo_jax.training.optimizer import learning_rate_schedule
from ichigo_jax.training.outcome import Passed, RolledBack
from ichigo_jax.training.run_config import RunConfig
from ichigo_jax.training.skipped import go_back
from ichigo_jax.training.state import Program, TrainState
from ichigo_jax.training.watch import Watch


class Run(NamedTuple):
    """What a run is from its first start to its last; ``train`` says what each is."""

    config: RunConfig
    workdir: Path
    files: ModelFiles
    data: Mixture
    evaluation: Evaluation
    mesh: Mesh
    program: Program
    accept_changed_data: bool

    @property
    def checkpoints_in(self) -> Path | str:
        return self.config.output.checkpoints_in or self.workdir / "checkpoints"

    def due(self, every: int, step: int) -> bool:
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def model(self, state: TrainState) -> nnx.Module:
        return nnx.merge(self.program.graphdef, state.params, state.frozen, state.buffers)


class Records:
    """What a run writes while it takes steps: metrics, checkpoints and evaluations.

    Args:
      run: of which they are.
      watch, checkpoints, log: opened for these steps.
      passed: batches that the run passes over.
    """

    def __init__(self, run: Run, watch: Watch, checkpoints: Checkpoints, log: MetricsLog, passed: Passed):
        self.watch, self.passed = watch, passed
        self._run, self._checkpoints, self._log = run, checkpoints, log
        self._learning_rate = learning_rate_schedule(run.config.optimizer, run.config.train.steps)
        self._belongs = {"config": run_config.as_json(run.config), "sizes": run.data.sizes}  # to every checkpoint

    def log_step(self, step: int, state: TrainState, metrics: dict[str, jax.Array]) -> dict[str, float]:
        values = self._run.files.task.report(jax.device_get(metrics))
        taken = step - values["skipped_steps"]
        values |= {"learning_rate": self._learning_rate(max(taken - 1, 0)), "param_norm": parameter_norm(state.params)}
        self._log.write(step, {**values, **self.watch.measured()})
        return values

    def save(self, step: int, state: TrainState, measured: dict[str, float]) -> None:
        with self.watch.apart("saving", state):
            data = {**self._belongs, **self.passed._asdict(), **self.watch.kept()}
            self._checkpoints.save(state, step, data, measured)

    def evaluation_due(self, step: int) -> bool:
        return bool(self._run.evaluation.measures) and self._run.due(self._run.config.output.evaluate_every, step)

    def evaluate(self, step: int, state: TrainState) -> None:
        with self.watch.apart("evaluation", state):
            values = self._run.evaluation(self._run.model(state))
            self._checkpoints.rank(step, values)
            self._log.write(step, values)

    def make_up_evaluation(self, start: int, state: TrainState) -> None:
        """Evaluates the checkpoint that the run resumes from, where the start before was kept from it."""
        if start and self.evaluation_due(start) and hosts.max_over_hosts(self._log.lacks(self._run.evaluation.measures)):
            self.evaluate(start, state)

    def go_back(self, step: int, skipped: int) -> RolledBack:
        run = self._run
        roll_backs = run.config.train.roll_backs
        return go_back(step, skipped, self.passed, roll_backs, self._checkpoints, run.data.rows_of_batch, run.workdir)
