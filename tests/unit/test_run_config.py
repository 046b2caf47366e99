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


@pytest.mark.parametrize(
    ("file", "override", "section", "expected"),
    [
        ("nano_speech_tokenizer.py:quantizer", "init_from=null", "", None),
        ("nano_speech_tokenizer.py", "init_from=2026", "", "2026"),
        ("nano_speech_tokenizer.py", "output.wandb=2026", "output", "2026"),
        ("nano_speech_tokenizer.py", "output.checkpoints_in=null", "output", None),
        ("nano_speech_tokenizer.py", "train.spike_factor=3", "train", 3.0),
        ("nano_speech_tokenizer.py", "optimizer.linear_rate_width=64", "optimizer", 64),
        ("nano_speech_tokenizer.py", "objective.kl_weight=1", "objective", 1.0),
        ("llama_pretrain.py", "objective.loss_chunk=null", "objective", None),
        ("llama_pretrain.py", "data.chat_date=2026", "data", "2026"),
        ("nano_llama.py", 'optimizer.frozen=["embedding"]', "optimizer", ("embedding",)),
    ],
)
def test_a_fields_type_says_how_its_override_is_read(file, override, section, expected):
    """Not the value that it has in the config, which may be None or of another of its types."""
    config = load(str(ROOT / "configs" / file), [f"--config.{override}"])
    found = getattr(config, section) if section else config
    name = override.partition("=")[0].split(".")[-1]
    value = found[name] if isinstance(found, dict) else getattr(found, name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output.wandb=[1", None),
        ("optimizer.linear_rate_width=many", "--config.optimizer.linear_rate_width: found 'many', expected int or null"),
        ("train.spike_factor=true", "--config.train.spike_factor: found 'true', expected float or null"),
        ("objective.kl_weight=null", "--config.objective.kl_weight: found 'null', expected float"),
        ("data.sources=many", "--config.data.sources: found 'many', expected a list"),
        ("model.quantizer.codebook_dim=wide", "--config.model.quantizer.codebook_dim: found 'wide', expected int"),
        ("model.quantizer.fsq_levels=8", "--config.model.quantizer.fsq_levels: found '8', expected a list or null"),
    ],
)
def test_what_a_field_cannot_hold_is_refused_with_the_flags_name(override, message):
    if message is None:
        assert load(CONFIG, [f"--config.{override}"]).output.wandb == "[1"
        return
    with pytest.raises(InputError) as error:
        load(CONFIG, [f"--config.{override}"])
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
