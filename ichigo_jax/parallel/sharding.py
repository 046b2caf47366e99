"""Logical axes, the one table that maps them to mesh axes, and what follows from it.

A parameter names its axes where it is declared (``models/declare.py``), an activation where it is constrained. Nothing
else in the project speaks of mesh axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ichigo_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor", "context")
STORAGE_AXIS = "fsdp"  # over which a parameter is stored in parts, and never computed with in parts

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "lookup": "data",  # the batch while what a device stores of an embedding is looked up
    "time": "context",
    "activation": None,
    # parameters
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffn": "tensor",
    "vocab": "tensor",
    "rank": None,
    "mels": None,
    "kernel": None,
    "position": None,
    "quantizers": None,
    "codes": None,
    "code": None,
    "norm": None,
    "bias": None,
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over devices.

    Of several TPU slices each has its own part of the ``data`` axis, so that over the slow network between them only gradients
    are summed.

    Args:
      sizes: devices along each of ``MESH_AXES``; one of them may be -1, "all that are left".
      devices: real or only compiled for; None: all of all hosts.

    Raises:
      InputError: when the sizes do not multiply to the number of devices, or ``data`` not to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise InputError(f"mesh axis {sorted(unknown)[0]!r} found, expected one of {', '.join(MESH_AXES)}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InputError(f"mesh {dict(sizes)} found, expected positive sizes and at most one -1")
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        if len(devices) % rest:
            raise InputError(f"mesh {dict(sizes)} needs a multiple of {rest} devices, found {len(devices)}")
        shape[shape.index(-1)] = len(devices) // rest
    if math.prod(shape) != len(devices):
        raise InputError(f"mesh {dict(zip(MESH_AXES, shape))} has {math.prod(shape)} devices, found {len(devices)}")
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = slice_count(devices)
    # Splitting: where no axis is as long as some of the torus's axes together, a part of one will do.
    if slices == 1:
        return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES, axis_types=types)
    data, *within = shape
    if data % slices:
        raise InputError(f"mesh axis data of size {data} found with {slices} TPU slices, expected a multiple: they share it out")
    each, split = (data // slices, *within), (slices, *[1] * len(within))
    return Mesh(create_hybrid_device_mesh(each, split, devices, allow_split_physical_axes=True), MESH_AXES, axis_types=types)


def slice_count(devices: Sequence[jax.Device]) -> int:
    """In how many TPU slices devices are; other devices are in one."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """``('layers', 'embed', 'ffn')`` -> ``PartitionSpec(None, 'fsdp', 'tensor')``.

    Raises:
      InputError: an axis that the table does not know, or two axes of one array on the same mesh axis.
    """
    entries: list[str | tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise InputError(f"logical axis {axis!r} found, expected one of {', '.join(RULES)}")
        entry = RULES[axis] if axis is not None else None
        for mesh_axis in mesh_axes(entry):
            if mesh_axis in taken:
                raise InputError(f"logical axes {taken[mesh_axis]!r} and {axis!r} of one array both map to {mesh_axis!r}")
            taken[mesh_axis] = str(axis)
        entries.append(entry)
    return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], name: str) -> NamedSharding:
    """The sharding of one array.

    Args:
      mesh: from ``make_mesh``.
      axes: one logical axis (or None) per dimension.
      shape: the array's shape, checked for divisibility.
      name: how to call the array in an error.

    Raises:
      InputError: a dimension that its mesh axes do not divide; the message names the axis and the size.
    """
    if len(axes) != len(shape):
        raise InputError(f"{name}: shape {tuple(shape)} has {len(shape)} dimensions, expected one for each of {tuple(axes)}")
    spec = partition_spec(axes)
    for axis, entry, size in zip(axes, spec, shape):
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes(entry))
        if size % parts:
            raise InputError(f"{name}: axis {axis!r} of size {size} cannot be split over {parts} devices (mesh axis {entry!r})")
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's sharding to the table, under the mesh of ``jax.set_mesh``; without a mesh, nothing.

    An axis whose size the mesh does not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, dividing_spec(mesh, axes, x.shape))


def gather_weight(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """A parameter, whole along the mesh axis that only stores it ("fsdp"), where a layer is about to use it.

    Its gradient is summed straight into the parts that devices store (a reduce-scatter). Left to itself the compiler may
    rather send activations around, which is far more. Without a mesh, or one with nothing along that axis, nothing happens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[STORAGE_AXIS] == 1:
        return x
    stored = dividing_spec(mesh, axes, x.shape)
    whole = PartitionSpec(*(None if entry == STORAGE_AXIS else entry for entry in stored))
    return x if whole == stored else _gather(x, stored, whole)


def _pin(x: jax.Array, stored: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, stored), whole)


def _scatter(stored: PartitionSpec, whole: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather = jax.custom_vjp(_pin, nondiff_argnums=(1, 2))
_gather.defvjp(lambda x, stored, whole: (_pin(x, stored, whole), None), _scatter)


def dividing_spec(mesh: AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """``partition_spec`` without the axes whose size the mesh does not divide."""
    entries: list[Any] = []
    for entry, size in zip(partition_spec(axes), shape):
        parts = math.prod(mesh.shape[name] for name in mesh_axes(entry))
        entries.append(entry if size % parts == 0 else None)
    return PartitionSpec(*entries)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a ``PartitionSpec`` names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over the data-parallel devices, the rest replicated."""
    return NamedSharding(mesh, partition_spec(["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
