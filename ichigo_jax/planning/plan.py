"""One compiled training step for devices that need not be there, and what it says of memory, work and time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from ichigo_jax.errors import InputError
from ichigo_jax.models.stack import Remat
from ichigo_jax.parallel import batch_sharding, make_mesh
from ichigo_jax.parallel.chips import GIB
from ichigo_jax.planning.hlo import BETWEEN_SLICES, Program
from ichigo_jax.planning.topology import Topology
from ichigo_jax.tasks import Task, planned_task
from ichigo_jax.train import make_program
from ichigo_jax.training.flops import count_flops
from ichigo_jax.training.run_config import RunConfig

DAY = 24 * 3600
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
HINT = (
    "try --config.train.remat=full, more --config.train.accumulation, a larger fsdp or tensor axis of --config.mesh, "
    "bfloat16 for --config.optimizer.state_dtype, or --search"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled step; bytes and operations are of the compiled program, not estimates.

    Attributes:
      parameters: of the model, trained and frozen.
      fits: whether a chip holds it; None where its memory is not known.
      peak_bytes_per_chip: at the moment when the step needs most.
      argument_bytes_per_chip: of these, the state and the batch.
      temporary_bytes_per_chip: of these, all else, the program among it.
      flops_per_step: of all chips together, what is computed anew counted again.
      collective_bytes_per_step: sent by a chip, by kind.
      memory_bytes_per_step: between a chip's cores and its main memory.
      seconds_of: what arithmetic, memory, interconnect and, with several slices, the network between them would each take alone.
      step_seconds_roofline: the longest of them.
      compute_bound: share of the step that arithmetic takes; the highest hardware utilisation there can be.
    """

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    remat: Remat
    accumulation: int
    parameters: int
    chip_bytes: float | None
    fits: bool | None
    peak_bytes_per_chip: int
    argument_bytes_per_chip: int
    temporary_bytes_per_chip: int
    flops_per_step: float
    collective_bytes_per_step: dict[str, float]
    memory_bytes_per_step: float
    seconds_of: dict[str, float] | None
    step_seconds_roofline: float | None
    compute_bound: float | None
    tokens_per_step: int
    tokens_per_second: float | None
    tokens_per_day: float | None
    steps: int
    days: float | None
    compile_seconds: float


def make_plan(config: RunConfig, slice: Topology) -> Plan:
    """Compiles the step of ``config`` for a slice.

    Raises:
      InputError: a config that cannot run there, or one that there is no memory for; the message says how much.
    """
    mesh = make_mesh(vars(config.mesh), slice.devices)
    task = planned_task(config)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program = make_program(task, config, mesh)
        batch = abstract_batch(task, mesh)
        _check_state_fits(_bytes_per_device((program.state, batch)), slice)
        flops = count_flops(program.step, program.state, batch)
        try:
            compiled = program.step.lower(program.state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            raise InputError(f"{slice.name}: {_first_sentence(error)}; {HINT}") from None
    memory = compiled.memory_analysis()
    try:
        moved = Program(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"{slice.name}: this JAX cannot read what the compiler made ({_first_sentence(error)}); install the libtpu that "
            "belongs to it: pip install 'jax[tpu]'"
        ) from None
    arguments, code = memory.argument_size_in_bytes, memory.generated_code_size_in_bytes
    together = arguments + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Not all of it is needed at once; a compiler that knows how much is says so, and says 0 otherwise.
    peak = (getattr(memory, "peak_memory_in_bytes", 0) or together) + code
    chip, chips = slice.chip, mesh.size
    collectives, traffic = moved.collective_bytes(), moved.memory_bytes()
    between = collectives.get(BETWEEN_SLICES, 0.0)
    seconds_of = step = None
    if chip is not None:
        seconds_of = {
            "arithmetic": flops / chips / chip.flops,
            "memory": traffic / chip.bandwidth,
            "interconnect": (sum(collectives.values()) - between) / chip.interconnect,
        }
        if slice.slices > 1:
            seconds_of["network"] = between / chip.network
        step = max(seconds_of.values())
    tokens, steps = task.tokens_per_step(), config.train.steps
    return Plan(
        topology=slice.name,
        slices=slice.slices,
        chips=chips,
        mesh=dict(mesh.shape),
        remat=config.train.remat,
        accumulation=config.train.accumulation,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves((program.state.params, program.state.frozen))),
        chip_bytes=chip and chip.memory,
        fits=None if chip is None else peak <= chip.memory,
        peak_bytes_per_chip=peak,
        argument_bytes_per_chip=arguments,
        temporary_bytes_per_chip=peak - arguments,
        flops_per_step=flops,
        collective_bytes_per_step=collectives,
        memory_bytes_per_step=traffic,
        seconds_of=seconds_of,
        step_seconds_roofline=step,
        compute_bound=seconds_of and seconds_of["arithmetic"] / step,
        tokens_per_step=tokens,
        tokens_per_second=step and tokens / step,
        tokens_per_day=step and tokens / step * DAY,
        steps=steps,
        days=step and steps * step / DAY,
        compile_seconds=round(time.perf_counter() - start, 1),
    )


