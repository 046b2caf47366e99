"""Slices of TPUs that need not be there, and devices of this machine, by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import slice_count
from ichigo_jax.parallel.chips import CHIPS, Chip, chip_of


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as the user gave it.
      devices: of that many processes' machines, real or not.
      chip: what one of them is; None where its figures are not known.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None

    @property
    def slices(self) -> int:
        """In how many slices the devices are, each as large as the name says."""
        return slice_count(self.devices)


def topology(name: str, slices: int = 1) -> Topology:
    """``v5p:2x2x4``, ``v5e:4x4``, ``v6e:4x4``: a TPU slice that need not be there; ``cpu:8``, ``gpu:1``: devices of this machine.

    Args:
      name: of one slice.
      slices: how many of them, joined by the network between machines.

    Raises:
      InputError: an unknown chip or shape, no TPU compiler, fewer devices than asked for, several slices of what has none.
    """
    chip, _, shape = name.partition(":")
    if slices < 1 or (slices > 1 and chip not in CHIPS):
        raise InputError(f"--slices {slices} found with --topology {name}, expected 1, or more of TPU slices")
    if chip in CHIPS:
        return Topology(name, _tpu_devices(shape, name, slices), CHIPS[chip])
    if chip not in ("cpu", "gpu") or not shape.isdigit() or int(shape) == 0:
        raise InputError(f"--topology {name}: expected one of {', '.join(CHIPS)} with a shape (v5e:4x4), cpu:N or gpu:N")
    try:
        devices = jax.devices(chip)
    except RuntimeError:
        devices = []
    if len(devices) < int(shape):
        hint = f"; start with XLA_FLAGS=--xla_force_host_platform_device_count={shape}" if chip == "cpu" else ""
        raise InputError(f"--topology {name}: {len(devices)} devices found{hint}")
    return Topology(name, devices[: int(shape)], chip_of(devices[0]))


def _tpu_devices(shape: str, name: str, slices: int) -> Sequence[jax.Device]:
    try:
        import libtpu  # the package only holds the compiler's library
    except ImportError:
        raise InputError(f"--topology {name}: the TPU compiler was not found; run: pip install 'jax[tpu]'") from None
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server for the TPU that is not there
    os.environ.setdefault("TPU_LIBRARY_PATH", str(Path(libtpu.__file__).parent / "libtpu.so"))
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
    except Exception as error:  # the compiler's own exceptions have no common type
        raise InputError(f"--topology {name}: the TPU compiler refuses {shape!r}: {str(error).splitlines()[0]}") from None
