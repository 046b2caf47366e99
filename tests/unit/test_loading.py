import time

import grain
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ichigo_jax.data import loading
from ichigo_jax.errors import InputError
from ichigo_jax.parallel import batch_sharding, make_mesh


def numbers(first, count):
    return grain.MapDataset.source([{"x": np.int32(value)} for value in range(first, first + count)])


def mixture():
    return loading.training_examples([numbers(0, 30), numbers(100, 50)], [1.0, 3.0], seed=5)


class Device:
    """One of a host's."""

    def __init__(self, process_index):
        self.process_index = process_index


def rows(hosts, batch_size, **sizes):
    """What each host reads where that many hosts have equal shares of the 8 devices."""
    mesh = make_mesh(sizes)
    hosts_of = {device: Device(device.id * hosts // 8) for device in jax.devices()}

    class Placed(NamedSharding):
        def devices_indices_map(self, shape):
            return {hosts_of[device]: part for device, part in super().devices_indices_map(shape).items()}

    placed = Placed(mesh, batch_sharding(mesh).spec)
    return [loading.rows_of_host(placed, batch_size, host) for host in range(hosts)]


def test_the_hosts_parts_make_up_the_whole_batch():
    assert rows(4, 16, data=2, fsdp=4) == [range(0, 4), range(4, 8), range(8, 12), range(12, 16)]
    parts = [loading.host_batches(mixture(), 16, part) for part in rows(4, 16, fsdp=8)]
    for number in (0, 1, 17, 123):
        together = np.concatenate([part[number]["x"] for part in parts])
        np.testing.assert_array_equal(together, mixture().batch(16)[number]["x"])


def test_hosts_that_share_a_model_read_the_same_rows():
    assert rows(2, 8, tensor=8) == [range(0, 8)] * 2
    assert rows(4, 8, fsdp=2, tensor=4) == [range(0, 4)] * 2 + [range(4, 8)] * 2


def test_uneven_batches_are_refused():
    with pytest.raises(
        InputError, match="batch_size 12 found, expected a multiple of the 8 devices of the mesh axes data and fsdp"
    ):
        rows(1, 12, data=2, fsdp=4)


def test_weights_are_kept():
    batches = mixture().batch(8)
    values = np.concatenate([batches[number]["x"] for number in range(100)])
    assert (values >= 100).mean() == pytest.approx(0.75, abs=0.01)


class Million:
    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        return {"x": np.int32(index)}


def test_a_late_start_in_a_million_examples_replays_nothing():
    sources = [grain.MapDataset.source(Million()) for _ in range(2)]
    mesh = make_mesh({"data": 8})
    start = time.monotonic()
    late = next(loading.read_batches(loading.training_examples(sources, [1.0, 2.0], seed=3), 256, 20_000, mesh))
    assert time.monotonic() - start < 5
    places = loading.places_in_batch([1_000_000] * 2, [1.0, 2.0], 3, 256, 20_000)
    assert late["x"].tolist() == [index for _, index in places], "in the second and third epochs"


def test_what_a_batch_is_made_of_is_known_without_reading_it():
    batches = mixture().batch(8)
    for number in (0, 3, 40):
        places = loading.places_in_batch([30, 50], [1.0, 3.0], 5, 8, number)
        assert [100 * source + index for source, index in places] == batches[number]["x"].tolist()


def test_epochs_are_shuffled_anew_and_hold_every_example_once():
    batches = loading.training_examples([numbers(0, 32)], [1.0], seed=1).batch(8)
    epochs = [[*np.concatenate([batches[4 * epoch + number]["x"] for number in range(4)])] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_reading_from_a_later_batch_gives_the_same_batches():
    mesh = make_mesh({"data": 8})
    examples = loading.training_examples([numbers(0, 30)], [1.0], seed=1)
    from_zero, from_five = loading.read_batches(examples, 8, 0, mesh), loading.read_batches(examples, 8, 5, mesh)
    for _ in range(5):
        next(from_zero)
    for _ in range(3):
        np.testing.assert_array_equal(next(from_zero)["x"], next(from_five)["x"])


@pytest.mark.parametrize(("count", "weight"), [(0, 1.0), (10, 0.0), (10, -1.0)])
def test_empty_sources_and_useless_weights_are_refused(count, weight):
    with pytest.raises(InputError):
        loading.training_examples([numbers(0, count)], [weight], seed=1)
