"""Converting holds a part of the model in memory, whatever its size. Peaks are those of a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import large_models
import pytest

from converters import safetensors_files
from ichigo_jax.storage import stored_arrays

pytest.importorskip("torch")

SHARD_BYTES = 64 << 20
# Chunks in flight and what the allocator keeps for each thread; the same for a model of any size.
CONSTANT = 4 * stored_arrays.CHUNK_BYTES


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """410 MiB in shards of 64 MiB; the embedding and the head fill one each."""
    folder = tmp_path_factory.mktemp("memory") / "hf"
    large_models.write_random(folder, large_models.network(32768, 1024, 4096, 10), SHARD_BYTES)
    return folder


def growth(action, source, target):
    command = [sys.executable, "-m", "tests.unit.large_models", action, str(source), str(target), str(SHARD_BYTES)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(run.stdout.splitlines()[-1])["growth"]


@pytest.mark.slow
def test_import_export_and_extension_hold_no_more_than_a_shard_and_a_half(source, tmp_path):
    tensors = safetensors_files.read_folder(source)
    files = {tensor.file for tensor in tensors.values()}
    largest = max(file.stat().st_size for file in files)
    assert sum(file.stat().st_size for file in files) > 6 * largest

    for action, start, end in [("import", "hf", "model"), ("export", "model", "again"), ("extend", "model", "extended")]:
        found = growth(action, source if start == "hf" else tmp_path / start, tmp_path / end)
        assert found < 1.5 * largest + CONSTANT, f"{action}: {found:,} bytes, the largest shard has {largest:,}"

    again = safetensors_files.read_folder(tmp_path / "again")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype and again[key].read().tobytes() == tensor.read().tobytes(), key
