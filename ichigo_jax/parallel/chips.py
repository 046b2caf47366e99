"""Accelerators by name.

Figures of one chip: "How to Scale Your Model" (https://jax-ml.github.io/scaling-book/tpus/) for TPUs, and for the network between
their slices https://cloud.google.com/tpu/docs/v5p, …/v5e and …/v6e (of what a pod has, the part of one of its chips); NVIDIA's
data sheets for GPUs (https://www.nvidia.com/en-us/data-center/h100/, …/h200/ and …/a100/), whose figures for tensor cores "with
sparsity" are twice those here.
"""

from __future__ import annotations

import dataclasses

import jax

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      memory: bytes of main memory.
      flops: bfloat16 operations a second at most.
      bandwidth: bytes a second of main memory.
      interconnect: bytes a second that a chip can send to its neighbours, all links together.
      network: bytes a second that a chip's share of its machine can send to other slices; None where there are no slices.
    """

    memory: float
    flops: float
    bandwidth: float
    interconnect: float
    network: float | None = None


CHIPS = {
    "v5e": Chip(16 * GIB, 1.97e14, 8.1e11, 4 * 4.5e10, network=25e9 / 8),
    "v5p": Chip(95 * GIB, 4.59e14, 2.8e12, 6 * 9e10, network=50e9 / 8),
    "v6e": Chip(32 * GIB, 9.2e14, 1.6e12, 4 * 9e10, network=100e9 / 8),
}

H100, H200 = Chip(80e9, 9.89e14, 3.35e12, 4.5e11), Chip(141e9, 9.89e14, 4.8e12, 4.5e11)
# By how devices call themselves (``jax.Device.device_kind``); what a name begins with decides, the longest first.
DEVICE_KINDS = {
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5e": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "TPU v6e": CHIPS["v6e"],
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H100 PCIe": Chip(80e9, 7.56e14, 2.0e12, 3.0e11),
    "NVIDIA H100 NVL": Chip(94e9, 8.35e14, 3.9e12, 3.0e11),
    "NVIDIA H200": H200,
    "NVIDIA H200 NVL": Chip(141e9, 8.35e14, 4.8e12, 4.5e11),
    "NVIDIA A100-SXM4-40GB": Chip(40e9, 3.12e14, 1.555e12, 3.0e11),
    "NVIDIA A100-SXM4-80GB": Chip(80e9, 3.12e14, 2.039e12, 3.0e11),
    "NVIDIA A100-PCIE-40GB": Chip(40e9, 3.12e14, 1.555e12, 3.0e11),
    "NVIDIA A100 80GB PCIe": Chip(80e9, 3.12e14, 1.935e12, 3.0e11),
}


def chip_of(device: jax.Device) -> Chip | None:
    """What a device is; None where its figures are not known, as those of a CPU or of a part of a GPU (MIG)."""
    kind = device.device_kind
    known = [name for name in DEVICE_KINDS if kind.startswith(name)]
    return None if not known or "MIG" in kind else DEVICE_KINDS[max(known, key=len)]
