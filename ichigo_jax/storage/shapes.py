"""The one comparer of arrays that were found with arrays that were expected."""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]


def shape_faults(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    *,
    optional: Mapping[str, Shape] | None = None,
    advice: Mapping[str, str] | None = None,
) -> list[str]:
    """What is wrong with a set of named arrays, one line each: unknown ones first, then in the order of ``expected``.

    ``shape_faults({"a": (2,), "c": (1,)}, {"a": (3,), "b": (1,)})`` -> ``["c is unknown", "a has shape [2], expected [3]",
    "b is missing"]``.

    Args:
      found: name to shape.
      expected: name to shape.
      optional: arrays that may be there as well.
      advice: what to do about a name that is missing.
    """
    optional, advice = optional or {}, advice or {}
    faults = [f"{name} is unknown" for name in sorted(found.keys() - expected.keys() - optional.keys())]
    for name, shape in {**optional, **expected}.items():
        if name in found:
            if tuple(found[name]) != tuple(shape):
                faults.append(f"{name} has shape {list(found[name])}, expected {list(shape)}")
        elif name not in optional:
            faults.append(f"{name} is missing" + (f" ({advice[name]})" if name in advice else ""))
    return faults
