"""Trains the speech tokenizer or the language model: the one entry for every training stage.

    python -m ichigo_jax.train --config configs/FILE.py[:ARG] --workdir DIR [--config.section.field=value …]

Writes DIR/config.json, DIR/metrics.jsonl, DIR/goodput.json, DIR/checkpoints/ and, at the end, the model folder DIR/model. The
same command again resumes; a finished run is left as it is. SIGTERM and Ctrl-C save a checkpoint at the current step and exit
with 128 + the signal's number (143, 130).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from ichigo_jax import errors
from ichigo_jax.data.loading import read_batches
from ichigo_jax.errors import InputError
from ichigo_jax.models.attention import check_backend
from ichigo_jax.models.declare import Buffer, cast_params
from ichigo_jax.parallel import hosts, make_mesh
from ichigo_jax.tasks import Task, make_task
from ichigo_jax.tasks.model_flops import step_work
from ichigo_jax.tasks.task import check_best
from ichigo_jax.training import run_config
from ichigo_jax.training.checkpoint import Checkpoints, check_address
from ichigo_jax.training.losses import count_examples
from ichigo_jax.training.metrics import MetricsLog, parameter_norm
from ichigo_jax.training.optimizer import learning_rate_schedule, make_optimizer
from ichigo_jax.training.run_config import RunConfig
from ichigo_jax.training.skipped import Passed, check_examples, go_back
from ichigo_jax.training.state import TrainState, is_spike, logical_axes, make_state, split, state_shardings
from ichigo_jax.training.stop import StopSignals
from ichigo_jax.training.trackers import check_trackers, make_trackers
from ichigo_jax.training.watch import ProfiledSteps, Watch, parse_profile


def make_step(task: Task, config: RunConfig, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """One optimizer step, ``(state, batch) -> (state, metrics)``, to be jitted."""
    parts = config.train.accumulation
    dtype = jnp.dtype(config.train.compute_dtype)

    def loss(params, frozen, buffers, part, totals, key):
        model = nnx.merge(graphdef, cast_params(params, dtype), cast_params(frozen, dtype), buffers)
        value, metrics = task.loss(model, part, totals, key)
        return value, ({"loss": value, **metrics}, nnx.to_pure_dict(nnx.state(model, Buffer)))

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        totals = task.totals(batch)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step), parts)
        full = cast_params(state.params, jnp.float32)  # whatever they are kept in, gradients and updates are float32

        def part_of_sums(buffers, part, key):
            (_, (metrics, buffers)), grads = jax.value_and_grad(loss, has_aux=True)(
                full, state.frozen, buffers, part, totals, key
            )
            return buffers, (grads, metrics)

        def add_part(carry, part_and_key):
            buffers, new = part_of_sums(carry[0], *part_and_key)
            return (buffers, jax.tree.map(jnp.add, carry[1], new)), None

        # Parts interleave the batch (row r belongs to part r mod parts), so that each stays spread over the data axis.
        split_batch = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        first = (state.buffers, jax.tree.map(lambda x: x[0], split_batch), keys[0])
        if parts == 1:
            buffers, (grads, metrics) = part_of_sums(*first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part_of_sums, *first)[1])
            (buffers, (grads, metrics)), _ = jax.lax.scan(add_part, (state.buffers, zeros), (split_batch, keys))

        examples, grad_norm = count_examples(batch["targets"]), optax.global_norm(grads)
        measured = jnp.stack([metrics["loss"], grad_norm])
        fine = (examples > 0) & jnp.isfinite(measured).all() & ~is_spike(state.recent, measured, config.train.spike_factor)

        def take():
            updates, opt_state = optimizer.update(grads, state.opt_state, full)
            recent = jnp.append(state.recent[:, 1:], measured[:, None], axis=1)
            return optax.apply_updates(state.params, updates), buffers, opt_state, recent

        def skip():
            return state.params, state.buffers, state.opt_state, state.recent

        params, new_buffers, opt_state, recent = jax.lax.cond(fine, take, skip)
        skipped = state.skipped + ~fine
        in_a_row = jnp.where(fine, 0, state.skipped_in_a_row + 1)
        state = TrainState(state.step + 1, params, state.frozen, new_buffers, opt_state, skipped, in_a_row, recent)
        counts = {"examples": examples, "skipped_steps": skipped, "skipped_in_a_row": in_a_row}
        return state, {**metrics, "grad_norm": grad_norm, **counts}

    return step


class Program(NamedTuple):
    """A run's step and what it works on, before any array exists; ``plan`` compiles it for devices that are not there.

    Attributes:
      graphdef: the model's structure.
      state: shapes, dtypes and shardings of the state.
      initial_state: a model to the state at step 0.
      step: ``make_step``, jitted; gives up its state's memory.
    """

    graphdef: nnx.GraphDef
    state: TrainState
    initial_state: Callable[[nnx.Module], TrainState]
    step: Callable


def make_program(task: Task, config: RunConfig, mesh: Mesh) -> Program:
    """The program of one run on a mesh, which must be set (``jax.set_mesh``)."""
    frozen = config.optimizer.frozen
    abstract = nnx.eval_shape(lambda: task.make_model(nnx.Rngs(config.seed)))
    optimizer = make_optimizer(config.optimizer, config.train.steps, abstract)

    def initial_state(model: nnx.Module) -> TrainState:
        _, params, untrained, buffers = split(model, frozen)
        return make_state(cast_params(params, config.train.param_dtype), untrained, buffers, optimizer, config.train.spike_window)

    state = jax.eval_shape(lambda: initial_state(task.make_model(nnx.Rngs(config.seed))))
    shardings = state_shardings(state, logical_axes(abstract, frozen), mesh)
    state = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings)
    graphdef = split(abstract, frozen)[0]
    step = jax.jit(make_step(task, config, graphdef, optimizer), donate_argnums=0, out_shardings=(shardings, None))
    return Program(graphdef, state, initial_state, step)


def train(config: RunConfig, workdir: Path, profile: ProfiledSteps | None = None, accept_changed_data: bool = False) -> int:
    """Runs or resumes one training run; returns the process's exit code.

    Args:
      config: all of the run.
      workdir: where it lives.
      profile: steps that are traced.
      accept_changed_data: whether it goes on although its data sources have other numbers of examples than when it began.
    """
    errors.check_jaxlib()
    began = time.time()
    run_config.check_workdir(workdir, config)
    if hosts.max_over_hosts((workdir / "model").exists()):  # the first process wrote it; the others may have disks of their own
        print(f"{workdir}/model is complete; nothing to do")
        return 0
    check_trackers(config.output)
    check_address(config.output.checkpoints_in)
    mesh = make_mesh(vars(config.mesh))
    check_backend(config.train.attention, mesh.devices.flat[0].platform, config.train.compute_dtype, mesh.shape["context"])
    task = make_task(config, workdir)
    check_best(config.output.checkpoint_best, task.measures)
    run_config.claim_workdir(workdir, config)  # only now, so that a config that cannot run leaves no trace
    with jax.set_mesh(mesh), StopSignals() as stop:
        run = Run(config, workdir, task, mesh, make_program(task, config, mesh), accept_changed_data)
        work, passed = step_work(task, config, mesh), None
        while True:
            watch = Watch(workdir, config.output, work, profile, began)
            signal, passed = take_steps(run, stop, watch, passed)
            if passed is None:
                return 128 + signal if signal else 0
            began = time.time()


class Run(NamedTuple):
    """What the steps of a run need from first to last; ``train`` says what each is."""

    config: RunConfig
    workdir: Path
    task: Task
    mesh: Mesh
    program: Program
    accept_changed_data: bool


def take_steps(run: Run, stop: StopSignals, watch: Watch, passed: Passed | None) -> tuple[int | None, Passed | None]:
    """From the newest checkpoint, or the beginning, to the model folder, to a signal, or back to an earlier checkpoint.

    Args:
      passed: batches to pass over, of a run that has just gone back; None: what its checkpoint says.

    Returns:
      The number of the signal, or None; what is to be passed over where the run has gone back, else None.
    """
    config, workdir, task, mesh, program, accept_changed_data = run
    steps, output = config.train.steps, config.output
    kept = (output.checkpoints_kept, output.checkpoint_kept_every, output.checkpoint_best)
    where = output.checkpoints_in or workdir / "checkpoints"
    belongs = {"config": run_config.as_json(config), "sizes": task.data_sizes()}  # to every checkpoint

    with watch, contextlib.ExitStack() as opened:  # also after an error, what is being saved becomes whole
        checkpoints = opened.enter_context(Checkpoints(where, *kept))

        # 1. Resume; 2. else begin from a model folder; 3. else from random parameters.
        shardings = jax.tree.map(lambda x: x.sharding, program.state)
        start, saved, resumed = 0, {}, checkpoints.restore(program.state)
        if resumed is not None:
            start, state, saved = resumed
            what = f"{where}: another config wrote these checkpoints"
            run_config.check_same(saved["config"], config, what, "choose another output.checkpoints_in")
            check_data_sizes(saved["sizes"], belongs["sizes"], accept_changed_data)
        elif config.init_from is not None:
            state = jax.jit(program.initial_state, out_shardings=shardings)(task.load_model(config.init_from, mesh))
        else:
            random = lambda: program.initial_state(task.make_model(nnx.Rngs(config.seed)))  # noqa: E731
            state = jax.jit(random, out_shardings=shardings)()
        passed = passed or Passed.of(saved)

        learning_rate = learning_rate_schedule(config.optimizer, steps)
        log = opened.enter_context(MetricsLog(workdir / "metrics.jsonl", start, make_trackers(config, workdir, start)))
        progress = opened.enter_context(tqdm(total=steps, initial=start, desc=workdir.name, disable=not hosts.is_first()))

        def model_of(state: TrainState) -> nnx.Module:
            return nnx.merge(program.graphdef, state.params, state.frozen, state.buffers)

        def due(every: int, step: int) -> bool:
            return step == steps or (every > 0 and step % every == 0)

        def evaluate(state: TrainState, step: int) -> None:
            with watch.apart("evaluation", state):
                values = task.evaluate(model_of(state))
                checkpoints.rank(step, values)
                log.write(step, values)

        evaluates = bool(task.measures)
        batches = read_batches(task.examples(), config.train.batch_size, start + passed.passed_batches, mesh)
        watch.begin(start, saved)
        if evaluates and start and due(output.evaluate_every, start) and hosts.max_over_hosts(log.lacks(task.measures)):
            evaluate(state, start)  # which the start before was kept from
        signal = behind = None
        for step in range(start + 1, steps + 1):
            batch = watch.next_batch(batches)
            state, metrics = program.step(state, batch)
            watch.took(step, metrics)
            measured = {}

            if due(output.log_every, step):
                values = task.report(jax.device_get(metrics))
                taken = step - values["skipped_steps"]
                values |= {"learning_rate": learning_rate(max(taken - 1, 0)), "param_norm": parameter_norm(state.params)}
                log.write(step, {**values, **watch.measured()})
                measured = values
                progress.set_postfix(loss=f"{values['loss']:.3f}")
                check_examples(step, values, task.faults_file)
                if (skipped := int(values["skipped_in_a_row"])) >= config.train.stop_after_skipped:
                    behind = go_back(step, skipped, passed, config.train.roll_backs, checkpoints, task.rows_of_batch, workdir)
                    break
            progress.update()

            signal = stop.anywhere()
            evaluation_due = evaluates and due(output.evaluate_every, step)
            if due(output.checkpoint_every, step) or evaluation_due or signal:
                check_examples(step, metrics, task.faults_file)
                with watch.apart("saving", state):
                    checkpoints.save(state, step, {**belongs, **passed._asdict(), **watch.kept()}, measured)
            if signal:
                break
            if evaluation_due:
                evaluate(state, step)
        opened.close()
        if signal:
            print(f"stopped at step {step} by signal {signal}; the same command goes on from there")
        elif behind is None:
            task.save(model_of(state), workdir / "model", run_config.origin(config, workdir, steps))
    return signal, behind


def check_data_sizes(before: list[int], now: list[int], accept: bool) -> None:
    """A resumed run reads batches by number, which only means the same batches on the same data."""
    if before == now:
        return
    found = f"the data sources had {before} examples when this run began, now {now}"
    if not accept:
        raise InputError(f"{found}; restore them, choose another --workdir, or go on with --accept-changed-data")
    print(f"{found}; from here on batches are of what is there now", file=sys.stderr)


@errors.command
def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ichigo_jax.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/FILE.py or configs/FILE.py:ARG")
    parser.add_argument("--workdir", required=True, type=Path, help="where the run lives; the same folder resumes")
    parser.add_argument("--profile", metavar="START:STOP", help="trace these steps, both included, into WORKDIR/profile")
    parser.add_argument("--accept-changed-data", action="store_true", help="resume although data sources have changed in size")
    hosts.add_arguments(parser)
    arguments, overrides = parser.parse_known_args()
    config = run_config.load(arguments.config, overrides)
    profile = parse_profile(arguments.profile, config.train.steps) if arguments.profile is not None else None
    hosts.join(arguments)
    return train(config, arguments.workdir, profile, arguments.accept_changed_data)


if __name__ == "__main__":
    main()
