"""The two-way engine: a table of rows says where each foreign tensor lives here, and both directions follow from it.

Nothing is loaded on trust: every key that is unknown, missing, of another shape or of another dtype than its layers'
companions is reported, all in one error.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from ichigo_jax.errors import InputError
from ichigo_jax.models.declare import Buffer
from ichigo_jax.storage.shapes import shape_faults
from ichigo_jax.storage.stored_arrays import rows_per_block

LAYER = "{i}"
WEIGHT_DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
_WEIGHT_NAMES = ", ".join(map(str, WEIGHT_DTYPES))
# Further dtypes that an import can read, but only to cast them: a model folder keeps none of these.
CASTABLE_DTYPES = tuple(map(np.dtype, (np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))
IMPORT_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Path = tuple[str, ...]
Shapes = Mapping[Path, tuple[int, ...]]

# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Transform:
    """A foreign array to ours and back.

    ``inverse`` uses array methods only (reshape, transpose, slices), so that a foreign shape can be told from ours without
    an array. For what a language model does not stack they are transposes only, which also give a foreign view of an array
    on disk.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      source: the foreign key; ``{i}`` in it counts layers, which here are stacked along axis 0.
      target: the path in our nested parameters.
      transform: for one layer.
      rows: of the foreign tensor, where ours has been given more of them in its foreign layout; those are zeros.
    """

    source: str
    target: Path
    transform: Transform
    rows: int | None = None


SAME = Transform(lambda x: x, lambda x: x)
# PyTorch's Linear.weight is [out, in]; here a weight is [in, out].
TRANSPOSED = Transform(lambda x: x.T, lambda x: x.T)
# PyTorch's Conv1d.weight is [out, in, kernel]; here it is [kernel, in, out].
CONV = Transform(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0))
# A leading axis of one that is only theirs.
ONE = Transform(lambda x: x[0], lambda x: x[None])


def heads_out(head_dim: int) -> Transform:
    """A projection to heads: [N·H, D] <-> [D, N, H]."""
    return Transform(
        lambda x: x.reshape(-1, head_dim, x.shape[-1]).transpose(2, 0, 1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    )


def heads_in(head_dim: int) -> Transform:
    """A projection from heads: [D, N·H] <-> [N, H, D]."""
    return Transform(
        lambda x: x.reshape(x.shape[0], -1, head_dim).transpose(1, 2, 0),
        lambda x: x.transpose(2, 0, 1).reshape(x.shape[-1], -1),
    )


def head_bias(head_dim: int) -> Transform:
    """[N·H] <-> [N, H]."""
    return Transform(lambda x: x.reshape(-1, head_dim), lambda x: x.reshape(-1))


# ---------------------------------------------------------------------------------------------------------------------
# What a model holds
# ---------------------------------------------------------------------------------------------------------------------


def target_shapes(make: Callable[[nnx.Rngs], nnx.Module]) -> dict[Path, tuple[int, ...]]:
    """Path to shape of every array of the model that ``make`` describes."""
    return {path: tuple(variable.get_value().shape) for path, variable in _variables(make).items()}


def buffers(make: Callable[[nnx.Rngs], nnx.Module]) -> frozenset[Path]:
    """Paths of the arrays that are no parameters, which no import casts."""
    return frozenset(path for path, variable in _variables(make).items() if isinstance(variable, Buffer))


def _variables(make: Callable[[nnx.Rngs], nnx.Module]) -> dict[Path, nnx.Variable]:
    return dict(nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))))))


def check_stored(state: Mapping[Path, Any], targets: Shapes, source: os.PathLike) -> None:
    """Compares a model folder's arrays, in memory or on disk, with what its config asks for.

    Raises:
      InputError: naming every array that is unknown, missing or of another shape.
    """
    found = {".".join(path): array.shape for path, array in state.items()}
    if faults := shape_faults(found, {".".join(path): shape for path, shape in targets.items()}):
        raise InputError(f"{source}: params/ do not fit config.json: {'; '.join(faults)}")


# ---------------------------------------------------------------------------------------------------------------------
# What a table expects of a source
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: np.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Weight(TensorInfo, abc.ABC):
    """A foreign tensor, wherever it is; nothing is read before it is asked for."""

    @abc.abstractmethod
    def read(self) -> np.ndarray:
        """All of it."""

    def blocks(self) -> Iterator[np.ndarray]:
        """Its rows in order, some megabytes at a time where they can be had so."""
        yield self.read()


@dataclasses.dataclass(frozen=True)
class CastWeight(Weight):
    """Another weight, rounded to ``dtype`` as it is read."""

    weight: Weight

    def read(self) -> np.ndarray:
        return self.weight.read().astype(self.dtype)

    def blocks(self) -> Iterator[np.ndarray]:
        return (block.astype(self.dtype) for block in self.weight.blocks())


def cast(weights: Mapping[str, Weight], dtype: str | None) -> Mapping[str, Weight]:
    """The same weights in ``dtype``; None: as they are."""
    if dtype is None:
        return weights
    return {name: CastWeight(IMPORT_DTYPES[dtype], weight.shape, weight) for name, weight in weights.items()}


def row_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of an array's rows, in order, ``stored_arrays.CHUNK_BYTES`` at a time."""
    rows = rows_per_block(array.shape, array.itemsize)
    return (array[begin : begin + rows] for begin in range(0, len(array), rows))


