"""The installed jaxlib computes right results on CPUs, and builds that do not are mended or refused before the work."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import ichigo_jax
from ichigo_jax import errors, evaluate, generate, jaxlib_faults, plan, tokenize, train, transcribe
from ichigo_jax.errors import InputError

ROOT = Path(__file__).parents[2]
FLAG = jaxlib_faults.FLAG

# jax#39103: 1071645696.0 in place of 32768 squared. jax#40412: a crash.
COMPUTE = """
import jax, jax.numpy as jnp
rows = jnp.stack([jnp.arange(32_769.0), jnp.zeros(32_769), jnp.zeros(32_769)], axis=1)
norms = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
print(float(norms[-1]))
ones = jnp.ones((3, 1, 2, 2, 8, 8, 8))
print(float(jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(ones, ones).sum()))
"""
RIGHT = ["1073741824.0", "6144.0"]

# In place of the metadata of another jaxlib, which no test environment can have beside its own.
PRETEND = """
import importlib.metadata, os
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.10.2" if name == "jaxlib" else real(name)
"""


def python(code, **variables):
    """Runs ``code`` in a process without this one's flags: (exit code, standard output, standard error)."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_installed_jaxlib_computes_right_results():
    """Also under 0.10.2, since the flag is set as every command sets it."""
    code, out, err = python(f"from ichigo_jax import errors; errors.check_jaxlib(){COMPUTE}")
    assert (code, out.split()) == (0, RIGHT), err


@pytest.mark.skipif(importlib.metadata.version("jaxlib") in jaxlib_faults.WRONG_ON_CPUS, reason="known to be wrong")
def test_a_jaxlib_that_is_not_listed_needs_no_flag():
    code, out, err = python(COMPUTE)
    assert (code, out.split()) == (0, RIGHT), err


@pytest.fixture
def version(monkeypatch):
    """Sets the version of jaxlib, the variables and whether JAX has found its devices."""

    def pretend(number, flags=None, platforms=None, started=False):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: {"jaxlib": number}[name])
        monkeypatch.setattr(jaxlib_faults, "_devices_are_known", lambda: started)
        for name, value in {"XLA_FLAGS": flags, "JAX_PLATFORMS": platforms}.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return pretend


@pytest.mark.parametrize(
    ("flags", "then"),
    [
        (None, FLAG),
        ("", FLAG),
        ("--xla_force_host_platform_device_count=8", f"--xla_force_host_platform_device_count=8 {FLAG}"),
        (FLAG, FLAG),
        (f"--a=b {FLAG} --c=d", f"--a=b {FLAG} --c=d"),
        (f"{FLAG}dot {FLAG}", f"{FLAG}dot {FLAG}"),
    ],
)
def test_the_flag_is_set_before_jax_starts(version, flags, then):
    version("0.10.2", flags)
    errors.check_jaxlib()
    errors.check_jaxlib()
    assert os.environ["XLA_FLAGS"] == then


@pytest.mark.parametrize("number", ["0.10.1", "0.11.0", "0.11.2", "0.12.0", "0.10.20"])
@pytest.mark.parametrize("started", [False, True])
def test_right_builds_are_left_alone(version, number, started):
    version(number, started=started)
    errors.check_jaxlib()
    assert "XLA_FLAGS" not in os.environ


@pytest.mark.parametrize(
    ("platforms", "mended"), [("cuda", False), ("tpu", False), ("cpu", True), ("cuda,cpu", True), ("", True)]
)
def test_only_where_cpus_compute(version, platforms, mended):
    version("0.10.2", platforms=platforms)
    errors.check_jaxlib()
    assert (os.environ.get("XLA_FLAGS") == FLAG) == mended


@pytest.mark.parametrize(
    ("flags", "started", "fault"),
    [
        (None, True, f"after JAX has started; set XLA_FLAGS={FLAG} before it does"),
        ("--a=b", True, f"after JAX has started; set XLA_FLAGS={FLAG} before it does"),
        (f"{FLAG}dot", False, f"with XLA_FLAGS={FLAG}dot; leave that flag out"),
        (f"{FLAG} {FLAG}dot", True, f"with XLA_FLAGS={FLAG}dot; leave that flag out"),
    ],
)
def test_what_cannot_be_mended_is_refused(version, flags, started, fault):
    version("0.10.2", flags, started=started)
    with pytest.raises(InputError) as error:
        errors.check_jaxlib()
    found = "jaxlib 0.10.2 found, which computes wrong results on CPUs (jax#39103)"
    assert str(error.value).startswith(found) and fault in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "load",
    [
        lambda: ichigo_jax.SpeechTokenizer.from_pretrained("nowhere"),
        lambda: ichigo_jax.LanguageModel.from_pretrained("nowhere"),
        lambda: ichigo_jax.Assistant(ichigo_jax.LanguageModel.from_pretrained("nowhere"), None),
        lambda: train.train(None, Path("nowhere")),
    ],
)
def test_models_and_training_refuse_it(version, load):
    version("0.10.2", started=True)
    with pytest.raises(InputError, match="jaxlib 0.10.2 found"):
        load()


@pytest.mark.parametrize("command", [evaluate, generate, plan, tokenize, train, transcribe])
def test_commands_say_so_in_one_line(version, command, capsys):
    version("0.10.2", started=True)
    with pytest.raises(SystemExit) as end:
        command.main()
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: jaxlib 0.10.2 found, which computes wrong")


def test_jax_that_has_found_devices_is_told_from_jax_that_is_only_imported():
    code, out, err = python(
        "import jax; from ichigo_jax import jaxlib_faults as faults; print(faults._devices_are_known())\n"
        "jax.devices(); print(faults._devices_are_known())"
    )
    assert (code, out.split()) == (0, ["False", "True"]), err
    assert jax.devices() and jaxlib_faults._devices_are_known()


def test_importing_the_commands_does_not_start_jax():
    """Or the flag would come too late for them."""
    commands = ("train", "transcribe", "tokenize", "generate", "evaluate", "plan", "synthesize")
    names = ", ".join([*(f"ichigo_jax.{name}" for name in commands), "converters.__main__"])
    code, out, err = python(f"{PRETEND}import {names}\nichigo_jax.errors.check_jaxlib(); print(os.environ['XLA_FLAGS'])")
    assert (code, out.strip()) == (0, FLAG), err
