import numpy as np
import pytest

from ichigo_jax.data.language import Rows, collate, pack
from ichigo_jax.data.row_formats import Example

EXAMPLES = [
    Example(np.array([7, 8, 9], np.int32), np.array([False, True, True])),
    Example(np.array([5, 6], np.int32), np.array([True, True])),
]


def test_collate_is_the_documented_arrays():
    row = collate(EXAMPLES, length=7, pad_id=0)
    assert row["tokens"].tolist() == [7, 8, 9, 5, 6, 0, 0]
    assert row["targets"].tolist() == [8, 9, -100, 6, -100, -100, -100]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0]


def test_what_is_not_to_be_predicted_carries_no_loss():
    example = Example(np.array([1, 2, 3, 4], np.int32), np.array([False, False, True, True]))
    assert collate([example], length=4, pad_id=0)["targets"].tolist() == [-100, 3, 4, -100]


def test_rows_are_the_examples_of_their_group():
    packed = Rows(EXAMPLES, [np.array([1, 0])], 6, 0)
    assert len(packed) == 1 and packed[0]["tokens"].tolist() == [5, 6, 7, 8, 9, 0]
    alone = Rows(EXAMPLES, None, 4, 0)
    assert len(alone) == 2 and alone[1]["tokens"].tolist() == [5, 6, 0, 0]


def test_packing_is_the_documented_groups():
    assert [group.tolist() for group in pack(np.array([3, 4, 2, 1]), 5, seed=0)] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_packing_places_every_example_once_within_capacity(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, size=10_000)
    groups = pack(lengths, 64, seed)
    assert sorted(np.concatenate(groups)) == list(range(10_000))
    assert all(lengths[group].sum() <= 64 for group in groups)
    again = pack(lengths, 64, seed)
    assert all(np.array_equal(a, b) for a, b in zip(groups, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(groups, pack(lengths, 64, seed + 1)))


def test_packing_fills_rows():
    """Lengths as conversations have them, a few hundred ids with a long tail, in the release's context."""
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(5.9, 0.7, 20_000).astype(int) + 20, 4096)
    rows = pack(lengths, 4096, 0)
    assert lengths.sum() / (len(rows) * 4096) > 0.99
