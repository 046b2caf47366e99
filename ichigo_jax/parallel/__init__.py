"""Meshes, logical-axis rules and multi-host start-up."""

from ichigo_jax.parallel.sharding import (
    MESH_AXES,
    RULES,
    batch_sharding,
    constrain,
    dividing_spec,
    gather_weight,
    make_mesh,
    mesh_axes,
    named_sharding,
    partition_spec,
    replicated,
    slice_count,
)

__all__ = [
    "MESH_AXES",
    "RULES",
    "batch_sharding",
    "constrain",
    "dividing_spec",
    "gather_weight",
    "make_mesh",
    "mesh_axes",
    "named_sharding",
    "partition_spec",
    "replicated",
    "slice_count",
]
