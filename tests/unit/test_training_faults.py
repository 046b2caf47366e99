"""What training finds before its first step, and what it keeps when something fails."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile
import test_step
from flax import nnx
from small_runs import language_config, write_language_root, write_rows
from test_checkpoints import resume, state
from test_speech_tokenizer_training import read_examples, small_recipe, speak, text_folder, write_corpus  # noqa: F401

from ichigo_jax.data import speech
from ichigo_jax.data.encoded import encode_rows
from ichigo_jax.data.faults import FaultLog
from ichigo_jax.data.row_formats import RowEncoder, RowFormat
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import Llama
from ichigo_jax.storage.array_faults import say_once
from ichigo_jax.storage.model_folder import load_arrays, save_model
from ichigo_jax.tasks import open_files, planned_task
from ichigo_jax.tasks.language_model import LanguageEvaluation
from ichigo_jax.text import TextTokenizer
from ichigo_jax.train import main, make_step, train
from ichigo_jax.training import run_config
from ichigo_jax.training.checkpoint import Checkpoints
from ichigo_jax.training.goodput import Goodput
from ichigo_jax.training.metrics import MetricsLog
from ichigo_jax.training.run_config import load
from ichigo_jax.training.skipped import Passed, go_back
from ichigo_jax.training.state import make_state, split
from ichigo_jax.vocab import sound_text

ROOT = Path(__file__).parents[2]
NANO = str(ROOT / "configs" / "nano_llama.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_language_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path, (5120, 3000, 4444, 1800))
    return tmp_path


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- evaluation data, before the first step --------------------------------------------------------------------------

FINE = {"tokens": [3, 5], "answer": "yes"}


def evaluated(root, *sets):
    changes = [{"name": "heldout", "path": "", "limit": 8, "max_new_tokens": 4, **each} for each in sets]
    return language_config(root, f"--config.data.evaluation={json.dumps(changes)}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": [1, 999], "answer": "yes"}, "sound code 999 found, expected 0 to 7"),
        ({"tokens": [1, -1], "answer": "yes"}, "sound code -1 found"),
        ({"tokens": sound_text([1])[:-3], "answer": "yes"}, "expected <|sound_start|>…<|sound_end|>"),
        ({"tokens": "hello", "answer": "yes"}, "'hello' found among sound tokens"),
        ({"tokens": [1.5], "answer": "yes"}, "expected a list of codes"),
        ({"tokens": [], "answer": "yes"}, "sound without codes"),
        ({"tokens": [1], "answer": 5}, "answer 5 found, expected text"),
        ({"tokens": [1]}, "no 'answer'"),
        ({"tokens": [1] * 300, "answer": "yes"}, "ids found, the model's context is 64"),
    ],
)
def test_an_evaluation_row_that_cannot_be_used_is_found_before_the_first_step(root, tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [FINE, row])
    with pytest.raises(InputError) as error:
        train(evaluated(root, {"path": str(path)}), tmp_path / "run")
    assert f"{path}: row 2" in one_line(error) and message in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()
    if "tokens" in row and row.get("answer") == "yes":
        open_files(evaluated(root, {"path": str(path), "limit": 1})).open_evaluation()  # which reads the first row alone


def test_spelled_sound_is_read_in_evaluation_as_in_training(root, tmp_path):
    rows = [FINE, {"tokens": sound_text([3, 5]), "answer": "yes"}, {"tokens": "<|sound_0003|><|sound_0005|>", "answer": "yes"}]
    evaluation = open_files(evaluated(root, {"path": str(write_rows(tmp_path / "rows.jsonl", rows))})).open_evaluation()
    (held_out,) = evaluation.rows.values()
    assert len({str(row) for row in held_out}) == 1 and len(held_out) == 3


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([{}, {}], "evaluation sets named 'heldout', 'heldout' found, expected a name of its own for each"),
        ([{"name": ""}], "expected a name of its own"),
        ([{"limit": 0}], "with limit 0 found, expected at least 1 row"),
        ([{"limit": -1}], "with limit -1 found"),
        ([{"max_new_tokens": 0}], "max_new_tokens 0 found, expected at least 1"),
    ],
)
def test_evaluation_sets_that_make_no_sense(root, tmp_path, sets, message):
    heldout = str(root / "tokens" / "heldout.parquet")
    with pytest.raises(InputError) as error:
        open_files(evaluated(root, *({"path": heldout, **each} for each in sets)))
    assert message in one_line(error)


def test_a_best_metric_that_nothing_measures_is_refused_at_start(root, tmp_path):
    for best in ("heldout/wer", "-held/answers_exact"):
        with pytest.raises(InputError, match="expected a metric .*which measure heldout/answers_exact") as error:
            train(language_config(root, f"--config.output.checkpoint_best={best}"), tmp_path / "run")
        assert best in one_line(error)


def speech_config(folder, texts, *, steps=2, bottleneck=True, evaluation=({},), **train_changes):
    frozen = () if not bottleneck else None
    config = small_recipe(
        "medium,phase=2", folder, texts, positions=16, batch_size=8, objective={"bottleneck": bottleneck}, frozen=frozen
    )
    held_out = {"name": "heldout", "path": str(folder / "clips.jsonl"), "language": "en", "limit": 4}
    return dataclasses.replace(
        config,
        init_from=None,
        data={**config.data, "evaluation": tuple({**held_out, **each} for each in evaluation)},
        train=dataclasses.replace(config.train, **{"steps": steps, **train_changes}),
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text("no audio"), "no audio that can be decoded"),
        (lambda path: path.write_bytes(b""), "no audio that can be decoded"),
        (lambda path: soundfile.write(path, np.full(500, np.nan, np.float32), 16000, subtype="FLOAT"), "NaN"),
        (lambda path: (path.unlink(), path.mkdir()), "audio files do not exist"),
        (lambda path: path.unlink(), "audio files do not exist"),
    ],
)
def test_an_evaluation_clip_that_cannot_be_used_is_found_before_the_first_step(corpus, tmp_path, text_folder, spoil, message):  # noqa: F811
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    write_corpus(held_out, (2000, 2000, 3000))
    spoil(held_out / "2.wav")
    with pytest.raises(InputError) as error:
        train(speech_config(corpus, text_folder, evaluation=({"path": str(held_out / "clips.jsonl")},)), tmp_path / "run")
    text = one_line(error)
    assert message in text and str(held_out / "clips.jsonl") in text and "2.wav" in text
    assert "row 3" in text or "do not exist" in text
    assert not (tmp_path / "run").exists()


def test_names_that_are_no_files_and_languages_that_are_none(corpus, tmp_path, text_folder):  # noqa: F811
    write_rows(tmp_path / "long.jsonl", [{"path": "x" * 300 + ".wav", "text": "on"}])
    with pytest.raises(InputError, match="1 of 1 audio files do not exist"):
        open_files(speech_config(corpus, text_folder, evaluation=({"path": str(tmp_path / "long.jsonl")},))).open_evaluation()
    with pytest.raises(InputError, match="'xx'|xx"):
        open_files(speech_config(corpus, text_folder, evaluation=({"language": "xx"},))).open_evaluation()
    with pytest.raises(InputError, match="'heldout', 'heldout' found"):
        open_files(speech_config(corpus, text_folder, evaluation=({}, {})))


# ---- numbers in configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed -1 found, expected from 0 to 4294967295"),
        ("seed=4294967296", "seed 4294967296 found"),
        ("seed=9223372036854775808", "seed 9223372036854775808 found"),
        ("seed=NaN", "found 'NaN', expected int"),
        ("optimizer.learning_rate=NaN", "config.optimizer.learning_rate: found NaN, expected a number"),
        ("optimizer.learning_rate=-1", "learning_rate -1.0 found, expected a finite number, 0 or more"),
        ("optimizer.learning_rate=Infinity", "learning_rate inf found"),
        ("optimizer.b2=1.0", "b2 1.0 found, expected from 0 to less than 1"),
        ("optimizer.warmup_steps=-1", "warmup_steps -1 found"),
        ("optimizer.clip_norm=0.0", "clip_norm 0.0 found, expected more than 0"),
        ("train.steps=0", "steps 0 found, expected at least 1"),
        ("train.steps=-5", "steps -5 found"),
        ("train.stop_after_skipped=0", "stop_after_skipped 0 found"),
        ("train.roll_backs=-1", "roll_backs -1 found"),
        ("train.spike_factor=NaN", "config.train.spike_factor: found NaN"),
        ("output.log_every=-1", "log_every -1 found, expected a number of steps, or 0 for never"),
        ("output.checkpoints_kept=0", "checkpoints_kept 0 found, expected at least 1"),
        ("output.stall_seconds=NaN", "found NaN"),
    ],
)
def test_numbers_out_of_range_are_refused_when_the_config_is_read(override, message):
    with pytest.raises(InputError) as error:
        load(NANO, [f"--config.{override}"])
    assert message in one_line(error)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --config, --workdir; see python -m ichigo_jax.train --help"),
        (["--config", NANO], "the following arguments are required: --workdir"),
        (["--config", NANO, "--workdir", "run", "--profile"], "argument --profile: expected one argument"),
        (["--config", NANO, "--workdir", "run", "--step", "3"], "'--step' found, expected --config.section.field=value"),
    ],
)
def test_a_wrong_flag_of_train_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_numbers_of_the_tasks_own_fields(root, tmp_path):
    heldout = str(root / "tokens" / "heldout.parquet")
    for weight, message in ((float("nan"), "weight: found NaN"), (float("inf"), r"weights \[inf\]"), (0.0, r"weights \[0.0\]")):
        source = {"path": heldout, "format": "sound", "column": None, "request": None, "weight": weight}
        with pytest.raises(InputError, match=message):
            train(language_config(root, f"--config.data.sources={json.dumps([source])}"), tmp_path / "run")
    for override, message in (
        ("data.length=1", "length 1 found"),
        ("objective.z_loss=NaN", "z_loss: found NaN"),
        ("objective.z_loss=Infinity", "z_loss inf found, expected a finite number"),
    ):
        with pytest.raises(InputError, match=message):
            open_files(language_config(root, f"--config.{override}"))
    speech = str(ROOT / "configs" / "nano_speech_tokenizer.py")
    for override, message in (
        ("objective.kl_weight=-1.0", "kl_weight -1.0 found"),
        ("objective.noise_weight=Infinity", "noise_weight inf found"),
        ("objective.noise_snr_db=[NaN, 20.0]", r"noise_snr_db\[0\]: found NaN"),
        ("objective.noise_snr_db=[20.0, 5.0]", "expected the lowest and the highest"),
        ("data.text_length=0", "text_length 0 found"),
    ):
        with pytest.raises(InputError, match=message):
            planned_task(load(speech, [f"--config.{override}"]))


# ---- checkpoint first, evaluation after it ---------------------------------------------------------------------------


def rows_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    own_time = ("seconds", "second", "goodput", "per_chip", "share")
    return [{name: value for name, value in json.loads(line).items() if not name.endswith(own_time)} for line in lines]


def test_a_failing_evaluation_loses_nothing_and_is_made_up_for(root, tmp_path, monkeypatch):
    """At a step that no checkpoint was due at, and at the last one."""
    often = ("--config.output.evaluate_every=3", "--config.output.checkpoint_best=-heldout/answers_exact")
    config, evaluate = language_config(root, *often), LanguageEvaluation.__call__
    assert train(config, tmp_path / "whole") == 0

    def fail(evaluation, model):
        raise OSError(5, "Input/output error", "rows.parquet")

    for step in (3, 4):
        monkeypatch.setattr(LanguageEvaluation, "__call__", fail)
        with pytest.raises(OSError, match="Input/output"):
            train(config, tmp_path / "run")
        assert max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == step, "and it is whole"
        assert not (tmp_path / "run" / "model").exists()
        if step == 3:  # the next start makes up for this evaluation, and fails at the one after it
            works = iter((True,))
            made_up = lambda *arguments, works=works: (evaluate if next(works, False) else fail)(*arguments)  # noqa: E731
            monkeypatch.setattr(LanguageEvaluation, "__call__", made_up)
            with pytest.raises(OSError, match="Input/output"):
                train(config, tmp_path / "run")
    monkeypatch.setattr(LanguageEvaluation, "__call__", evaluate)
    assert train(config, tmp_path / "run") == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 3, 4, 4]
    for step in (3, 4):
        path = Path("checkpoints") / str(step) / "metrics" / "metrics"
        assert (tmp_path / "run" / path).read_text() == (tmp_path / "whole" / path).read_text()
    one, other = load_arrays(tmp_path / "run" / "model"), load_arrays(tmp_path / "whole" / "model")
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_what_is_ranked_later_is_kept_as_what_is_ranked_at_once(tmp_path):
    values = {2: 0.9, 4: 0.1, 6: float("nan"), 8: 0.5}
    checkpoints = Checkpoints(tmp_path, 1, 0, "wer")
    for step in (2, 4, 6, 8):
        checkpoints.save(state(step), step, {}, {})
        checkpoints.rank(step, {"loss": 3.0})
        checkpoints.rank(step, {"wer": np.float32(values[step])})
    checkpoints.close()
    with Checkpoints(tmp_path, 1, 0, "wer") as again:  # another start knows it too
        again.save(state(10), 10, {}, {})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 10]
    assert resume(tmp_path).step == 10


def test_an_error_waits_for_what_is_being_saved(tmp_path):
    with pytest.raises(RuntimeError, match="of the loop"), Checkpoints(tmp_path, 1, 0, None) as checkpoints:
        checkpoints.save(state(3), 3, {}, {})
        raise RuntimeError("of the loop")
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_the_log_and_its_trackers_are_closed_after_an_error(tmp_path):
    closed = []

    class Tracker:
        def write(self, step, values): ...
        def close(self):
            closed.append(True)

    with pytest.raises(RuntimeError), MetricsLog(tmp_path / "metrics.jsonl", 0, [Tracker(), Tracker()]):
        raise RuntimeError
    assert closed == [True, True]


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a file system of so many bytes."""
    mounted = []

    def mount(size, *options):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small file system")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


