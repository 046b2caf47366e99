"""Reading a compiled program's HLO text: what it moves between devices and through memory, loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once; a stack of scanned layers would come out as a single layer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 1.0),
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2.0),
    **dict.fromkeys(("f32", "s32", "u32"), 4.0),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8.0),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BETWEEN_SLICES = "between-slices"  # what leaves a slice, whatever the collective was
_MEGASCALE = "xla_megascale_target"  # a property of what the TPU's host sends for it over the network
# What only names, slices or reorders other buffers, or runs another computation whose own instructions count.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id".split()
)

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(calls|body|to_apply|called_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)\}?")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")
_PHASE = re.compile(r"channel_id=(\d+).*\bchain_id=")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; ``on_chip`` where it never leaves the chip's fast memory."""

    bytes: float
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str  # what stands between the brackets
    attributes: str
    root: bool

    @property
    def index(self) -> int:
        """Of a ``get-tuple-element``."""
        return int(re.search(r"index=(\d+)", self.attributes)[1])

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    def called(self) -> list[str]:
        """Computations that it runs, but not a reduction's combiner."""
        found = [name for key, names in _CALLED.findall(self.attributes) for name in names.split(", ") if key != "to_apply"]
        if self.opcode in ("call", "async-start"):
            found += [name for key, names in _CALLED.findall(self.attributes) for name in names.split(", ") if key == "to_apply"]
        return found


