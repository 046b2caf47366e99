"""A checkpoint as a model folder: for both tasks and adapters, equal to what training itself writes; and what is refused."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from small_runs import language_config, write_language_root
from test_speech_tokenizer_training import small_recipe, text_folder, write_corpus  # noqa: F401 (a fixture)

from converters.__main__ import main as converters_main
from ichigo_jax import evaluate
from ichigo_jax.errors import InputError
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.models.lora import load_adapter
from ichigo_jax.storage.model_folder import load_arrays
from ichigo_jax.tasks.checkpoint_model import save_checkpoint_model
from ichigo_jax.train import train

BEST = "--config.output.checkpoint_best=-heldout/answers_exact"


def assert_equal_arrays(one, other):
    one, other = load_arrays(one), load_arrays(other)
    assert one.keys() == other.keys() and len(one) > 3
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=str(name))


def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_language_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def run(root):
    """Of a language model, evaluated at every second step."""
    assert train(language_config(root, "--config.output.evaluate_every=2", BEST), root / "run") == 0
    return root / "run"


@pytest.fixture(scope="module")
def speech_run(tmp_path_factory, text_folder):  # noqa: F811
    folder = tmp_path_factory.mktemp("speech")
    write_corpus(folder, (5120, 3000, 4444, 1800))
    config = small_recipe("medium,phase=2", folder, text_folder, positions=16, batch_size=8)
    config = replace(
        config,
        init_from=None,
        train=replace(config.train, steps=3),
        output=replace(config.output, checkpoint_every=1, checkpoints_kept=3, checkpoint_best="heldout/wer"),
    )
    assert train(config, folder / "run") == 0
    return folder / "run"


def test_the_newest_is_what_training_wrote(run, tmp_path):
    assert save_checkpoint_model(run, "newest", tmp_path / "model") == 4
    assert_equal_arrays(tmp_path / "model", run / "model")
    found, trained = provenance(tmp_path / "model"), provenance(run / "model")
    assert found == trained and (found["step"], found["workdir"]) == (4, str(run))
    assert found["config"]["train"]["steps"] == 4 and found["speech_tokenizer_fingerprint"] == "0123456789abcdef"
    model = LanguageModel.from_pretrained(tmp_path / "model")
    assert model.tokenizer is not None and np.isfinite(model.logits([[1, 2, 3]])).all()


def test_a_step_in_between_is_that_steps(run, tmp_path):
    assert save_checkpoint_model(run, "2", tmp_path / "model") == 2
    assert provenance(tmp_path / "model")["step"] == 2
    shutil.copytree(run, tmp_path / "stopped")
    for name in ("model", "checkpoints/4"):
        shutil.rmtree(tmp_path / "stopped" / name)
    assert save_checkpoint_model(tmp_path / "stopped", "newest", tmp_path / "other") == 2
    assert_equal_arrays(tmp_path / "model", tmp_path / "other")
    with pytest.raises(AssertionError):
        assert_equal_arrays(tmp_path / "model", run / "model")
    assert sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()) == ["2"], "nothing is changed"


def test_the_best_is_by_the_runs_own_metric(run, tmp_path):
    for step in (2, 4):
        path = run / "checkpoints" / str(step) / "metrics" / "metrics"
        assert json.loads(path.read_text()).keys() == {"heldout/answers_exact"}, "each is ranked after its evaluation"
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for step, value in ((2, 0.9), (4, 0.1)):
        (copy / "checkpoints" / str(step) / "metrics" / "metrics").write_text(json.dumps({"heldout/answers_exact": value}))
    assert save_checkpoint_model(copy, "best", tmp_path / "highest") == 2
    config = json.loads((copy / "config.json").read_text())
    config["output"]["checkpoint_best"] = "heldout/answers_exact"
    (copy / "config.json").write_text(json.dumps(config))
    assert save_checkpoint_model(copy, "best", tmp_path / "lowest") == 4


def test_an_adapters_checkpoint_is_merged_and_has_its_adapter(root, tmp_path):
    config = language_config(root, "--config.model.base_dtype=bfloat16", stage="instruct,lora")
    assert train(config, tmp_path / "run") == 0
    assert save_checkpoint_model(tmp_path / "run", "newest", tmp_path / "model") == 4
    assert_equal_arrays(tmp_path / "model", tmp_path / "run" / "model")
    assert_equal_arrays(tmp_path / "model" / "adapter", tmp_path / "run" / "model" / "adapter")
    assert load_adapter(tmp_path / "model")[0] == load_adapter(tmp_path / "run" / "model")[0]
    assert {array.dtype.name for array in load_arrays(tmp_path / "model").values()} == {"bfloat16"}


def test_a_speech_tokenizers_checkpoints(speech_run, tmp_path):
    assert save_checkpoint_model(speech_run, "newest", tmp_path / "model") == 3
    assert_equal_arrays(tmp_path / "model", speech_run / "model")
    assert provenance(tmp_path / "model") == provenance(speech_run / "model")
    assert save_checkpoint_model(speech_run, "best", tmp_path / "best") == 3, "only the last step was evaluated"
    assert save_checkpoint_model(speech_run, "1", tmp_path / "first") == 1
    assert provenance(tmp_path / "first")["fingerprint"] != provenance(tmp_path / "model")["fingerprint"]


def test_evaluate_takes_a_checkpoint_as_its_model_folder(speech_run, tmp_path):
    manifest = speech_run.parent / "clips.jsonl"

    def metrics(*words):
        output = tmp_path / f"{len(words)}-{words[-1].replace('/', '-')[-20:]}.json"
        with pytest.raises(SystemExit) as ended:
            evaluate.main(["speech-tokenizer", "--output", str(output), *words, str(manifest)])
        assert ended.value.code == 0
        return json.loads(output.read_text())

    assert metrics("--model", str(speech_run), "--step", "newest") == metrics("--model", str(speech_run / "model"))
    for words in (["--model", str(speech_run)], ["--model", str(speech_run), "--step", "7"]):
        with pytest.raises(SystemExit) as ended:
            evaluate.main(["speech-tokenizer", "--output", str(tmp_path / "x.json"), *words, str(manifest)])
        assert ended.value.code == 2 and not (tmp_path / "x.json").exists()


def command(*words):
    with pytest.raises(SystemExit) as ended:
        converters_main([*map(str, words)])
    return ended.value.code


def test_the_command_says_what_it_did_and_what_there_is(run, tmp_path, capsys):
    assert command("import", run, tmp_path / "model", "--step", "2") == 0
    out = capsys.readouterr().out
    assert "recognised: language_model as training run\nstep: 2\nwritten: " in out
    assert command("inspect", run) == 0
    out = capsys.readouterr().out
    assert "format: training run" in out and "steps: 2, 4" in out and "best by: -heldout/answers_exact" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "RUN", "NEW"], "say which checkpoint: --step N, newest or best"),
        (["import", "RUN", "NEW", "--step", "3"], "--step 3 found; .*the checkpoints are of steps 2, 4, or newest or best"),
        (["import", "RUN", "NEW", "--step=-1"], "expected a step, newest or best; .* 2, 4"),
        (["import", "RUN", "NEW", "--step", "last"], "--step last found, expected a step, newest or best"),
        (["import", "RUN", "NEW", "--step", "2", "--dtype", "bfloat16"], "--dtype with language_model as training run found"),
        (["import", "RUN/model", "NEW", "--step", "2"], "a model folder found"),
        (["import", "RUN/checkpoints", "NEW", "--step", "2"], "no config.json in it"),
        (["import", "RUN", "RUN/model", "--step", "2"], "exists already"),
        (["export", "RUN", "NEW"], "training run found, expected a model folder"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(run, tmp_path, capsys, words, message):
    assert command(*(word.replace("RUN", str(run)).replace("NEW", str(tmp_path / "new")) for word in words)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err), err
    assert not (tmp_path / "new").exists()


def test_checkpoints_that_cannot_be_taken_are_one_line_and_stay(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints" / "4" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(InputError, match=r"checkpoints/4 cannot be read \(.*; choose another --step") as error:
        save_checkpoint_model(copy, "newest", tmp_path / "model")
    assert "\n" not in str(error.value) and (copy / "checkpoints" / "4").is_dir()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "seed": 1}))
    with pytest.raises(InputError, match=r"checkpoints/2: another config wrote this checkpoint.*seed was 0, now 1"):
        save_checkpoint_model(copy, "2", tmp_path / "model")
    config["output"]["checkpoint_best"] = None
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="--step best found, but the run's output.checkpoint_best names no metric"):
        save_checkpoint_model(copy, "best", tmp_path / "model")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match="checkpoints: no checkpoint found, expected at least one"):
        save_checkpoint_model(copy, "newest", tmp_path / "model")
    assert not (copy / "checkpoints").exists() and not (tmp_path / "model").exists()


def test_checkpoints_elsewhere_are_found_through_the_config(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "model"))
    shutil.copytree(run / "checkpoints", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "6.orbax-checkpoint-tmp").mkdir()  # which a run that goes on is writing
    config = json.loads((copy / "config.json").read_text())
    config["output"]["checkpoints_in"] = str(tmp_path / "elsewhere")
    (copy / "config.json").write_text(json.dumps(config))
    assert save_checkpoint_model(copy, "newest", tmp_path / "model") == 4
    assert_equal_arrays(tmp_path / "model", run / "model")
    assert (tmp_path / "elsewhere" / "6.orbax-checkpoint-tmp").is_dir()