FULL_DISK = """
import dataclasses, pathlib, sys
sys.path[:0] = [{tests!r}]
import jax
from ichigo_jax.errors import command
from ichigo_jax.training.checkpoint import Checkpoints
from test_checkpoints import state
big = dataclasses.replace(state(2), frozen={{f"x{{i}}": jax.random.normal(jax.random.key(i), (1_000_000,)) for i in range(8)}})

@command
def main():
    with Checkpoints(pathlib.Path(sys.argv[1]), 2, 0, None) as checkpoints:
        checkpoints.save(state(1), 1, {{}}, {{}})
        checkpoints._manager.wait_until_finished()
        checkpoints.save(big, 2, {{}}, {{}})
main()
"""


def test_a_full_disk_at_a_checkpoint_is_one_line_and_no_traceback(small_disk):
    disk = small_disk("3m")
    code = FULL_DISK.format(tests=str(ROOT / "tests" / "unit"))
    for _ in range(3):  # how much the threads of the libraries say is a matter of chance
        result = subprocess.run([sys.executable, "-c", code, str(disk / "run")], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and "a checkpoint could not be written" in result.stderr, result.stderr
        assert "No space left on device" in result.stderr and str(disk / "run") in result.stderr
        assert resume(disk / "run").step == 1


def test_other_faults_are_still_printed(caplog):
    say_once()
    with caplog.at_level(logging.ERROR, logger="absl"):
        try:
            raise OSError("gone")
        except OSError:
            logging.getLogger("absl").exception("something else")
    assert "something else" in caplog.text


def fill(disk):
    with (disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


def write_log(disk):
    MetricsLog(disk / "metrics.jsonl", 0).write(1, {"loss": 1.0})


def shorten_log(disk):
    MetricsLog(disk / "old.jsonl", 1)


def write_goodput(disk):
    Goodput(disk / "goodput.json", 0, {}, 0.0, True)


def write_faults(disk):
    FaultLog(disk / "skipped_rows.jsonl")("a.jsonl: row 3", "no 'tokens' found")


def claim(disk):
    run_config.claim_workdir(disk / "run", load(NANO, []))


def write_batches(disk):
    go_back(5, 2, Passed(0, 0), 1, None, lambda number: {"rows.jsonl": [number]}, disk)


def write_model(disk):
    config = test_step.CONFIG
    arrays = {"embedding": jnp.ones((64, 512)), "norm": {"scale": jnp.ones(64)}}
    save_model(disk / "model", "language_model", config, arrays, {}, None)


WRITERS = [write_log, shorten_log, write_goodput, write_faults, claim, write_batches, write_model]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_whatever_training_writes_a_full_disk_is_one_line_that_names_it(small_disk, write, capfd):
    disk = small_disk("256k")
    (disk / "old.jsonl").write_text('{"step": 1}\n' * 1000)
    fill(disk)
    with pytest.raises(InputError) as error:
        write(disk)
    text = one_line(error)
    assert str(disk) in text and "cannot be written" in text and "No space left on device" in text
    assert capfd.readouterr().err == ""


def test_rows_that_do_not_fit_on_the_disk_are_one_line(root, small_disk, tmp_path):
    disk = small_disk("64k")
    tokenizer = TextTokenizer.from_folder(root / "text_tokenizers" / "llama")
    encoder = RowEncoder(RowFormat("instruction", None, None, False), tokenizer, 100, "answers")
    path = write_rows(tmp_path / "rows.jsonl", [FINE] * 4000)
    with pytest.raises(InputError, match=r"encoded/ids-.*cannot be written: No space left on device") as error:
        encode_rows(str(path), encoder, disk / "encoded", FaultLog(None), processes=1)
    one_line(error)
    assert not [*(disk / "encoded").iterdir()]


@pytest.mark.parametrize("where", ["file", "file/below", "link"])
def test_a_workdir_that_cannot_be_a_folder_is_refused_before_anything_is_read(root, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"--workdir .* is no folder; choose another --workdir") as error:
        train(language_config(root), tmp_path / where)
    one_line(error)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_that_may_not_be_written_is_refused_before_anything_is_read(root, small_disk, tmp_path):
    for workdir in (small_disk("64k", "ro") / "run" / "deep", small_disk("64k", "ro")):
        with pytest.raises(InputError, match="may not be written by this user; choose another --workdir") as error:
            train(language_config(root), workdir)
        one_line(error)
    with pytest.raises(InputError, match="File name too long; choose another --workdir"):
        train(language_config(root), tmp_path / ("x" * 300))


# ---- clips that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", ["all", "texts"])
def test_a_run_whose_every_clip_is_unusable_fails_and_writes_no_model(corpus, tmp_path, text_folder, spoiled):  # noqa: F811
    if spoiled == "all":
        for path in corpus.glob("*.wav"):
            path.write_text("no audio")
    else:
        rows = [json.loads(line) for line in (corpus / "clips.jsonl").read_text().splitlines()]
        write_rows(corpus / "clips.jsonl", [{**row, "text": "turn on " * 30} for row in rows])
    with pytest.raises(InputError) as error:
        train(speech_config(corpus, text_folder, evaluation=()), tmp_path / "run")
    assert "no step so far had an example that can be used" in one_line(error)
    assert str(tmp_path / "run" / "skipped_clips.jsonl") in str(error.value)
    assert len((tmp_path / "run" / "skipped_clips.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "run" / "model").exists() and not [*(tmp_path / "run" / "checkpoints").glob("[0-9]*")]


def test_the_log_says_how_many_examples_a_step_had(corpus, tmp_path, text_folder):  # noqa: F811
    (corpus / "1.wav").write_text("no audio")
    assert train(speech_config(corpus, text_folder, evaluation=()), tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["examples"] for row in rows if "loss" in row][-1] == 6, "of each epoch of four clips three can be used"
    assert all(row["skipped_steps"] == 0 for row in rows if "loss" in row)


def test_a_step_without_examples_changes_nothing_and_is_counted():
    graphdef, *parts = split(Llama(test_step.CONFIG, nnx.Rngs(0)), ())
    config = test_step.run_config(1)
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    step = jax.jit(make_step(test_step.task(), config, graphdef, optimizer))
    before = make_state(*parts, optimizer, test_step.WINDOW)
    batch = test_step.batch()
    after, metrics = step(before, {**batch, "targets": jnp.full_like(batch["targets"], -100)})
    assert (int(metrics["examples"]), int(metrics["skipped_steps"]), int(after.step)) == (0, 1, 1)
    for name in ("params", "opt_state", "recent"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    some = batch["targets"].at[2:].set(-100)
    after, metrics = step(after, {**batch, "targets": some})
    assert (int(metrics["examples"]), int(metrics["skipped_steps"])) == (2, 1)
    assert np.abs(after.params["embedding"] - before.params["embedding"]).max() > 0


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -float("inf"), -3, 0, True, "long", None, 10**400, 1e300])
def test_seconds_that_are_none_are_taken_from_the_file(tmp_path, seconds):
    soundfile.write(tmp_path / "a.wav", speak(0, 1600), 16000)
    row = {"path": str(tmp_path / "a.wav"), "text": "on", "seconds": seconds}
    assert speech._expected_samples(row) == 1600 + speech.ROUNDING_SAMPLES
    assert speech._expected_samples({**row, "seconds": 0.5}) == 8000 + speech.ROUNDING_SAMPLES


def test_a_clip_that_the_system_cannot_read_is_a_fault_of_its_row(tmp_path, monkeypatch):
    write_corpus(tmp_path, (1000, 900, 800), ("on", "off", "on"))
    load_audio = speech.load_audio

    def read(path, **options):
        if path.endswith("1.wav"):
            raise OSError(116, "Stale file handle", path)
        return load_audio(path, **options)

    monkeypatch.setattr(speech, "load_audio", read)
    examples = read_examples(tmp_path, FaultLog(tmp_path / "skipped.jsonl"))
    assert [int(examples[number]["samples"]) for number in range(3)] == [1000, 0, 800]
    (fault,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert fault["path"].endswith("1.wav") and "Stale file handle" in fault["error"]
