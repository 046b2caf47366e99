"""A corpus, text tokenizers and sound tokens, made once by the commands that a user would type."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def environment(devices=1):
    """So many CPU devices, and programs that are compiled quickly rather than well."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}


def start(module, *arguments, **options):
    """A command of ours as a process of its own."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        words, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


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
