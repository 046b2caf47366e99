"""A corpus, text tokenizers and sound tokens, made once by the commands that a user would type."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@functools.cache
def compiled_programs():
    """A folder in which processes leave what they compiled for those that come after them; goes when the tests end."""
    return tempfile.TemporaryDirectory(prefix="compiled-")


def environment(devices=1):
    """So many CPU devices, and programs that are compiled quickly rather than well, and once."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": compiled_programs().name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def start(module, *arguments, **options):
    """A command of ours as a process of its own."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heeds = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 (a shell's background jobs do not)
    return subprocess.Popen(words, cwd=REPOSITORY, env=environment(), preexec_fn=heeds, **pipes, **options)


def run(module, *arguments):
    """Runs a command to its end: (exit code, standard output, standard error)."""
    process = start(module, *arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="session")
def corpus_root(tmp_path_factory):
    """A quickstart root with ``corpus`` and ``text_tokenizers``."""
    pytest.importorskip("espeakng_loader")
    root = tmp_path_factory.mktemp("quickstart")
    sizes = ["--utterances", "48", "--heldout-sentences", "6", "--seed", "0"]
    assert run("ichigo_jax.synthesize", "--output", root / "corpus", *sizes)[0] == 0
    manifest = root / "corpus" / "train.jsonl"
    tokenizer = ["--output", root / "text_tokenizers" / "whisper", "--vocab-size", "640", "--family", "whisper"]
    assert run("ichigo_jax.train_text_tokenizer", manifest, *tokenizer)[0] == 0
    return root
