"""Two processes that share one training run: the same result as one, evaluated, stopped, saved and resumed together."""

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

from ichigo_jax.storage import write_json
from ichigo_jax.storage.model_folder import load_arrays
from ichigo_jax.text.train_tokenizer import train_llama_tokenizer
from tests.integration.conftest import REPOSITORY, environment, run
from tests.integration.test_train_command import command, metrics, wait_for_step

SPLIT = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")
FEW = (*SPLIT, "--config.train.steps=4", "--config.output.checkpoint_every=2", "--config.output.evaluate_every=2")
ANSWERS = {(7, 7, 20): "the light is on", (9, 31): "the door is shut", (10, 11, 12): "seven", (30,): "it rains"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(_, *arguments):
    words = ["bash", "launch/local_processes.sh", *map(str, arguments)]
    settings = {**os.environ, **environment(), "PROCESSES": "2", "PORT": str(free_port()), "PYTHON": sys.executable}
    return subprocess.Popen(words, cwd=REPOSITORY, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_two(*command):
    process = start_two(*command)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def few_steps(corpus_root, workdir):
    heldout = {"name": "heldout", "path": str(corpus_root / "corpus" / "heldout.jsonl"), "language": "en", "limit": 6}
    return command(corpus_root, workdir, *FEW, f"--config.data.evaluation={json.dumps([heldout])}")


def assert_same_run(one, other):
    """Losses and arrays up to rounding, evaluations exactly."""
    for found, expected in zip(metrics(one), metrics(other), strict=True):
        assert found.keys() == expected.keys() and found["step"] == expected["step"]
        if "loss" in expected:
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        else:
            assert found == expected
    found, expected = load_arrays(one / "model"), load_arrays(other / "model")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-3, err_msg=str(name))


@pytest.fixture(scope="module")
def alone(corpus_root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert run(*few_steps(corpus_root, workdir))[0] == 0
    return workdir


def test_two_processes_are_one_run(corpus_root, alone, tmp_path):
    two = tmp_path / "two"
    code, _, err = run_two(*few_steps(corpus_root, two))
    assert code == 0, err[-3000:]
    rows = metrics(two)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4], "one process writes the log"
    assert 0 < rows[-1]["heldout/cer"] != 1, "some of what was heard is right or wrong, not nothing"
    assert_same_run(two, alone)
    fingerprints = [json.loads((folder / "model" / "provenance.json").read_text())["fingerprint"] for folder in (two, alone)]
    assert all(len(found) == 16 for found in fingerprints)

    # What two processes saved, one goes on from.
    ours = load_arrays(two / "model")
    (two / "model").rename(tmp_path / "first")
    assert sorted(path.name for path in (two / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]
    assert run(*few_steps(corpus_root, two))[0] == 0
    for name, array in load_arrays(two / "model").items():
        np.testing.assert_array_equal(array, ours[name], err_msg=str(name))


@pytest.fixture(scope="module")
def language_root(tmp_path_factory):
    """A quickstart root from which an adapter is trained: sound tokens and a model that has seen them once."""
    root = tmp_path_factory.mktemp("language")
    write_json(root / "speech_tokenizer" / "model" / "provenance.json", {"fingerprint": "0123456789abcdef"})
    train_llama_tokenizer(ANSWERS.values(), root / "text_tokenizers" / "llama", 300, 33, durations=False)
    (root / "tokens").mkdir()
    for name in ("train", "heldout"):
        rows = [{"tokens": list(codes), "text": answer, "answer": answer} for codes, answer in ANSWERS.items()]
        pq.write_table(pa.Table.from_pylist(rows), root / "tokens" / f"{name}.parquet")
    config = f"configs/nano_llama.py:pretrain,smoke,root={root}"
    code, _, err = run("ichigo_jax.train", "--config", config, "--workdir", root / "pretrain", "--config.train.steps=1")
    assert code == 0, err[-3000:]
    return root


def test_two_processes_evaluate_and_save_a_language_model_and_its_adapter_like_one(language_root, tmp_path):
    config = f"configs/nano_llama.py:instruct,lora,smoke,root={language_root}"
    numbers = {"train.steps": 16, "optimizer.learning_rate": 1e-2}
    flags = [*SPLIT, *(f"--config.{name}={value}" for name, value in numbers.items())]
    for runner, name in ((run, "one"), (run_two, "two")):
        code, _, err = runner("ichigo_jax.train", "--config", config, "--workdir", tmp_path / name, *flags)
        assert code == 0, err[-3000:]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert metrics(tmp_path / "two")[-1]["heldout/answers_exact"] == 1, "it has learned to listen"
    assert (tmp_path / "two" / "model" / "adapter" / "params").is_dir()


@pytest.mark.slow
def test_a_signal_stops_both_after_the_same_step_and_both_go_on(corpus_root, tmp_path):
    workdir, longer = tmp_path / "run", (*SPLIT, "--config.train.steps=40", "--config.output.checkpoint_every=0")
    process = start_two(*command(corpus_root, workdir, *longer))
    wait_for_step(workdir, 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 143, err[-3000:]
    stopped = {line.split("stopped at step ")[1].split()[0] for line in out.splitlines() if "stopped at step" in line}
    assert len(stopped) == 1 and out.count("stopped at step") == 2
    (step,) = map(int, stopped)
    assert (workdir / "checkpoints" / str(step)).is_dir() and 3 <= step < 40
    code, _, err = run_two(*command(corpus_root, workdir, *longer))
    assert code == 0, err[-3000:]
    assert [row["step"] for row in metrics(workdir)] == list(range(1, 41))


SPLIT_STATE = """
import sys
import jax
from jax.sharding import NamedSharding, PartitionSpec
from ichigo_jax.parallel import make_mesh
from ichigo_jax.training.checkpoint import Checkpoints
from ichigo_jax.training.state import TrainState

what, folder, coordinator, process = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(process))
split = NamedSharding(make_mesh({"fsdp": 2}), PartitionSpec("fsdp"))
make = jax.jit(lambda step: jax.random.normal(jax.random.key(step), (2, 5000)), out_shardings=split)
fields = TrainState.__dataclass_fields__
checkpoints = Checkpoints(folder, 2, 0, None)
if what == "save":
    for step in (2, 4):
        checkpoints.save(TrainState(**{name: make(step) for name in fields}), step, {}, {})
else:
    found = checkpoints.restore(TrainState(**{name: make(0) for name in fields}))
    mine = found.state.params.addressable_shards[0].data
    assert (mine == make(found.step).addressable_shards[0].data).all()
    print("resumed at", found.step)
checkpoints.close()
"""


def test_a_checkpoint_that_one_of_them_cannot_read_is_set_aside_by_both(tmp_path):
    def run_both(what):
        words = [sys.executable, "-c", SPLIT_STATE, what, str(tmp_path), f"127.0.0.1:{free_port()}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        both = [subprocess.Popen([*words, process], cwd=REPOSITORY, env=environment(), **pipes) for process in "01"]
        try:
            found = [process.communicate(timeout=100) for process in both]
        finally:
            for process in both:
                process.kill()
        assert [process.returncode for process in both] == [0, 0], found
        return found

    run_both("save")
    for path in (tmp_path / "4" / "state" / "ocdbt.process_1" / "d").iterdir():
        if path.stat().st_size > 50_000:  # the second's parts of arrays, and not the lists of them, which both read
            path.write_bytes(path.read_bytes()[:1000])
    (out, err), (second_out, second_err) = run_both("restore")
    assert "cannot be read" not in err and "/4 is renamed and the one before it taken" in err
    assert "/4 cannot be read" in second_err
    assert out.endswith("resumed at 2\n") and second_out.endswith("resumed at 2\n")
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4.unreadable"}


def test_one_that_fails_ends_all(corpus_root, tmp_path):
    code, _, err = run_two(*command(corpus_root, tmp_path / "run", "--config.train.batch_size=7"))
    assert code == 2 and "error: train.batch_size 7 found, expected a multiple of the 2 devices" in err