class Program:
    """A compiled program, one device's part of it.

    Attributes:
      unknown_trips: loops whose number of turns the compiler does not know; they count once.
    """

    def __init__(self, text: str):
        self._computations, self._entry = _parse(text)
        self.unknown_trips = 0
        self._turns = dict(self._count(self._entry))

    def _count(self, entry: str) -> dict[str, float]:
        """How often each computation runs."""
        turns: dict[str, float] = defaultdict(float)
        self._visit(entry, 1.0, (), turns)
        return turns

    def _visit(self, name: str, times: float, given: tuple[int | None, ...], turns: dict[str, float]) -> None:
        """``given``: the elements of the computation's tuple parameter, where they are known numbers."""
        turns[name] += times
        for instruction in self._computations[name].values():
            repeated, inner = times, ()
            if instruction.opcode == "while":
                inner = self._elements(instruction.operands[0], name, given)
                trips = self._trips(instruction, inner)
                self.unknown_trips += trips is None
                repeated *= 1 if trips is None else trips
            for called in instruction.called():
                self._visit(called, repeated, inner, turns)
            for names, one in _BRANCHES.findall(instruction.attributes):
                for branch in (names or one).split(", "):
                    self._visit(branch, times, (), turns)

    def _trips(self, loop: Instruction, start: tuple[int | None, ...]) -> int | None:
        """Turns of a loop that counts an element of its state up to a number; None where it is not such a loop."""
        told = _TRIPS.search(loop.attributes)
        if told:
            return int(told[1])
        condition, body = (re.search(rf"{part}=(%[\w.\-]+)", loop.attributes)[1] for part in ("condition", "body"))
        test = self._root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter = self._computations[condition].get(test.operands[0])
        bound = self._value(test.operands[1], condition, start)
        if counter is None or counter.opcode != "get-tuple-element" or bound is None:
            return None
        index = counter.index
        step = 1
        following = self._computations[body].get(self._root(body).operands[index])
        if following is not None and following.opcode == "add":
            steps = [self._value(operand, body, start) for operand in following.operands[1:]]
            step = steps[0] if steps and steps[0] else 1
        first = start[index] if index < len(start) else None
        return -(-(bound - (first or 0)) // step)

    def _elements(self, name: str, computation: str, given: tuple[int | None, ...]) -> tuple[int | None, ...]:
        made = self._computations[computation].get(name)
        if made is None or made.opcode != "tuple":
            return ()
        return tuple(self._value(operand, computation, given) for operand in made.operands)

    def _value(self, name: str, computation: str, given: tuple[int | None, ...]) -> int | None:
        """The number that an instruction gives, where it is known before the program runs."""
        instruction = self._computations[computation].get(name)
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self._computations[computation].get(instruction.operands[0])
        if instruction is None:
            return None
        if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
            return int(instruction.literal)
        if instruction.opcode == "get-tuple-element" and instruction.index < len(given):
            return given[instruction.index]
        return None

    def _root(self, computation: str) -> Instruction:
        return next(instruction for instruction in self._computations[computation].values() if instruction.root)

    def instructions(self) -> Iterator[tuple[Instruction, str, float]]:
        """Each instruction, the computation that it is in, and how often it runs."""
        for name, times in self._turns.items():
            for instruction in self._computations[name].values():
                yield instruction, name, times

    def collective_bytes(self) -> dict[str, float]:
        """Bytes that a device sends (and receives) in a run of the program, by kind of collective.

        Of n devices that share B bytes: (n-1)/n · B for an all-gather or all-to-all of B in all, the same for a
        reduce-scatter, twice that for an all-reduce, B for a permutation (bandwidth-optimal algorithms on a ring). What a
        collective over several TPU slices sends from slice to slice is a kind of its own, ``BETWEEN_SLICES``.
        """
        moved: dict[str, float] = defaultdict(float)
        begun: set[str] = set()
        for instruction, computation, times in self.instructions():
            if instruction.opcode == "send" and _MEGASCALE in instruction.attributes:
                moved[BETWEEN_SLICES] += times * instruction.arrays[0].bytes
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # One that goes on beside other work stands in the text once for each of its phases, in a fusion each.
            phase = _PHASE.search(instruction.attributes)
            if phase is not None:
                if phase[1] in begun:
                    continue
                begun.add(phase[1])
            arrays = [array.bytes for array in instruction.arrays if array.bytes > 4]
            if instruction.opcode.endswith("-start") and kind != "all-reduce":
                arrays = arrays[len(arrays) // 2 :]  # the first half are the operands
            size, n = sum(arrays), _group_size(instruction.attributes)
            share = (n - 1) / n if n else 1.0
            if kind == "all-reduce" and "all-reduce-scatter" in computation:
                moved["reduce-scatter"] += times * size * share
            elif kind == "all-reduce":
                moved[kind] += times * 2 * size * share
            elif kind == "reduce-scatter":
                moved[kind] += times * size * (n - 1 if n else 1)
            elif kind in ("collective-permute", "collective-broadcast"):
                moved[kind] += times * size
            else:
                moved[kind] += times * size * share
        return dict(moved)

    def memory_bytes(self) -> float:
        """Bytes that pass between a device's main memory and its cores: operands and results of every instruction that does
        not run inside a fusion, less what stays on the chip. An operand that an instruction reads only a part of (a slice of
        stacked layers) counts as what is written."""
        fusions = (i for body in self._computations.values() for i in body.values() if i.opcode == "fusion")
        inside = {name for fusion in fusions for name in fusion.called()}
        total = 0.0
        for name, times in self._turns.items():
            if name in inside:
                continue
            results = self._computations[name]
            for instruction in results.values():
                if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
                    continue
                written = _off_chip(instruction)
                read = 0.0
                for operand in instruction.operands:
                    size = _off_chip(results[operand]) if operand in results else 0.0
                    slices = "slice" in instruction.opcode or "slice" in instruction.name
                    read += min(size, max(written, 0.0)) if slices else size
                total += times * (written + read)
        return total


def _off_chip(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if not array.on_chip)


def _group_size(attributes: str) -> int:
    """Devices that share a collective; 0 where all do and the text does not say how many."""
    named = _MESH_GROUPS.search(attributes)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        return math.prod(sizes.get(axis, 1) for axis in re.findall(r"'([^']*)'", named[2]))
    groups = _GROUPS.search(attributes)
    if groups is None:
        return 0
    return int(groups[3]) if groups[3] else groups[1].count(",") + 1


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and "->" in line:
            name = next(word for word in line.split() if word.startswith("%"))
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif line == "}":
            current = None
        elif current is not None and line.startswith("  ") and " = " in line:  # others go on with a kernel's attributes
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation in the HLO text")
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _matching(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _matching(rest, len(opcode))
    operands = tuple(re.findall(r"%[\w.\-]+", rest[len(opcode) : close]))
    arrays = tuple(
        Array(BYTES.get(kind, 0.0) * math.prod(int(size) for size in sizes.split(",") if size), "S(1)" in layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
    )
    root = line.lstrip().startswith("ROOT ")
    return Instruction(name, opcode, arrays, operands, rest[len(opcode) + 1 : close], rest[close:], root)


def _matching(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")
