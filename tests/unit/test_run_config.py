import dataclasses
import json
from pathlib import Path

import pytest

from ichigo_jax.errors import InputError
from ichigo_jax.training.run_config import check_workdir, claim_workdir, load, parse_argument

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "nano_speech_tokenizer.py")


def test_argument_and_overrides_reach_the_config():
    config = load(f"{CONFIG}:quantizer,root=elsewhere", ["--config.train.steps=7", "--config.optimizer.learning_rate=1"])
    assert config.objective["bottleneck"] is True
    assert config.init_from == "elsewhere/whisper/model"
    assert config.train.steps == 7
    assert config.optimizer.learning_rate == 1.0


def test_a_section_can_be_none():
    assert load(CONFIG, []).model is not None
    assert load(CONFIG, ["--config.model=null"]).model is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.step=7", "--config.train.step: no such field; the fields are"),
        ("--config.train=7", "no such field"),
        ("--config.train.steps=many", "--config.train.steps: found 'many', expected int"),
        ("--config.train.steps=1.5", "expected int"),
        ("--config.train.steps=true", "expected int"),
        ("--config.objective.bottleneck=1", "expected bool"),
        ("--config.optimizer.decay=linear", "config.optimizer.decay: found 'linear', expected one of 'cosine', 'constant'"),
        ("--steps=3", "'--steps=3' found, expected --config.section.field=value"),
        ("stray", "'stray' found"),
    ],
)
def test_wrong_overrides_are_one_clear_line(override, message):
    with pytest.raises(InputError) as error:
        load(CONFIG, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["nowhere.py", f"{CONFIG}:stage", f"{ROOT}/setup.cfg"])
def test_wrong_files_and_arguments(spec):
    if spec.endswith(":stage"):
        spec = f"{CONFIG}:size=3"
    with pytest.raises(InputError):
        load(spec, [])


def test_arguments_of_configs():
    options = parse_argument("quantizer,smoke,root=here", stage="whisper", smoke=False, root="runs")
    assert vars(options) == {"stage": "quantizer", "smoke": True, "root": "here"}
    with pytest.raises(InputError, match="config argument 'size=3' found"):
        parse_argument("size=3", stage="whisper")


def test_every_config_file_describes_a_valid_run():
    for file in sorted((ROOT / "configs").glob("*.py")):
        load(str(file), [])


def test_a_workdir_belongs_to_one_config(tmp_path):
    config = load(CONFIG, [])
    check_workdir(tmp_path / "run", config)
    claim_workdir(tmp_path / "run", config)
    check_workdir(tmp_path / "run", config)
    elsewhere = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=2))
    check_workdir(tmp_path / "run", elsewhere)
    other = dataclasses.replace(config, seed=1, train=dataclasses.replace(config.train, steps=5))
    with pytest.raises(InputError, match=r"another config started this workdir \(seed was 0, now 1; train.steps was"):
        check_workdir(tmp_path / "run", other)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
