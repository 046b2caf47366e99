import dataclasses
from typing import Literal

import pytest

from ichigo_jax.configuration import from_dict, to_dict
from ichigo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    kind: Literal["a", "b"]


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    name: str | None
    inner: Inner
    several: tuple[Inner, ...]


VALUES = {"size": 3, "name": None, "inner": {"rate": 1, "kind": "a"}, "several": [{"rate": 0.5, "kind": "b"}]}


def test_round_trip():
    config = from_dict(Outer, VALUES, "config")
    assert config == Outer(3, None, Inner(1.0, "a"), (Inner(0.5, "b"),))
    assert from_dict(Outer, to_dict(config), "config") == config


def test_all_faults_are_told_together():
    with pytest.raises(InputError) as error:
        from_dict(Outer, {"size": "3", "nam": "x", "inner": {"rate": True, "kind": "c"}, "several": []}, "config")
    message = str(error.value)
    for fault in (
        "unknown field 'nam'",
        "missing field 'name'",
        "config.size: found '3'",
        "config.inner.rate: found True",
        "'c'",
    ):
        assert fault in message
    assert "\n" not in message