@dataclasses.dataclass(frozen=True)
class Piece:
    """One foreign tensor and what it fills: our whole array, or layer ``layer`` of a stacked one."""

    source: str
    target: Path
    layer: int | None
    shape: tuple[int, ...]
    transform: Transform


def expand(rows: Sequence[Row], targets: Shapes) -> list[Piece]:
    """Every foreign tensor that the table and our shapes ask for; layers in order, all of one layer together."""
    uncovered = set(targets) ^ {row.target for row in rows}
    assert not uncovered, f"table and model disagree on {sorted(uncovered)}"
    pieces = []
    for row in rows:
        shape = targets[row.target]
        stacked = LAYER in row.source
        one = jax.ShapeDtypeStruct(shape[1:] if stacked else shape, jnp.float32)
        foreign_shape = jax.eval_shape(row.transform.inverse, one).shape
        if row.rows is not None:
            foreign_shape = (row.rows, *foreign_shape[1:])
        for layer in range(shape[0]) if stacked else [None]:
            source = row.source.replace(LAYER, str(layer))
            pieces.append(Piece(source, row.target, layer, foreign_shape, row.transform))
    return sorted(pieces, key=lambda piece: -1 if piece.layer is None else piece.layer)


def check(
    pieces: Sequence[Piece],
    found: Mapping[str, TensorInfo],
    where: str,
    optional: Mapping[str, tuple[int, ...]] = types.MappingProxyType({}),
    *,
    keeps_dtypes: bool = True,
    uncast: Collection[Path] = (),
    advice: Mapping[str, str] = types.MappingProxyType({}),
    faults: Iterable[str] = (),
) -> None:
    """Compares a source with what the table asks for.

    Args:
      pieces: from ``expand``.
      found: the source's tensors.
      where: the source's name for errors.
      optional: foreign tensors that may be there beside the table's, and their shapes.
      keeps_dtypes: whether each weight will be stored in the dtype that it has. Then the layers of a stack must share one.
        Otherwise they are cast, or only looked at.
      uncast: targets that keep the source's dtype in any case.
      advice: what to do about a key that is missing.
      faults: what is known to be wrong already, to be told with the rest.

    Raises:
      InputError: naming every unknown, missing and wrongly shaped key, and every dtype that cannot be a weight or differs
        between the layers of one stacked array.
    """
    expected = {piece.source: piece for piece in pieces}
    shapes = {key: info.shape for key, info in found.items()}
    wanted = {key: piece.shape for key, piece in expected.items()}
    faults = [*faults, *shape_faults(shapes, wanted, optional=optional, advice=advice)]
    faults += _dtype_faults([piece for key, piece in expected.items() if key in found], found, keeps_dtypes, uncast)
    if faults:
        raise InputError(f"{where}: weights do not fit the config: {'; '.join(faults)}")


