import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from ichigo_jax.errors import InputError
from ichigo_jax.parallel import constrain, make_mesh, named_sharding, partition_spec
from ichigo_jax.tasks import planned_task
from ichigo_jax.train import make_program
from ichigo_jax.training import run_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_rules_map_logical_axes():
    assert partition_spec(("layers", "embed", "ffn")) == PartitionSpec(None, "fsdp", "tensor")


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(InputError, match="'heads' and 'ffn' of one array both map to 'tensor'"):
        partition_spec(("heads", "ffn"))


def test_unknown_axis_is_refused():
    with pytest.raises(InputError, match="logical axis 'hidden' found"):
        partition_spec(("hidden",))


def test_sizes_that_do_not_divide_are_refused_by_name():
    mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1, "context": 1})
    with pytest.raises(InputError, match="layers.q: axis 'embed' of size 12 cannot be split over 8 devices"):
        named_sharding(mesh, ("embed", "heads"), (12, 4), "layers.q")


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 16}, {"data": -1, "fsdp": -1}, {"data": 0}, {"model": 8}])
def test_meshes_that_the_devices_do_not_make(sizes):
    with pytest.raises(InputError):
        make_mesh(sizes)


def test_the_rest_of_the_devices():
    assert make_mesh({"data": -1, "tensor": 2}).shape == {"data": 4, "fsdp": 1, "tensor": 2, "context": 1}


def test_constrain_lays_out_what_divides_and_leaves_the_rest():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 1, "context": 2})
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(x, "batch", "time", "activation"))(jnp.zeros((4, 6, 3)))
        odd = jax.jit(lambda x: constrain(x, "batch", "time", "activation"))(jnp.zeros((3, 5, 3)))
    assert x.sharding.shard_shape(x.shape) == (1, 3, 3)
    assert odd.shape == (3, 5, 3)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("llama_pretrain.py:8b", {"fsdp": 8}),
        ("llama_pretrain.py:8b", {"fsdp": 4, "tensor": 2}),
        ("llama_pretrain.py:qwen0.5b", {"data": 2, "fsdp": 4}),
        ("speech_tokenizer.py:medium", {"fsdp": 8}),
        ("speech_tokenizer.py:large-v3,phase=2", {"data": 2, "fsdp": 4}),
    ],
)
def test_nothing_of_a_released_size_is_on_every_device_but_what_is_small(config, sizes):
    config = run_config.load(str(CONFIGS / config), [])
    mesh = make_mesh(sizes)
    config = dataclasses.replace(config, mesh=run_config.MeshConfig(**mesh.shape))
    with jax.set_mesh(mesh):
        state = make_program(planned_task(config), config, mesh).state
    size = lambda shape, x: math.prod(shape) * x.dtype.itemsize  # noqa: E731
    leaves = jax.tree.leaves(state)
    on_one = sum(size(x.sharding.shard_shape(x.shape), x) for x in leaves)
    parts = mesh.size // mesh.shape["data"]
    assert on_one < 1.02 * sum(size(x.shape, x) for x in leaves) / parts


@dataclasses.dataclass(frozen=True)
class Chip:
    """One of two slices of 2 x 2 chips."""

    id: int
    platform = device_kind = "tpu"
    core_on_chip = 0

    @property
    def slice_index(self):
        return self.id // 4

    @property
    def process_index(self):
        return self.id // 4

    @property
    def coords(self):
        return self.id % 2, self.id // 2 % 2, 0


def test_only_the_data_axis_goes_from_slice_to_slice():
    chips = [Chip(number) for number in (5, 0, 3, 6, 1, 7, 4, 2)]
    mesh = make_mesh({"data": 4, "fsdp": -1}, chips)
    assert mesh.shape == {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(InputError, match="mesh axis data of size 1 found with 2 TPU slices, expected a multiple"):
        make_mesh({"data": 1, "fsdp": -1}, chips)
