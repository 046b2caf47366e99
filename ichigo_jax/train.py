"""Trains the speech tokenizer or the language model: the one entry for every training stage.

    python -m ichigo_jax.train --config configs/FILE.py[:ARG] --workdir DIR [--config.section.field=value …]

Writes DIR/config.json, DIR/metrics.jsonl, DIR/goodput.json, DIR/checkpoints/ and, at the end, the model folder DIR/model. The
same command again resumes; a finished run is left as it is. SIGTERM and Ctrl-C save a checkpoint at the current step and exit
with 128 + the signal's number (143, 130).
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from ichigo_jax import errors
from ichigo_jax.arguments import ArgumentParser
from ichigo_jax.data.loading import read_batches
from ichigo_jax.models.attention import check_backend
from ichigo_jax.models.declare import Buffer, cast_params
from ichigo_jax.parallel import hosts, make_mesh
from ichigo_jax.tasks import Task, open_files
from ichigo_jax.tasks.model_flops import step_work
from ichigo_jax.tasks.run import Records, Run
from ichigo_jax.tasks.task import check_best
from ichigo_jax.training import run_config
from ichigo_jax.training.checkpoint import Checkpoints, Resumed, check_address
from ichigo_jax.training.losses import count_examples
from ichigo_jax.training.metrics import MetricsLog
from ichigo_jax.training.optimizer import make_optimizer
from ichigo_jax.training.outcome import Finished, Outcome, Passed, RolledBack, Stopped
from ichigo_jax.training.run_config import RunConfig
from ichigo_jax.training.skipped import check_examples
from ichigo_jax.training.state import Program, TrainState, is_spike, logical_axes, make_state, split, state_shardings
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
    files = open_files(config)
    evaluation = files.open_evaluation()
    check_best(config.output.checkpoint_best, evaluation.measures)
    data = files.open_data(workdir)
    run_config.claim_workdir(workdir, config)  # only now, so that a config that cannot run leaves no trace
    with jax.set_mesh(mesh), StopSignals() as stop:
        program = make_program(files.task, config, mesh)
        run = Run(config, workdir, files, data, evaluation, mesh, program, accept_changed_data)
        work, passed = step_work(files.task, config, mesh), None
        while True:
            outcome = take_steps(run, stop, Watch(workdir, config.output, work, profile, began), passed)
            match outcome:
                case Finished():
                    return 0
                case Stopped(signal=signal):
                    return 128 + signal
                case RolledBack(passed=passed):
                    began = time.time()


def take_steps(run: Run, stop: StopSignals, watch: Watch, passed: Passed | None) -> Outcome:
    """Runs until the model is saved, a signal arrives or the run rolls back.

    Args:
      passed: batches to pass over, of a run that has just rolled back; None: what its checkpoint says.
    """
    config, workdir, output = run.config, run.workdir, run.config.output
    kept = (output.checkpoints_kept, output.checkpoint_kept_every, output.checkpoint_best)
    with watch, contextlib.ExitStack() as opened:  # also after an error, what is being saved becomes whole
        checkpoints = opened.enter_context(Checkpoints(run.checkpoints_in, *kept))
        start, state, saved = begin(run, checkpoints)
        log = opened.enter_context(MetricsLog(workdir / "metrics.jsonl", start, make_trackers(config, workdir, start)))
        records = Records(run, watch, checkpoints, log, passed or Passed.of(saved))
        bar = tqdm(total=config.train.steps, initial=start, desc=workdir.name, disable=not hosts.is_first())
        progress = opened.enter_context(bar)
        skip = start + records.passed.passed_batches
        batches = read_batches(run.data.examples(), config.train.batch_size, skip, run.mesh)
        watch.begin(start, saved)
        state, outcome = loop(run, start, state, batches, records, stop, progress)
        opened.close()
        match outcome:
            case Finished():
                run.files.save(run.model(state), workdir / "model", run_config.origin(config, workdir, config.train.steps))
            case Stopped(step, signal):
                print(f"stopped at step {step} by signal {signal}; the same command goes on from there")
    return outcome


def begin(run: Run, checkpoints: Checkpoints) -> Resumed:
    """The step and the state that the run goes on from; of a new run, step 0 and no data."""
    config, task, program = run.config, run.files.task, run.program
    shardings = jax.tree.map(lambda x: x.sharding, program.state)
    # 1. Resume from the newest checkpoint.
    if (resumed := checkpoints.restore(program.state)) is not None:
        what = f"{run.checkpoints_in}: another config wrote these checkpoints"
        run_config.check_same(resumed.data["config"], config, what, "choose another output.checkpoints_in")
        run.data.check_sizes(resumed.data["sizes"], run.accept_changed_data)
        return resumed
    # 2. Else begin from a model folder.
    if config.init_from is not None:
        model = task.load_model(config.init_from, run.mesh)
        return Resumed(0, jax.jit(program.initial_state, out_shardings=shardings)(model), {})
    # 3. Else begin from random parameters.
    random = lambda: program.initial_state(task.make_model(nnx.Rngs(config.seed)))  # noqa: E731
    return Resumed(0, jax.jit(random, out_shardings=shardings)(), {})


def loop(
    run: Run, start: int, state: TrainState, batches: Iterator, records: Records, stop: StopSignals, progress: tqdm
) -> tuple[TrainState, Outcome]:
    """The steps after ``start``, with what is due after each."""
    train, output, faults_file = run.config.train, run.config.output, run.data.faults_file
    records.make_up_evaluation(start, state)
    for step in range(start + 1, train.steps + 1):
        batch = records.watch.next_batch(batches)
        state, metrics = run.program.step(state, batch)
        records.watch.took(step, metrics)
        measured = {}

        if run.due(output.log_every, step):
            measured = records.log_step(step, state, metrics)
            progress.set_postfix(loss=f"{measured['loss']:.3f}")
            check_examples(step, measured, faults_file)
            if measured["skipped_in_a_row"] >= train.stop_after_skipped:
                return state, records.go_back(step, int(measured["skipped_in_a_row"]))
        progress.update()

        signal, evaluation_due = stop.anywhere(), records.evaluation_due(step)
        if run.due(output.checkpoint_every, step) or evaluation_due or signal:
            check_examples(step, metrics, faults_file)
            records.save(step, state, measured)
        if signal:
            return state, Stopped(step, signal)
        if evaluation_due:
            records.evaluate(step, state)
    return state, Finished()


@errors.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m ichigo_jax.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", required=True, help="configs/FILE.py or configs/FILE.py:ARG")
    parser.add_argument("--workdir", required=True, type=Path, help="where the run lives; the same folder resumes")
    parser.add_argument("--profile", metavar="START:STOP", help="trace these steps, both included, into WORKDIR/profile")
    parser.add_argument("--accept-changed-data", action="store_true", help="resume although data sources have changed in size")
    hosts.add_arguments(parser)
    arguments, overrides = parser.parse_known_args(argv)
    config = run_config.load(arguments.config, overrides)
    profile = parse_profile(arguments.profile, config.train.steps) if arguments.profile is not None else None
    hosts.join(arguments)
    return train(config, arguments.workdir, profile, arguments.accept_changed_data)


if __name__ == "__main__":
    main()