def _dtype_faults(
    pieces: Sequence[Piece], found: Mapping[str, TensorInfo], keeps_dtypes: bool, uncast: Collection[Path]
) -> list[str]:
    """One fault for all tensors that have the same thing wrong with their dtypes."""
    keys_with: dict[tuple[np.dtype, str], list[str]] = {}
    of_stack: dict[Path, np.dtype] = {}
    for piece in pieces:
        dtype, is_kept = found[piece.source].dtype, keeps_dtypes or piece.target in uncast
        first = of_stack.setdefault(piece.target, dtype)
        cast = "" if piece.target in uncast else f"; import with --dtype {' or '.join(IMPORT_DTYPES)} to cast all weights"
        if dtype not in WEIGHT_DTYPES + CASTABLE_DTYPES:
            fault = f"expected one of {_WEIGHT_NAMES}; quantised weights cannot be read, take those from before"
        elif dtype in CASTABLE_DTYPES and is_kept:
            fault = f"expected one of {_WEIGHT_NAMES}{cast}"
        elif dtype != first and is_kept:
            fault = f"but the same weight of another layer has {first}{cast}"
        else:
            continue
        keys_with.setdefault((dtype, fault), []).append(piece.source)
    faults = []
    for (dtype, fault), keys in keys_with.items():
        more = f" (and {len(keys) - 1} others)" if len(keys) > 1 else ""
        faults.append(f"{keys[0]} has dtype {dtype}, {fault}{more}")
    return faults


# ---------------------------------------------------------------------------------------------------------------------
# Both directions, one tensor at a time
# ---------------------------------------------------------------------------------------------------------------------


def read_pieces(
    pieces: Iterable[Piece],
    source: Callable[[str], np.ndarray],
    dtype: np.dtype | None,
    where: str,
    uncast: Collection[Path] = (),
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its array in our layout.

    Args:
      pieces: from ``expand``, checked.
      source: reads a foreign tensor by key.
      dtype: what to cast to; None keeps the source's.
      where: the source's name for errors.
      uncast: targets that keep the source's dtype in any case.

    Raises:
      InputError: a tensor that holds NaN or infinity.
    """
    for piece in pieces:
        array = piece.transform.forward(source(piece.source))
        array = array if dtype is None or piece.target in uncast else array.astype(dtype)
        check_finite(array, piece.source, where)
        yield piece, array


def check_finite(array: np.ndarray, key: str, where: str | os.PathLike, dtype: np.dtype | None = None) -> None:
    """Looks through a tensor, or a part of one, for numbers that no model can use.

    Args:
      array: the numbers.
      key: the tensor's foreign name.
      where: the source's name for errors.
      dtype: what the numbers will be cast to.

    Raises:
      InputError: NaN or infinity found, or a number that is too large for ``dtype``.
    """
    for rows in row_blocks(array) if array.ndim else [array]:
        rows = rows.astype(dtype, copy=False) if dtype is not None else rows
        if not np.isfinite(rows).all():
            what = "NaN" if np.isnan(rows).any() else f"infinity (as {rows.dtype})"
            raise InputError(f"{where}: {key} holds {what}, expected finite numbers; its training failed or the file is damaged")


def assemble(arrays: Iterable[tuple[Piece, np.ndarray]], targets: Shapes) -> dict[Path, np.ndarray]:
    """Fills our arrays, stacked ones layer by layer; one foreign tensor is in memory beside them. Rows only ours are 0."""
    state: dict[Path, np.ndarray] = {}
    for piece, array in arrays:
        if piece.target not in state:
            state[piece.target] = np.zeros(targets[piece.target], array.dtype)
        rows = tuple(map(slice, array.shape))
        state[piece.target][rows if piece.layer is None else (piece.layer, *rows)] = array
    return state


def foreign_tensor(piece: Piece, state: Mapping[Path, np.ndarray]) -> np.ndarray:
    """The way out: one foreign tensor from our arrays."""
    array = state[piece.target]
    array = piece.transform.inverse(array if piece.layer is None else array[piece.layer])
    return array[tuple(map(slice, piece.shape))]  # without the rows that only ours has


def duplicates(keys: Iterable[str]) -> list[str]:
    """Keys that occur more than once."""
    return sorted(key for key, count in Counter(keys).items() if count > 1)
