"""The meshes, rematerialisation and accumulation that make a step of a config fit a slice, and which of them is the fastest."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

from ichigo_jax.errors import InputError
from ichigo_jax.models.stack import Remat
from ichigo_jax.parallel.chips import GIB
from ichigo_jax.planning.plan import HINT, Plan, make_plan, variant
from ichigo_jax.planning.topology import Topology
from ichigo_jax.training.run_config import MeshConfig, RunConfig

TENSOR_SPLITS = (1, 2, 4, 8)
REMATS: tuple[Remat, ...] = ("none", "dots", "full")  # each computes more anew than the one before, and keeps less


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
                best = plan if best is None else min(best, plan, key=slowness)
        if best is not None and best.compute_bound == 1:
            return


def slowness(plan: Plan) -> tuple[float, ...]:
    """Sort key: step time, then the sum of its parts."""
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
    what = variant(vars(config.mesh), config.train.remat, config.train.accumulation)
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
