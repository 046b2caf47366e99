import grain
import numpy as np
import pytest

from ichigo_jax.data import loading
from ichigo_jax.errors import InputError
from ichigo_jax.parallel import make_mesh


def numbers(first, count):
    return grain.MapDataset.source([{"x": np.int32(value)} for value in range(first, first + count)])


def host_batches(monkeypatch, host, hosts, batch_size=8):
    monkeypatch.setattr(loading.jax, "process_index", lambda: host)
    monkeypatch.setattr(loading.jax, "process_count", lambda: hosts)
    return loading.training_batches([numbers(0, 30), numbers(100, 50)], [1.0, 3.0], batch_size, seed=5)


def test_the_hosts_parts_make_up_the_single_hosts_batch(monkeypatch):
    whole = host_batches(monkeypatch, 0, 1)
    parts = [host_batches(monkeypatch, host, 4) for host in range(4)]
    for number in (0, 1, 17, 123):
        together = np.concatenate([part[number]["x"] for part in parts])
        np.testing.assert_array_equal(together, whole[number]["x"])


def test_weights_are_kept(monkeypatch):
    batches = host_batches(monkeypatch, 0, 1)
    values = np.concatenate([batches[number]["x"] for number in range(100)])
    assert (values >= 100).mean() == pytest.approx(0.75, abs=0.01)


def test_epochs_are_shuffled_anew_and_hold_every_example_once(monkeypatch):
    monkeypatch.undo()
    batches = loading.training_batches([numbers(0, 32)], [1.0], 8, seed=1)
    epochs = [[*np.concatenate([batches[4 * epoch + number]["x"] for number in range(4)])] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_reading_from_a_later_batch_gives_the_same_batches():
    mesh = make_mesh({"data": 8})
    batches = loading.training_batches([numbers(0, 30)], [1.0], 8, seed=1)
    from_zero, from_five = loading.read_batches(batches, 0, mesh), loading.read_batches(batches, 5, mesh)
    for _ in range(5):
        next(from_zero)
    for _ in range(3):
        np.testing.assert_array_equal(next(from_zero)["x"], next(from_five)["x"])


@pytest.mark.parametrize(("count", "weight"), [(0, 1.0), (10, 0.0), (10, -1.0)])
def test_empty_sources_and_useless_weights_are_refused(count, weight):
    with pytest.raises(InputError):
        loading.training_batches([numbers(0, count)], [weight], 8, seed=1)
