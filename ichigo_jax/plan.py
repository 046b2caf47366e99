"""What a training run would need and how fast it could be, before anything is rented.

    python -m ichigo_jax.plan --config configs/llama_pretrain.py:8b --topology v5e:4x4 [--config.section.field=value …]
    python -m ichigo_jax.plan --config configs/speech_tokenizer.py:medium --topology v5e:2x4 --json

Compiles the real training step for the slice with the TPU compiler (``pip install 'jax[tpu]'``), on a machine without a TPU, and
reads from the compiled program what a chip must hold and move. ``--slices N`` plans for N such slices and the network between
them; ``cpu:N`` and ``gpu:N`` are devices of this machine. The times are a roofline: what arithmetic, main memory, interconnect
and network allow at best when they overlap perfectly, so a real run is slower.
``--search`` tries other meshes, rematerialisation and accumulation and shows what fits, the fastest first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from ichigo_jax.errors import InputError, command
from ichigo_jax.models.stack import Remat
from ichigo_jax.parallel import batch_sharding, make_mesh
from ichigo_jax.planning.chips import GIB, Topology, topology
from ichigo_jax.planning.flops import count_flops
from ichigo_jax.planning.hlo import BETWEEN_SLICES, Program
from ichigo_jax.tasks import Task, make_task
from ichigo_jax.train import make_program
from ichigo_jax.training import run_config
from ichigo_jax.training.run_config import MeshConfig, RunConfig

DAY = 24 * 3600
TENSOR_SPLITS = (1, 2, 4, 8)
REMATS: tuple[Remat, ...] = ("none", "dots", "full")  # each computes more anew than the one before, and keeps less
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


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
    task = make_task(config, None)
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


HINT = (
    "try --config.train.remat=full, more --config.train.accumulation, a larger fsdp or tensor axis of --config.mesh, "
    "bfloat16 for --config.optimizer.state_dtype, or --search"
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


def search(config: RunConfig, slice: Topology) -> Iterator[Plan]:
    """Plans that fit and may be the fastest, as they are found.

    Of each mesh and rematerialisation it is the one with the fewest parts, since more parts only cost time. More is
    rematerialised as long as arithmetic is not what limits the best so far.
    """
    best: Plan | None = None
    for remat in REMATS:
        for mesh in _meshes(slice):
            plan = _with_fewest_parts(config, mesh, remat, slice)
            if plan is not None:
                yield plan
                best = plan if best is None else min(best, plan, key=_slowness)
        if best is not None and best.compute_bound == 1:
            return


def _slowness(plan: Plan) -> tuple[float, ...]:
    """What a search orders by: the time of a step, and of equal ones what the parts of it would take one after the other."""
    return () if plan.seconds_of is None else (plan.step_seconds_roofline, sum(plan.seconds_of.values()))


def _with_fewest_parts(config: RunConfig, mesh: MeshConfig, remat: Remat, slice: Topology) -> Plan | None:
    """Tries the most parts that a batch can have: if they do not fit, None; else halves the list until the fewest are found."""

    def of(parts: int) -> Plan | None:
        train = dataclasses.replace(config.train, remat=remat, accumulation=parts)
        return _tried(dataclasses.replace(config, mesh=mesh, train=train), slice)

    rows = mesh.data * mesh.fsdp
    possible = [parts for parts in range(1, config.train.batch_size // rows + 1) if config.train.batch_size % (parts * rows) == 0]
    found = of(possible[-1]) if possible else None
    first, end = 0, len(possible) - 1
    while found is not None and first < end:
        middle = (first + end) // 2
        plan = of(possible[middle])
        if plan is None:
            first = middle + 1
        else:
            found, end = plan, middle
    return found


def _tried(config: RunConfig, slice: Topology) -> Plan | None:
    """The plan where it fits; tells people what became of it, since a search takes long."""
    what = _variant(vars(config.mesh), config.train.remat, config.train.accumulation)
    try:
        plan = make_plan(config, slice)
    except InputError as error:
        print(f"{what}: {str(error).removesuffix(f'; {HINT}')}", file=sys.stderr)
        return None
    fits = "" if plan.fits is not False else ", does not fit"
    print(f"{what}: {plan.peak_bytes_per_chip / GIB:.2f} GiB a chip{fits}", file=sys.stderr)
    return None if plan.fits is False else plan


def _meshes(slice: Topology) -> Iterator[MeshConfig]:
    """Slices share ``data`` out; within one it is all ``fsdp``, with some ``tensor``, or all ``data``."""
    devices = len(slice.devices) // slice.slices
    for tensor in TENSOR_SPLITS:
        if devices % tensor == 0:
            yield MeshConfig(data=slice.slices, fsdp=devices // tensor, tensor=tensor, context=1)
    if devices > 1:
        yield MeshConfig(data=slice.slices * devices, fsdp=1, tensor=1, context=1)


def _variant(mesh: Mapping[str, int], remat: Remat, parts: int) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
    return f"{axes}, remat {remat}, {parts} parts"


def described(plan: Plan) -> str:
    """For people."""
    gib = lambda size: f"{size / GIB:.2f} GiB"  # noqa: E731
    name = plan.topology if plan.slices == 1 else f"{plan.slices} times {plan.topology}"
    collectives = ", ".join(f"{kind} {gib(size)}" for kind, size in plan.collective_bytes_per_step.items()) or "none"
    rows = [
        ("slice", f"{name}, {plan.chips} chips, {_variant(plan.mesh, plan.remat, plan.accumulation)}"),
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


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines()
    return next((line for line in lines if "xceeded" in line or "out of memory" in line), lines[0]).strip()[:300]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ichigo_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/FILE.py or configs/FILE.py:ARG")
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5p:2x2x4, v5e:4x4, v6e:4x4, cpu:8, gpu:1")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them, joined by the network (1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--search", action="store_true", help="try meshes, rematerialisation and accumulation")
    arguments, overrides = parser.parse_known_args(argv)
    config = run_config.load(arguments.config, overrides)
    slice = topology(arguments.topology, arguments.slices)
    if arguments.search:
        plans = sorted(search(config, slice), key=_slowness)
        if not plans:
            raise InputError(f"{slice.name}: nothing that was tried fits; take a larger slice or a smaller batch")
    else:
        plans = [make_plan(config, slice)]
    if arguments.json:
        found: Any = [dataclasses.asdict(plan) for plan in plans]
        print(json.dumps(found if arguments.search else found[0]))
    else:
        print("\n\n".join(map(described, plans)))


if __name__ == "__main__":
    main()
