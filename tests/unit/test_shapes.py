"""The comparer of shapes that model folders, checkpoints and converters share."""

import numpy as np
import pytest

from ichigo_jax.storage.shapes import shape_faults

EXPECTED = {"a": (3,), "b": (1, 2)}


@pytest.mark.parametrize(
    ("found", "options", "faults"),
    [
        ({"a": (3,), "b": (1, 2)}, {}, []),
        ({"a": (2,), "c": (1,)}, {}, ["c is unknown", "a has shape [2], expected [3]", "b is missing"]),
        ({"a": (3,)}, {"advice": {"b": "tie it"}}, ["b is missing (tie it)"]),
        ({**EXPECTED, "c": (1,)}, {"optional": {"c": (1,), "d": (2,)}}, []),
        ({**EXPECTED, "c": (5,)}, {"optional": {"c": (1,)}}, ["c has shape [5], expected [1]"]),
        ({"a": np.zeros(3).shape, "b": [1, 2]}, {}, []),
        ({"a": (), "b": (1, 2)}, {}, ["a has shape [], expected [3]"]),
    ],
)
def test_all_faults_are_told(found, options, faults):
    assert shape_faults(found, EXPECTED, **options) == faults
