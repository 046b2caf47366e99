"""The arrays of a model folder as foreign tensors, and foreign tensors into them, none of them ever whole in memory with others.

What is stacked here is many foreign tensors: each is read or written as its layer of the stored array.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import tensorstore as ts
from tqdm import tqdm

from converters.engine import Piece, Shapes, Weight, check_finite
from ichigo_jax.storage import stored_arrays
from ichigo_jax.storage.stored_arrays import Stores


@dataclasses.dataclass(frozen=True)
class StoredWeight(Weight):
    """A foreign tensor that ``store``, one array of a model folder, holds."""

    piece: Piece
    store: ts.TensorStore
    folder: os.PathLike

    def read(self) -> np.ndarray:
        with stored_arrays.reading(self.folder):
            array = stored_arrays.read(self.store if self.piece.layer is None else self.store[self.piece.layer])
        return self.piece.transform.inverse(array)[: self.shape[0]]

    def blocks(self) -> Iterator[np.ndarray]:
        if self.piece.layer is not None:
            yield self.read()
            return
        view = self.piece.transform.inverse(self.store)
        step = view.chunk_layout.read_chunk.shape[0]
        for begin in range(0, self.shape[0], step):
            with stored_arrays.reading(self.folder):
                block = stored_arrays.read(view[begin : min(begin + step, self.shape[0])])
            yield block


def open_weights(pieces: Sequence[Piece], stores: Stores, folder: os.PathLike) -> dict[str, StoredWeight]:
    """Every foreign tensor of a model folder by its foreign key, in the order of ``pieces``."""
    weights = {}
    for piece in pieces:
        store = stores[piece.target]
        weights[piece.source] = StoredWeight(store.dtype.numpy_dtype, piece.shape, piece, store, folder)
    return weights


def new_arrays(
    pieces: Sequence[Piece], targets: Shapes, weights: Mapping[str, Weight], dtype: np.dtype | None
) -> dict[stored_arrays.ArrayPath, jax.ShapeDtypeStruct]:
    """Shape and dtype of the arrays that ``weights`` will fill; ``dtype`` None keeps each weight's own."""
    found = {piece.target: weights[piece.source].dtype for piece in pieces}
    return {path: jax.ShapeDtypeStruct(shape, found[path] if dtype is None else dtype) for path, shape in targets.items()}


def fill(stores: Stores, pieces: Sequence[Piece], weights: Mapping[str, Weight], source: os.PathLike) -> None:
    """Writes every foreign tensor into its place, one after another, cast to the dtype of the array there.

    Raises:
      InputError: a tensor of ``source`` that holds NaN or infinity.
    """
    for piece in tqdm(pieces, desc="weights", unit="tensor", disable=None):
        weight, store = weights[piece.source], stores[piece.target]
        dtype = store.dtype.numpy_dtype
        if piece.layer is not None:
            array = weight.read()
            check_finite(array, piece.source, source, dtype)
            stored_arrays.write(store[piece.layer], piece.transform.forward(array))
            continue
        view, position = piece.transform.inverse(store), 0
        for block in weight.blocks():
            check_finite(block, piece.source, source, dtype)
            stored_arrays.write(view[position : position + len(block)], block)
            position += len(block)
        if position < view.shape[0]:  # padding
            stored_arrays.write(view[position:], np.broadcast_to(np.float32(0), (view.shape[0] - position, *view.shape[1:])))
