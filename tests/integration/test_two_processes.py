"""Training by two processes that share one run: the same result as one process, stopped, saved and resumed together."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ichigo_jax.models.folder import load_arrays
from ichigo_jax.storage import write_json
from ichigo_jax.text import train_llama_tokenizer
from tests.integration.conftest import REPOSITORY, environment, run
from tests.integration.test_train_command import command, metrics, wait_for_step

FEW = ("--config.train.steps=4", "--config.output.checkpoint_every=2", "--config.mesh.data=1", "--config.mesh.fsdp=-1")


def start_two(corpus_root, workdir, *more):
    return launch_two(command(corpus_root, workdir, *more)[1:])


def launch_two(arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["bash", "launch/local_processes.sh", *map(str, arguments)]
    settings = {**os.environ, **environment(), "PROCESSES": "2", "PORT": str(port), "PYTHON": sys.executable}
    return subprocess.Popen(words, cwd=REPOSITORY, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_two(*arguments):
    process = start_two(*arguments)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def losses(workdir):
    return [row["loss"] for row in metrics(workdir)]


@pytest.fixture(scope="module")
def alone(corpus_root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert run(*command(corpus_root, workdir, *FEW))[0] == 0
    return workdir


def test_two_processes_are_one_run(corpus_root, alone, tmp_path):
    two = tmp_path / "two"
    code, _, err = run_two(corpus_root, two, *FEW)
    assert code == 0, err[-3000:]
    assert [row["step"] for row in metrics(two)] == [1, 2, 3, 4], "one process writes the log"
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    ours, expected = load_arrays(two / "model"), load_arrays(alone / "model")
    assert ours.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(ours[name], expected[name], atol=2e-3, err_msg=str(name))
    fingerprints = [json.loads((folder / "model" / "provenance.json").read_text())["fingerprint"] for folder in (two, alone)]
    assert all(len(found) == 16 for found in fingerprints)

    # What two processes saved, one goes on from.
    (two / "model").rename(tmp_path / "first")
    assert sorted(path.name for path in (two / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]
    assert run(*command(corpus_root, two, *FEW))[0] == 0
    for name, array in load_arrays(two / "model").items():
        np.testing.assert_array_equal(array, ours[name], err_msg=str(name))


def test_two_processes_save_a_language_model(tmp_path):
    root, workdir = tmp_path / "root", tmp_path / "run"
    train_llama_tokenizer(["turn on the light"], root / "text_tokenizers" / "llama", 300, sound_codes=8, durations=False)
    write_json(root / "speech_tokenizer" / "model" / "provenance.json", {"fingerprint": "0123456789abcdef"})
    (root / "tokens").mkdir()
    rows = [{"tokens": [number % 8, 5], "text": "on"} for number in range(16)]
    pq.write_table(pa.Table.from_pylist(rows), root / "tokens" / "train.parquet")
    config = f"configs/nano_llama.py:smoke,root={root}"
    process = launch_two(["--config", config, "--workdir", workdir, "--config.train.steps=2", "--config.data.length=48"])
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    assert json.loads((workdir / "model" / "config.json").read_text())["kind"] == "language_model"


@pytest.mark.slow
def test_a_signal_stops_both_after_the_same_step_and_both_go_on(corpus_root, tmp_path):
    workdir, longer = tmp_path / "run", (*FEW[2:], "--config.train.steps=40", "--config.output.checkpoint_every=0")
    process = start_two(corpus_root, workdir, *longer)
    wait_for_step(workdir, 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 143, err[-3000:]
    stopped = {line.split("stopped at step ")[1].split()[0] for line in out.splitlines() if "stopped at step" in line}
    assert len(stopped) == 1 and out.count("stopped at step") == 2
    (step,) = map(int, stopped)
    assert (workdir / "checkpoints" / str(step)).is_dir() and 3 <= step < 40
    code, _, err = run_two(corpus_root, workdir, *longer)
    assert code == 0, err[-3000:]
    assert [row["step"] for row in metrics(workdir)] == list(range(1, 41))


def test_one_that_fails_ends_all(corpus_root, tmp_path):
    code, _, err = run_two(corpus_root, tmp_path / "run", "--config.train.batch_size=7")
    assert code == 2 and "error: train.batch_size 7 found, expected a multiple of the 2 devices" in err
