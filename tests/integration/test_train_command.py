"""The training command as a process: what it writes, how it resumes, what it refuses."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ichigo_jax.storage.model_folder import load_arrays
from tests.integration.conftest import REPOSITORY, environment, run, start

TINY = [
    "--config.train.steps=12",
    "--config.output.log_every=1",
    "--config.output.checkpoint_every=4",
    "--config.optimizer.warmup_steps=2",
    "--config.objective.bottleneck=true",  # so that the codebook's statistics are part of what must be equal
    "--config.optimizer.frozen=[]",
    "--config.data.evaluation=[]",
]


def command(root, workdir, *more):
    config = f"configs/nano_speech_tokenizer.py:whisper,smoke,root={root}"
    return ["ichigo_jax.train", "--config", config, "--workdir", workdir, *TINY, *more]


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def goodput(workdir):
    return json.loads((workdir / "goodput.json").read_text())["starts"]


def assert_same_model(one, other):
    one, other = load_arrays(one / "model"), load_arrays(other / "model")
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=str(name))


@pytest.fixture(scope="module")
def uninterrupted(corpus_root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, _, err = run(*command(corpus_root, workdir))
    assert code == 0, err
    return workdir


def wait_for_step(workdir, step, process):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / "metrics.jsonl").exists() and len((workdir / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"never reached step {step}: {process.communicate()[1]}")


def test_writes_what_it_says(uninterrupted):
    rows = metrics(uninterrupted)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert TIMES <= rows[-1].keys() and {"grad_norm", "param_norm", "learning_rate"} <= rows[-1].keys()
    assert "mfu" not in rows[-1] and "step_seconds" not in rows[0], "of a CPU, and of the step that compiles"
    assert all(0 < row["goodput"] < 1 for row in rows[1:])
    (start,) = goodput(uninterrupted)
    assert start["last_step"] == 12 and start["startup_seconds"] > 0 and start["apart_seconds"]["saving"] > 0
    assert json.loads((uninterrupted / "config.json").read_text())["train"]["steps"] == 12
    assert (uninterrupted / "checkpoints" / "12").is_dir()
    assert json.loads((uninterrupted / "model" / "config.json").read_text())["kind"] == "speech_tokenizer"


def test_a_finished_run_is_left_as_it_is(corpus_root, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    code, out, _ = run(*command(corpus_root, uninterrupted))
    assert code == 0 and "nothing to do" in out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_saves_the_current_step_and_the_same_command_goes_on(corpus_root, uninterrupted, tmp_path, number, code):
    elsewhere = f"--config.output.checkpoints_in={tmp_path / 'elsewhere'}"
    process = start(*command(corpus_root, tmp_path / "run", elsewhere))
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    stopped = int(out.split("stopped at step ")[1].split()[0])
    assert (tmp_path / "elsewhere" / str(stopped)).is_dir() and stopped < 12
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert run(*command(corpus_root, tmp_path / "run", elsewhere))[0] == 0
    assert_same_model(uninterrupted, tmp_path / "run")
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(uninterrupted)


def test_a_kill_costs_the_steps_since_the_last_checkpoint_and_nothing_else(corpus_root, uninterrupted, tmp_path):
    process = start(*command(corpus_root, tmp_path / "run"))
    wait_for_step(tmp_path / "run", 7, process)
    process.kill()
    process.communicate()
    code, _, err = run(*command(corpus_root, tmp_path / "run", "--profile", "12:12", "--config.output.stall_seconds=0.5"))
    assert code == 0 and "stalled: no step was finished" in err and "before the first step" in err
    before, after = goodput(tmp_path / "run")
    assert after["from_step"] in (0, 4, 8) and after["away_seconds"] + after["lost_seconds"] > 0
    assert before["productive_seconds"] - after["lost_seconds"] < after["productive_seconds"]
    assert [*(tmp_path / "run" / "profile").rglob("*.xplane.pb")]
    assert_same_model(uninterrupted, tmp_path / "run")
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(uninterrupted)


TIMES = {
    "step_seconds",
    "steps_per_second",
    "tokens_per_second_per_chip",
    "data_wait_seconds",
    "data_wait_share",
    "goodput",
}


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(corpus_root, tmp_path):
    """With a checkpoint after every step, so that most kills fall into the middle of a save."""
    often = ("--config.train.steps=80", "--config.output.checkpoint_every=1", "--config.output.checkpoints_kept=1")
    random = np.random.default_rng()
    moments = []
    for _ in range(10):
        process = start(*command(corpus_root, tmp_path / "run", *often))
        wait_for_step(tmp_path / "run", (moments[-1][0] if moments else 0) + 1, process)
        delay = random.uniform(0, 0.4)
        time.sleep(delay)
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended by itself after {moments}: {err}"
        assert "cannot be read" not in err, f"a half-written checkpoint was taken for a whole one after {moments}"
        moments.append((len(metrics(tmp_path / "run")), round(delay, 3)))
    assert run(*command(corpus_root, tmp_path / "run", *often))[0] == 0
    assert run(*command(corpus_root, tmp_path / "whole", *often))[0] == 0
    assert_same_model(tmp_path / "whole", tmp_path / "run")
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(tmp_path / "whole"), moments


def metrics_without_times(workdir):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics(workdir)]


SPIKING = (  # every step that is a little worse than the one before it
    "--config.train.spike_factor=1.1",
    "--config.train.spike_window=1",
    "--config.train.stop_after_skipped=1",
    "--config.train.steps=6",
    "--config.output.checkpoint_every=1",
)


def test_a_spike_sends_the_run_back_to_a_checkpoint_and_on_with_later_batches(corpus_root, tmp_path):
    code, _, err = run(*command(corpus_root, tmp_path / "run", *SPIKING, "--config.train.roll_backs=99"))
    assert code == 0, err
    went_back = [(int(step), int(batch)) for step, batch in re.findall(r"going back to step (\d+) and on with batch (\d+)", err)]
    assert went_back, "the learning rate's warm-up makes the second step worse than the first"
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 7))
    saved = json.loads((tmp_path / "run" / "checkpoints" / "6" / "data" / "metadata").read_text())
    last_step, last_batch = went_back[-1]
    assert (saved["passed_batches"], saved["roll_backs"]) == (last_batch - last_step, len(went_back))
    skipped = json.loads((tmp_path / "run" / "skipped_batches.json").read_text())
    assert [each["batch"] for each in skipped] == [last_batch - 1]
    ((path, rows),) = skipped[0]["rows"].items()
    assert path.endswith("train.jsonl") and len(rows) == 8 and max(rows) < 48

    # With none allowed the run ends, and says whose fault it may be.
    code, _, err = run(*command(corpus_root, tmp_path / "other", *SPIKING))
    assert code == 2 and "step 2: the last 1 steps had losses" in err and "batches 1 to 1, the last with rows " in err
    assert not (tmp_path / "other" / "model").exists()


@pytest.mark.slow
def test_resumes_on_another_mesh(corpus_root, uninterrupted, tmp_path):
    """What one device saved goes on on eight: the same values in another layout, so the same losses up to rounding."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "model")
    shutil.rmtree(workdir / "checkpoints" / "12")
    words = [sys.executable, "-m", *map(str, command(corpus_root, workdir, "--config.mesh.data=2", "--config.mesh.fsdp=4"))]
    result = subprocess.run(words, cwd=REPOSITORY, env=environment(devices=8), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = {row["step"]: row["loss"] for row in metrics(uninterrupted) if "loss" in row}
    found = {row["step"]: row["loss"] for row in metrics(workdir) if "loss" in row}
    assert found.keys() == expected.keys()
    assert found[9] == pytest.approx(expected[9], rel=1e-5)
    assert [found[step] for step in (10, 11, 12)] == pytest.approx([expected[step] for step in (10, 11, 12)], rel=1e-3)


def test_a_workdir_of_another_config_is_refused(corpus_root, uninterrupted):
    code, _, err = run(*command(corpus_root, uninterrupted, "--config.seed=1"))
    assert code == 2 and err.startswith("error: ") and "seed was 0, now 1" in err and err.count("\n") == 1


def test_checkpoints_of_another_config_are_refused(corpus_root, uninterrupted, tmp_path):
    of_another = f"--config.output.checkpoints_in={uninterrupted / 'checkpoints'}"
    code, _, err = run(*command(corpus_root, tmp_path / "run", of_another, "--config.seed=1"))
    assert code == 2 and "another config wrote these checkpoints (seed was 0, now 1); choose another" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.train.stepz=3", "no such field"),
        ('--config.data.sources=[{"path": "nowhere.jsonl", "language": "en", "weight": 1.0}]', "nowhere.jsonl"),
        ("--config.data.text_tokenizer=nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_model(corpus_root, tmp_path, change, message):
    code, _, err = run(*command(corpus_root, tmp_path / "run", change))
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("steps", ["3", "5:4", "11:13"])
def test_a_profile_of_no_steps_is_refused_in_one_line(corpus_root, tmp_path, steps):
    code, _, err = run(*command(corpus_root, tmp_path / "run", "--profile", steps))
    assert code == 2 and "expected START:STOP" in err and "<= 12" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_manifest_without_clips_or_with_missing_ones_is_refused(corpus_root, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "missing.jsonl").write_text('{"path": "gone.wav", "text": "hello"}\n')
    for name, message in (("empty", "at least one row"), ("missing", "1 of 1 audio files do not exist")):
        sources = json.dumps([{"path": str(tmp_path / f"{name}.jsonl"), "language": "en", "weight": 1.0}])
        code, _, err = run(*command(corpus_root, tmp_path / "run", f"--config.data.sources={sources}"))
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_corrupt_clip_is_recorded_and_skipped(corpus_root, tmp_path):
    shutil.copytree(corpus_root / "corpus", tmp_path / "corpus")
    victim = tmp_path / "corpus" / "audio" / "train-00003.wav"
    victim.write_bytes(b"RIFF" + bytes(100))
    sources = json.dumps([{"path": str(tmp_path / "corpus" / "train.jsonl"), "language": "en", "weight": 1.0}])
    code, _, err = run(*command(corpus_root, tmp_path / "run", f"--config.data.sources={sources}"))
    assert code == 0, err
    (fault,) = map(json.loads, (tmp_path / "run" / "skipped_clips.jsonl").read_text().splitlines())
    assert fault["path"] == str(victim) and fault["error"]


@pytest.mark.slow
def test_data_that_changed_its_length_is_refused(corpus_root, uninterrupted, tmp_path):
    shutil.copytree(corpus_root / "corpus", tmp_path / "corpus")
    manifest = tmp_path / "corpus" / "train.jsonl"
    sources = f"--config.data.sources={json.dumps([{'path': str(manifest), 'language': 'en', 'weight': 1.0}])}"
    process = start(*command(corpus_root, tmp_path / "run", sources))
    wait_for_step(tmp_path / "run", 5, process)
    process.terminate()
    process.communicate()
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    code, _, err = run(*command(corpus_root, tmp_path / "run", sources))
    assert code == 2 and "48" in err and "47" in err and err.count("\n") == 1
    code, _, err = run(*command(corpus_root, tmp_path / "run", sources, "--accept-changed-data"))
    assert code == 0 and "now [47]; from here on batches" in err


def test_checkpoints_hold_the_whole_state(uninterrupted):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata((uninterrupted / "checkpoints" / "12" / "state").absolute()).item_metadata.tree
    assert {"step", "params", "frozen", "buffers", "opt_state", "skipped", "skipped_in_a_row"} <= set(tree)
