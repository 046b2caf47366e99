"""Several processes as one program: joining the others, wherever the launcher put them, and doing things together."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ichigo_jax.errors import InputError

# What tells that a launcher started several processes, and that JAX can ask the same launcher for the rest.
_COUNTS = {"SLURM": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
_POD_LISTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_SLICES = "MEGASCALE_COORDINATOR_ADDRESS"

Entered = TypeVar("Entered")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--coordinator``, ``--processes`` and ``--process-id``, for launchers that tell a process nothing."""
    group = parser.add_argument_group(
        "several processes", "found out on TPU pods, under SLURM, Open MPI and GKE; elsewhere all three are needed"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0's address, a free port")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")


def join(arguments: argparse.Namespace) -> None:
    """Joins the other processes, before anything else asks JAX for devices; alone, does nothing.

    Raises:
      InputError: some of the three flags without the others, or numbers that make no sense.
    """
    flags = (arguments.coordinator, arguments.processes, arguments.process_id)
    if all(flag is None for flag in flags):
        if launcher(os.environ) is not None:
            jax.distributed.initialize()
        return
    if any(flag is None for flag in flags):
        raise InputError("--coordinator, --processes and --process-id: some found, expected all three or none")
    coordinator, processes, process_id = flags
    if processes < 1 or not 0 <= process_id < processes:
        raise InputError(f"--processes {processes} --process-id {process_id}: expected an id from 0 to one less than processes")
    jax.distributed.initialize(coordinator, processes, process_id)


def launcher(environment: Mapping[str, str]) -> str | None:
    """What started several processes and can tell JAX of them: "SLURM", "Open MPI", "TPU pod", or None.

    A single TPU VM of a pod does not know from its environment that there are others; JAX asks the metadata server.
    """
    for name, variable in _COUNTS.items():
        if environment.get(variable, "1") not in ("", "1"):
            return name
    if _SLICES in environment or any("," in environment.get(variable, "") for variable in _POD_LISTS):
        return "TPU pod"
    on_tpu_vm = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")) and "tpu" in environment.get(
        "JAX_PLATFORMS", "tpu"
    )
    return "TPU pod" if on_tpu_vm and "TPU_SKIP_MDS_QUERY" not in environment else None


def is_first() -> bool:
    """Whether this is the process that does what is done once: it writes logs, configs and models."""
    return jax.process_index() == 0


def own_file(path: Path) -> Path:
    """A file that this process alone writes, on a disk that all may share: ``NAME.jsonl``, of process 2 ``NAME.2.jsonl``."""
    return path if is_first() else path.with_suffix(f".{jax.process_index()}{path.suffix}")


def wait_for_all(what: str) -> None:
    """Returns when all processes have come to this point, which ``what`` names."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """The first process goes through the block before the others do, who may find what it left on a disk that they share."""
    if not is_first():
        wait_for_all(what)
    yield
    if is_first():
        wait_for_all(what)


@contextlib.contextmanager
def first_enters(context: contextlib.AbstractContextManager[Entered], what: str) -> Iterator[Entered | None]:
    """The first process is inside ``context``, while all go through the block together, and leaves it before any goes on.

    Yields:
      What ``context`` gives, such as a file to write; None for the other processes, which only give their parts of arrays.
    """
    with context if is_first() else contextlib.nullcontext() as entered:
        yield entered
    wait_for_all(what)


def max_over_hosts(number: int) -> int:
    """The largest of the numbers that the processes give."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).max())


def whole_array(value: Any) -> np.ndarray:
    """An array in host memory; where other processes hold parts of it, all must ask for it."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)
