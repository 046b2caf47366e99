"""The configuration of a training run: from a config file and flags to a checked dataclass, and whose workdir it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from ml_collections import ConfigDict

from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig
from ichigo_jax.parallel import hosts
from ichigo_jax.storage import read_json, write_json, writing
from ichigo_jax.training.language_config import LanguageData, LanguageObjective, NewModel, StartingModel
from ichigo_jax.training.speech_config import SpeechData, SpeechObjective


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or one of its lighter kin, with a warm-up and a decay of the rate.

    Attributes:
      name: "adamw"; "adam_mini", whose second moments are one for each block of a parameter (``optimizer.scale_by_adam_mini``);
        "adafactor", whose second moments are a row and a column (``optimizer.scale_by_adafactor``).
      state_dtype: what moments are kept in; they are computed in float32. A bfloat16 second moment stands still where a step
        changes it by less than a 256th, so b2 should stay below about 0.99 with it.
      learning_rate: the peak.
      linear_rate_width: a linear layer with F inputs learns at ``linear_rate_width / F`` times the rate; None: at the rate.
      embedding_rate: embeddings and learned positions learn at this times the rate.
      warmup_steps: steps from ``warmup_from`` times the peak up to the peak.
      decay: "cosine" down to ``decay_to`` times the peak at the last step, the same for all parameters whatever their own
        peak, or "constant".
      b1: decay of the first moment; Adafactor keeps none where it is 0.
      b2: decay of the second moment; Adafactor's rises to it.
      eps: added to the root of the second moment, by AdamW and Adam-mini.
      weight_decay: AdamW's; on matrices only, on all parameters, or on all but the scales and biases of norms and embeddings.
      clip_norm: bound of the global gradient norm.
      frozen: parameters whose dotted name begins with one of these are not trained.
    """

    name: Literal["adamw", "adafactor", "adam_mini"]
    state_dtype: Literal["float32", "bfloat16"]
    learning_rate: float
    linear_rate_width: int | None
    embedding_rate: float
    warmup_steps: int
    warmup_from: float
    decay: Literal["cosine", "constant"]
    decay_to: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    weight_decay_on: Literal["matrices", "all", "all_but_norms_and_embeddings"]
    clip_norm: float
    frozen: tuple[str, ...]

    def __post_init__(self):
        for name in ("learning_rate", "embedding_rate", "warmup_from", "decay_to", "eps", "weight_decay"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "a finite number, 0 or more")
        for name in ("b1", "b2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "from 0 to less than 1")
        _check(self, "linear_rate_width", self.linear_rate_width is None or self.linear_rate_width > 0, "more than 0, or None")
        _check(self, "warmup_steps", self.warmup_steps >= 0, "0 or more")
        _check(self, "clip_norm", self.clip_norm > 0, "more than 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: optimizer steps of the whole run.
      batch_size: examples a step, over all hosts and accumulation parts together.
      accumulation: parts that a batch is computed in, one after the other.
      param_dtype: what the parameters are kept in; they are updated in float32.
      compute_dtype: what the parameters are cast to for the forward and backward pass.
      attention: back end (``attention.attend``).
      remat: what the backward pass computes anew (``stack.scan_layers``).
      stop_after_skipped: consecutive steps skipped, for a loss or gradient that is not finite or spikes, before the run goes
        back to the last checkpoint before them, and on with the batches after them.
      roll_backs: how often it does; the next time it stops. 0: it stops at once.
      spike_factor: a step whose loss or gradient norm is above this times the median of the last ``spike_window`` steps that were
        not skipped is skipped as well, once there are so many; None: no step is.
      spike_window: losses and gradient norms that are kept for it.
    """

    steps: int
    batch_size: int
    accumulation: int
    param_dtype: Literal["float32", "bfloat16"]
    compute_dtype: Literal["float32", "bfloat16"]
    attention: Literal["xla", "cudnn", "splash"]
    remat: Literal["none", "dots", "full"]
    stop_after_skipped: int
    roll_backs: int
    spike_factor: float | None
    spike_window: int

    def __post_init__(self):
        if self.accumulation < 1 or self.batch_size < 1 or self.batch_size % self.accumulation:
            raise InputError(
                f"batch_size {self.batch_size} with accumulation {self.accumulation} found, expected a positive multiple of it"
            )
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise InputError(f"spike_factor {self.spike_factor} found, expected more than 1 or None")
        if self.spike_window < 1:
            raise InputError(f"spike_window {self.spike_window} found, expected a positive number of steps")
        _check(self, "steps", self.steps >= 1, "at least 1")
        _check(self, "stop_after_skipped", self.stop_after_skipped >= 1, "at least 1")
        _check(self, "roll_backs", self.roll_backs >= 0, "0 or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 is all that are left."""

    data: int
    fsdp: int
    tensor: int
    context: int


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What a run writes and how often, in steps; 0 is never. The last step is always logged, saved and evaluated.

    Attributes:
      checkpoints_kept: how many of the newest stay.
      checkpoint_kept_every: checkpoints of steps that are multiples of it stay for good.
      evaluate_every: a checkpoint is saved before each evaluation.
      checkpoint_best: a metric of an evaluation, or one logged at the steps of checkpoints ("heldout/wer", "loss"): the one
        with the lowest stays as well, after "-" ("-heldout/answers_exact") the one with the highest; None: no such.
      checkpoints_in: the folder of the checkpoints, which all hosts share, or "gs://BUCKET/FOLDER"; None: WORKDIR/checkpoints.
      tensorboard: whether metrics also go to event files in the workdir.
      wandb: the Weights & Biases project that metrics also go to, or None.
      stall_seconds: without a finished step after which the stacks of the run are printed; 0: never.
    """

    log_every: int
    evaluate_every: int
    checkpoint_every: int
    checkpoints_kept: int
    checkpoint_kept_every: int
    checkpoint_best: str | None
    checkpoints_in: str | None
    tensorboard: bool
    wandb: str | None
    stall_seconds: float

    def __post_init__(self):
        if self.stall_seconds < 0:
            raise InputError(f"stall_seconds {self.stall_seconds} found, expected seconds, or 0 for no watching")
        for name in ("log_every", "evaluate_every", "checkpoint_every", "checkpoint_kept_every"):
            _check(self, name, getattr(self, name) >= 0, "a number of steps, or 0 for never")
        _check(self, "checkpoints_kept", self.checkpoints_kept >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that one run of ``train`` does.

    Attributes:
      task: what is trained.
      seed: of initialisation, data order and everything random in the step.
      init_from: a model folder to start from, or None for random parameters.
      model, data, objective: what is built, what it reads, what it minimises, in the task's own fields.
    """

    task: Literal["speech_tokenizer", "language_model"]
    seed: int
    init_from: str | None
    model: Any
    data: Any
    objective: Any
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig
    output: OutputConfig

    def __post_init__(self):
        _check(self, "seed", 0 <= self.seed < SEEDS, f"from 0 to {SEEDS - 1}")


def _check(config: Any, name: str, fine: bool, expected: str) -> None:
    if not fine:
        raise InputError(f"{name} {getattr(config, name)} found, expected {expected}")


SEEDS = 1 << 32  # so many there are: JAX's random keys take no more without 64-bit integers

# A resumed run may be laid out over other devices and may log and save at another pace; anything else is another run.
MAY_CHANGE = ("mesh.", "output.")


# Of each task, what its own sections may hold.
SECTIONS: dict[Any, dict[str, tuple[type, ...]]] = {
    "language_model": {
        "model": (NewModel, StartingModel),
        "data": (LanguageData,),
        "objective": (LanguageObjective,),
    },
    "speech_tokenizer": {
        "model": (SpeechTokenizerConfig,),
        "data": (SpeechData,),
        "objective": (SpeechObjective,),
    },
}


def load(spec: str, overrides: Sequence[str]) -> RunConfig:
    """Reads ``FILE.py[:ARG]``, applies ``--config.a.b=value`` flags and checks every field.

    Raises:
      InputError: no such file, a field that does not exist, a value of the wrong type.
    """
    file, _, argument = spec.partition(":")
    values = _run_file(Path(file), argument).to_dict()
    for override in overrides:
        _override(values, override)
    return configuration.from_dict(RunConfig, values, "config")


def parse_argument(argument: str, **defaults: Any) -> SimpleNamespace:
    """The part after the colon of ``--config FILE.py:ARG``, for config files.

    ``parse_argument("quantizer,smoke,root=here", stage="whisper", smoke=False, root="runs")`` ->
    ``stage="quantizer", smoke=True, root="here"``: a bare word switches on the option of that name, or else is the first
    option's value.

    Raises:
      InputError: an option that ``defaults`` does not have.
    """
    values = dict(defaults)
    for item in filter(None, argument.split(",")):
        name, equals, text = item.partition("=")
        if not equals and isinstance(defaults.get(name), bool):
            values[name] = True
        elif not equals:
            values[next(iter(defaults))] = name
        elif name in defaults and not isinstance(defaults[name], bool):
            values[name] = _parse(text, defaults[name], f"config argument {name}")
        else:
            raise InputError(
                f"config argument {item!r} found, expected one of {', '.join(f'{k}={v}' for k, v in defaults.items())}"
            )
    return SimpleNamespace(**values)


def import_file(path: Path) -> ModuleType:
    """A Python file as a module, wherever it lies: a config, or what configs share.

    Raises:
      InputError: not a Python file.
    """
    spec = importlib.util.spec_from_file_location("ichigo_jax_config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config {path}: expected a Python file with get_config()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_workdir(workdir: Path, config: RunConfig) -> None:
    """Refuses a workdir that belongs to another run or that cannot be written; leaves no trace.

    Raises:
      InputError: another config started this workdir, where the message names the fields that differ; or the workdir, or what
        it lies in, is a file or may not be written.
    """
    try:
        os.lstat(workdir)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise InputError(f"--workdir {workdir}: {error.strerror}; choose another --workdir") from None
    there = next(path for path in (workdir, *workdir.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        raise InputError(f"--workdir {workdir}: {there} is no folder; choose another --workdir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--workdir {workdir}: {there} may not be written by this user; choose another --workdir")
    path = workdir / "config.json"
    if path.exists():
        check_same(read_json(path), config, f"{workdir}: another config started this workdir", "choose another --workdir")


def check_same(before: Mapping[str, Any], config: RunConfig, what: str, remedy: str) -> None:
    """Refuses to go on with what another run began.

    Args:
      before: the config of the run that began it (``as_json``).
      config: of this run.
      what: begins the message.
      remedy: ends it, before "or undo this".

    Raises:
      InputError: a field that may not change differs; the message names those that do.
    """
    was, now = dict(_flat(before)), dict(_flat(as_json(config)))
    changed = [
        f"{name} was {was.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and not name.startswith(MAY_CHANGE)
    ]
    if changed:
        raise InputError(f"{what} ({'; '.join(changed[:8])}); {remedy} or undo this")


def as_json(config: RunConfig) -> dict[str, Any]:
    """All of the config, as ``config.json`` and checkpoints hold it."""
    return json.loads(json.dumps(configuration.to_dict(config)))


def origin(config: RunConfig, workdir: Path, step: int) -> dict[str, Any]:
    """What the provenance of a trained model says of the run and of the step whose parameters it has."""
    return {"trained_by": "ichigo_jax.train", "workdir": str(workdir), "step": step, "config": as_json(config)}


def claim_workdir(workdir: Path, config: RunConfig) -> None:
    """Writes ``workdir/config.json``, which the first of several processes does."""
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        if hosts.is_first():
            write_json(workdir / "config.json", as_json(config))


def _run_file(path: Path, argument: str) -> ConfigDict:
    if not path.is_file():
        raise InputError(f"--config {path}: no such file")
    module = import_file(path)
    if not hasattr(module, "get_config"):
        raise InputError(f"--config {path}: the file defines no get_config()")
    return module.get_config(argument) if argument else module.get_config()


def _override(values: dict[str, Any], flag: str) -> None:
    """Applies ``--config.section.field=value``; the field's type says how the value is read, whatever it held before."""
    name, equals, text = flag.removeprefix("--config.").partition("=")
    if not flag.startswith("--config.") or not equals:
        raise InputError(f"{flag!r} found, expected --config.section.field=value")
    path = name.split(".")
    *sections, field = path
    node: Any = values
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    exists = isinstance(node, dict) and field in node
    is_section = exists and isinstance(node[field], dict)
    if is_section and text == "null":
        node[field] = None
        return
    if not exists or is_section:
        known = ", ".join(key for key, _ in _flat(values))
        raise InputError(f"--config.{name}: no such field; the fields are {known}")
    hint = _field_type(values.get("task"), path)
    where = f"--config.{name}"
    node[field] = _parse(text, node[field], where) if hint is None else configuration.parse(hint, text, where)


def _field_type(task: Any, path: Sequence[str]) -> Any:
    section, *rest = path
    types = (configuration.field_type(cls, rest) for cls in SECTIONS.get(task, {}).get(section, ()) if rest)
    return next((hint for hint in types if hint is not None), configuration.field_type(RunConfig, path))


def _parse(text: str, like: Any, where: str) -> Any:
    if isinstance(like, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if like is None:
        return value
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    expected = (list, tuple) if isinstance(like, list | tuple) else type(like)
    if not isinstance(value, expected) or isinstance(value, bool) != isinstance(like, bool):
        raise InputError(f"{where}: found {text!r}, expected {type(like).__name__}, as in {like!r}")
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
