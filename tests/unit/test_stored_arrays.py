"""``params/``: written in pieces, read by Orbax onto a mesh, by TensorStore in pieces, and as earlier versions wrote it."""

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ichigo_jax.errors import InputError
from ichigo_jax.storage import stored_arrays

STATE = {
    ("embedding",): np.arange(70 * 4, dtype=np.float32).reshape(70, 4).astype(ml_dtypes.bfloat16),
    ("layers", "up"): np.arange(3 * 8 * 5, dtype=np.float32).reshape(3, 8, 5),
    ("layers", "bias"): np.zeros((3, 2), np.float32),
    ("lm_head",): np.arange(4 * 70, dtype=np.float16).reshape(4, 70),
    ("count",): np.array(7, np.int32),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Written a layer, or a part of the rows, at a time."""
    tmp_path = tmp_path / "100% of it #1"  # names that a URL would spell otherwise
    tmp_path.mkdir()
    monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 96)
    stores = stored_arrays.create(tmp_path, {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in STATE.items()})
    for key, array in STATE.items():
        if key[0] == "layers":
            for layer in reversed(range(3)):
                stored_arrays.write(stores[key][layer], array[layer])
        elif key[0] == "count":
            stored_arrays.write(stores[key], array)
        else:
            rows = array if key[0] == "embedding" else array.T
            view = stores[key] if key[0] == "embedding" else stores[key].T
            for begin, end in ((0, 13), (13, 14), (14, 70)):
                stored_arrays.write(view[begin:end], rows[begin:end])
    return tmp_path


def test_pieces_come_back(folder):
    stores = stored_arrays.open_arrays(folder)
    assert stores.keys() == STATE.keys()
    for key, array in STATE.items():
        found = stored_arrays.read(stores[key])
        assert found.dtype == array.dtype and found.tobytes() == array.tobytes(), key
    np.testing.assert_array_equal(stored_arrays.read(stores["layers", "up"][1]), STATE["layers", "up"][1])
    np.testing.assert_array_equal(stored_arrays.read(stores["lm_head",].T[11:30]), STATE["lm_head",].T[11:30])


def test_a_layer_is_a_chunk_and_a_vocabulary_is_cut_in_rows(folder):
    chunks = {key: store.chunk_layout.read_chunk.shape for key, store in stored_arrays.open_arrays(folder).items()}
    assert chunks["embedding",] == (12, 4) and chunks["lm_head",] == (4, 12)
    assert chunks["layers", "bias"] == (1, 2)
    assert chunks["layers", "up"] == (1, 4, 5), "160 bytes a layer are cut along the longest axis"


def test_orbax_restores_it_onto_a_mesh(folder):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    target = {"embedding": None, "layers": {"up": None, "bias": None}, "lm_head": None, "count": None}
    for key, array in STATE.items():
        group = target if len(key) == 1 else target["layers"]
        split = sharding if key == ("layers", "up") else NamedSharding(mesh, PartitionSpec())
        group[key[-1]] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((folder / "params").absolute(), target)
    assert restored["layers"]["up"].addressable_shards[0].data.shape == (3, 1, 5)
    np.testing.assert_array_equal(restored["layers"]["up"], STATE["layers", "up"])
    np.testing.assert_array_equal(restored["embedding"], STATE["embedding",])


def test_what_orbax_wrote_is_read(tmp_path):
    """Model folders of earlier versions hold each array in one chunk."""
    state = {"embedding": STATE["embedding",], "layers": {"up": jax.numpy.asarray(STATE["layers", "up"])}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "params").absolute(), state)
    stores = stored_arrays.open_arrays(tmp_path)
    assert stores.keys() == {("embedding",), ("layers", "up")}
    np.testing.assert_array_equal(stored_arrays.read(stores["embedding",]), STATE["embedding",])
    np.testing.assert_array_equal(stored_arrays.read(stores["layers", "up"][2]), STATE["layers", "up"][2])


def test_a_part_that_was_never_written_is_no_zeros(tmp_path):
    stores = stored_arrays.create(tmp_path, {("layers", "up"): jax.ShapeDtypeStruct((2, 3), np.dtype(np.float32))})
    stored_arrays.write(stores["layers", "up"][0], np.ones(3, np.float32))
    store = stored_arrays.open_arrays(tmp_path)["layers", "up"]
    with pytest.raises(InputError, match="expected a model's arrays, found them broken"), stored_arrays.reading(tmp_path):
        stored_arrays.read(store)


def test_folders_without_arrays(tmp_path):
    with pytest.raises(InputError, match="no params/ in it"):
        stored_arrays.open_arrays(tmp_path)
    (tmp_path / "params").mkdir()
    with pytest.raises(InputError, match="params"):
        stored_arrays.open_arrays(tmp_path)