def _bytes_per_device(arrays: Any) -> int:
    """Of a tree of abstract arrays that have shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _check_state_fits(size: int, slice: Topology) -> None:
    """Says at once what the compiler would take a minute to find out."""
    if slice.chip is not None and size > slice.chip.memory:
        found = f"state and batch alone are {size / GIB:.2f} GiB, expected less than a chip's {slice.chip.memory / GIB:.2f} GiB"
        raise InputError(f"{slice.name}: not enough memory: {found}; {HINT}")


def abstract_batch(task: Task, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of all hosts as ``data.loading.read_batches`` lays it out."""
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in task.batch_shapes().items()}


def described(plan: Plan) -> str:
    """For people."""
    gib = lambda size: f"{size / GIB:.2f} GiB"  # noqa: E731
    name = plan.topology if plan.slices == 1 else f"{plan.slices} times {plan.topology}"
    collectives = ", ".join(f"{kind} {gib(size)}" for kind, size in plan.collective_bytes_per_step.items()) or "none"
    rows = [
        ("slice", f"{name}, {plan.chips} chips, {variant(plan.mesh, plan.remat, plan.accumulation)}"),
        ("parameters", f"{plan.parameters:,}"),
        (
            "memory a chip",
            f"{gib(plan.peak_bytes_per_chip)}: state and batch {gib(plan.argument_bytes_per_chip)}, "
            f"working {gib(plan.temporary_bytes_per_chip)}"
            + ("" if plan.fits is None else f"; of {gib(plan.chip_bytes)}: {'fits' if plan.fits else 'DOES NOT FIT'}"),
        ),
        ("operations a step", f"{plan.flops_per_step:.3e}"),
        ("sent by a chip", collectives),
        ("memory traffic", gib(plan.memory_bytes_per_step)),
    ]
    if plan.seconds_of is not None:
        alone = ", ".join(f"{name} {seconds:.3f}" for name, seconds in plan.seconds_of.items())
        rows += [
            ("seconds a step", f"{plan.step_seconds_roofline:.3f} at best ({alone})"),
            ("utilisation", f"{plan.compute_bound:.0%} at best"),
            ("tokens", f"{plan.tokens_per_second:,.0f} a second, {plan.tokens_per_day:.3e} a day at best"),
            ("days", f"{plan.days:.2f} at best for {plan.steps} steps"),
        ]
    if plan.fits is False:
        rows.append(("to make it fit", HINT))
    return "\n".join(f"{name:20}{value}" for name, value in rows)


def variant(mesh: Mapping[str, int], remat: Remat, parts: int) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
    return f"{axes}, remat {remat}, {parts} parts"


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines()
    return next((line for line in lines if "xceeded" in line or "out of memory" in line), lines[0]).strip()[:300]
