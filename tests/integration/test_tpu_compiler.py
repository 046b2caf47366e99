"""What the TPU compiler makes of the real steps, on a machine without a TPU. Run with ``-m tpu`` where libtpu is installed."""

import json
import re
import subprocess
import sys

import pytest

from ichigo_jax.parallel import make_mesh
from ichigo_jax.planning.topology import topology
from tests.integration.conftest import REPOSITORY, environment

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="pip install 'jax[tpu]'")
GIB = 1 << 30


def run_plan(topology, *overrides, slice="v5litepod-16"):
    """Plans the pre-training of 8B in a process of its own."""
    words = [
        sys.executable,
        "-m",
        "ichigo_jax.plan",
        "--config",
        "configs/llama_pretrain.py:8b",
        "--topology",
        topology,
        *overrides,
    ]
    # The compiler asks the TPU's metadata server for what these say.
    machine = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": slice}
    return subprocess.run(words, cwd=REPOSITORY, env={**environment(), **machine}, capture_output=True, text=True)


def test_an_8b_step_sends_what_fsdp_needs():
    result = run_plan("v5p:2x2x4", "--json", "--config.train.accumulation=1")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["chips"] == 16 and found["mesh"]["fsdp"] == 16
    assert found["fits"] and 8 * GIB < found["peak_bytes_per_chip"] < 40 * GIB
    # The weights are gathered in bfloat16 forwards and backwards, and their gradients scattered.
    needed = 3 * 2 * found["parameters"] * 15 / 16
    sent = sum(found["collective_bytes_per_step"].values())
    assert 0.8 * needed < sent < 1.2 * needed, found["collective_bytes_per_step"]
    # Six operations a parameter and token, a third of that again for rematerialisation, and attention.
    operations = 8 * found["parameters"] * 480 * 512
    assert 0.85 * operations < found["flops_per_step"] < 1.1 * operations
    assert found["days"] > 0 and 0 < found["compute_bound"] <= 1


def test_between_slices_only_gradients_are_sent():
    parts = 5
    result = run_plan("v5e:4x4", "--slices", "2", "--json", "--config.mesh.data=2", f"--config.train.accumulation={parts}")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert (found["slices"], found["chips"], found["mesh"]["data"], found["mesh"]["fsdp"]) == (2, 32, 2, 16) and found["fits"]
    sent = found["collective_bytes_per_step"].pop("between-slices")
    # Each chip sends what it stores of the gradient, in bfloat16, once a part.
    gradient = 2 * found["parameters"] / 16
    assert 0.9 * parts * gradient < sent < 1.2 * parts * gradient, sent
    assert found["seconds_of"]["network"] == pytest.approx(sent / 3.125e9)
    # Within a slice weights are gathered twice; gradients are summed whole, which is twice a scattering.
    needed = 4 * 2 * found["parameters"] * 15 / 16 * parts
    assert 0.8 * needed < sum(found["collective_bytes_per_step"].values()) < 1.05 * needed, found["collective_bytes_per_step"]


def test_a_step_too_large_says_by_how_much_and_what_would_fit():
    result = run_plan("v5e:4x4", "--config.train.accumulation=1", "--config.train.remat=none")
    assert result.returncode == 2 and "--search" in result.stderr, result.stderr[-2000:]
    assert re.search(r"error: v5e:4x4: .*memory.*\b[0-9.]+G", result.stderr), result.stderr[-2000:]


def test_a_state_too_large_is_refused_before_anything_is_compiled():
    result = run_plan("v5e:2x2", slice="v5litepod-4")
    assert result.returncode == 2 and "--search" in result.stderr, result.stderr[-2000:]
    found = "error: v5e:2x2: not enough memory: state and batch alone are 22.4"
    assert found in result.stderr and "a chip's 16.00 GiB" in result.stderr, result.stderr[-2000:]


def test_a_mesh_may_split_an_axis_of_the_torus():
    mesh = make_mesh({"fsdp": 32, "tensor": 2}, topology("v5p:4x4x4").devices)
    assert mesh.shape == {"data": 1, "fsdp": 32, "tensor": 2, "context": 1}
    assert len(set(mesh.devices.flat)) == 64
