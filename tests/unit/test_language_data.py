import numpy as np
import pytest

from ichigo_jax.data.language import Example, collate, pack


def test_collate_is_the_documented_arrays():
    examples = [
        Example(np.array([7, 8, 9], np.int32), np.array([False, True, True])),
        Example(np.array([5, 6], np.int32), np.array([True, True])),
    ]
    row = collate(examples, length=7, pad_id=0)
    assert row["tokens"].tolist() == [7, 8, 9, 5, 6, 0, 0]
    assert row["targets"].tolist() == [8, 9, -100, 6, -100, -100, -100]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0]


def test_what_is_not_to_be_predicted_carries_no_loss():
    example = Example(np.array([1, 2, 3, 4], np.int32), np.array([False, False, True, True]))
    assert collate([example], length=4, pad_id=0)["targets"].tolist() == [-100, 3, 4, -100]


@pytest.mark.parametrize("seed", range(5))
def test_packing_places_every_example_once_within_capacity(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, size=500)
    groups = pack(lengths, 64, seed)
    assert sorted(np.concatenate(groups)) == list(range(500))
    assert all(lengths[group].sum() <= 64 for group in groups)
    # Next fit leaves no group that the first of the next would still have fitted into.
    assert all(lengths[a].sum() + lengths[b[0]] > 64 for a, b in zip(groups, groups[1:]))
