"""The model folder: ``config.json``, ``params/``, ``provenance.json`` and, where there is one, a text tokenizer.

Import, the end of training and ``from_pretrained`` share it. ``params/`` is an Orbax checkpoint of the model's nested
dictionary of arrays (parameters and buffers alike), written piece by piece (``stored_arrays``) and read shard by shard on any
mesh.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.parallel import hosts, named_sharding
from ichigo_jax.storage import array_faults, atomic_write, read_json, stored_arrays, write_json
from ichigo_jax.storage.shapes import shape_faults

TOKENIZER_FOLDER = "tokenizer"
PROVENANCE = "provenance.json"


@contextlib.contextmanager
def new_model(
    folder: str | os.PathLike,
    kind: str,
    config: Any,
    arrays: Mapping[stored_arrays.ArrayPath, jax.ShapeDtypeStruct],
    provenance: Mapping[str, Any],
    tokenizer_folder: str | os.PathLike | None,
    replace: bool = False,
) -> Iterator[stored_arrays.Stores]:
    """Yields empty arrays on disk, all to be written (``stored_arrays.write``); afterwards the model folder is there, or nothing.

    Args:
      folder: where to.
      kind: "speech_tokenizer", "whisper" or "language_model"; a folder of another kind is refused at load.
      config: the model's config dataclass.
      arrays: path to shape and dtype of every parameter and buffer.
      provenance: where the weights come from; the versions of this package and jax are added.
      tokenizer_folder: a Hugging Face tokenizer folder to copy in, or None.
      replace: whether an existing folder is replaced.

    Raises:
      InputError: the folder exists, or cannot be written.
    """
    with array_faults.writing(folder), atomic_write(folder, replace) as partial:
        partial.mkdir()
        yield stored_arrays.create(partial, arrays)
        write_json(partial / "config.json", {"kind": kind, **configuration.to_dict(config)})
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
        write_json(partial / PROVENANCE, {**provenance, "versions": versions})
        if tokenizer_folder is not None:
            shutil.copytree(tokenizer_folder, partial / TOKENIZER_FOLDER)


def save_model(
    folder: str | os.PathLike,
    kind: str,
    config: Any,
    state: Mapping[str, Any],
    provenance: Mapping[str, Any],
    tokenizer_folder: str | os.PathLike | None,
    replace: bool = False,
) -> None:
    """Writes a model folder, whole or not at all; one array, of stacked ones one layer, at a time is in host memory.

    Of several processes all must call it, since each holds a part of the arrays; the first one writes.

    Args:
      state: nested dictionary of arrays (``nnx.to_pure_dict``).
      folder, kind, config, provenance, tokenizer_folder, replace: as in ``new_model``.
    """
    values = flatten_dict(dict(state))
    arrays = {key: jax.ShapeDtypeStruct(np.shape(value), value.dtype) for key, value in values.items()}
    made = new_model(folder, kind, config, arrays, provenance, tokenizer_folder, replace)
    with hosts.first_enters(made, f"saved a {kind}") as stores:
        for key, value in values.items():
            for index, piece in pieces(key, value):
                if stores is not None:
                    stored_arrays.write(stores[key][index], piece)


def pieces(key: stored_arrays.ArrayPath, value: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """An array in host memory, of a stacked one its layers in turn, with the index of each piece.

    Of several processes all must go through them, since each holds a part of the array.
    """
    if stored_arrays.LAYERS in key:
        for layer in range(len(value)):
            yield layer, hosts.whole_array(value[layer])
    else:
        yield ..., hosts.whole_array(value)


def folder_kind(folder: str | os.PathLike) -> str | None:
    """The kind of model that a folder holds; None where its ``config.json`` names none.

    Raises:
      InputError: not a model folder.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a model folder, found {'a file' if Path(folder).exists() else 'nothing'}")
    values = read_json(Path(folder) / "config.json")
    return values.get("kind") if isinstance(values, dict) else None


def load_config(folder: str | os.PathLike, kind: str, cls: type) -> Any:
    """Reads and checks ``config.json``.

    Raises:
      InputError: not a model folder, one of another kind, or a field unknown, missing or of the wrong type.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a model folder, found {'a file' if Path(folder).exists() else 'nothing'}")
    values = read_json(path)
    found = values.pop("kind", None) if isinstance(values, dict) else None
    if found != kind:
        raise InputError(f"{path}: expected a model of kind {kind!r}, found {found!r} (convert foreign formats first)")
    return configuration.from_dict(cls, values, str(path))


def recorded_chat_date(folder: str | os.PathLike) -> str | None:
    """The date that a language model's chat template was told in training; None where the model folder records none.

    Raises:
      InputError: a ``provenance.json`` with something else than a date.
    """
    file = Path(folder) / PROVENANCE
    date = read_json(file).get("chat_date") if file.exists() else None
    return None if date is None else configuration.checked_date(date, f"{file}: chat_date")


def load_model(
    folder: str | os.PathLike, make: Callable[[nnx.Rngs], nnx.Module], dtype: Any, mesh: Mesh | None = None
) -> nnx.Module:
    """Restores ``params/`` into the module that ``make`` describes, without initialising it first.

    Args:
      folder: a model folder.
      make: builds the module from random keys; only its shapes are used.
      dtype: floating-point dtype of the restored parameters; buffers stay float32.
      mesh: shards every array by its logical axes; None puts all on the default device.

    Raises:
      InputError: arrays missing, unknown or of another shape, all named.
    """
    stored = stored_arrays.open_arrays(folder)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    known = {key: variable.get_value() for key, variable in flat}
    shapes = [{".".join(map(str, key)): array.shape for key, array in arrays.items()} for arrays in (stored, known)]
    if faults := shape_faults(*shapes):
        raise InputError(f"{folder}/params does not fit its config.json: {'; '.join(faults)}")
    target = {}
    for key, variable in flat:
        shape = known[key].shape
        sharding = device if mesh is None else named_sharding(mesh, variable.axes, shape, ".".join(map(str, key)))
        cast = dtype if isinstance(variable, nnx.Param) else known[key].dtype
        target[key] = jax.ShapeDtypeStruct(shape, cast, sharding=sharding)
    path = stored_arrays.params_folder(folder)
    with ocp.StandardCheckpointer() as checkpointer, stored_arrays.reading(path):
        values = flatten_dict(checkpointer.restore(path, unflatten_dict(target)))
    return nnx.merge(graphdef, nnx.from_flat_state([(key, variable.replace(values[key])) for key, variable in flat]))


def load_arrays(folder: str | os.PathLike) -> dict[tuple[str, ...], np.ndarray]:
    """``params/`` as it is stored: path to array in host memory, dtypes and buffers included, no module involved.

    Raises:
      InputError: no ``params/``.
    """
    stores = stored_arrays.open_arrays(folder)
    with stored_arrays.reading(folder):
        return {key: stored_arrays.read(store) for key, store in stores.items()}


def fingerprint(state: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that two models share only when every array is equal (names, shapes, values in float32).

    Of several processes all must call it.
    """
    digest = hashlib.sha256()
    for key, value in sorted(flatten_dict(dict(state)).items(), key=lambda item: tuple(map(str, item[0]))):
        digest.update(f"{'.'.join(map(str, key))}{np.shape(value)}".encode())
        for _, piece in pieces(key, value):
            digest.update(piece.astype(np.float32).tobytes())
    return digest.hexdigest()[:16]
