"""Commands on a machine without PyTorch, as ``pip install .`` leaves it: they work and do not complain about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Read by Python at start: no import system finds torch.
NO_TORCH = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def without_torch(cls, name, path=None, target=None):
    return None if name.partition(".")[0] == "torch" else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(without_torch)
"""
COMMANDS = ["train", "evaluate", "generate", "transcribe", "tokenize", "plan", "synthesize", "train_text_tokenizer"]
MODULES = [
    *(f"ichigo_jax.{name}" for name in COMMANDS),
    "converters.__main__",
    "converters.logits",
    "ichigo_jax.inference.assistant",
]


@pytest.fixture
def python(tmp_path):
    """Runs Python without torch: (exit code, standard output, standard error)."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(NO_TORCH)
    kept = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    environment = {**kept, "PYTHONPATH": os.pathsep.join([str(tmp_path / "blocked"), str(ROOT)])}

    def run(*arguments):
        words = [sys.executable, *map(str, arguments)]
        done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return run


def test_transformers_would_complain(python):
    code, _, err = python("-c", "import transformers")
    assert code == 0 and "PyTorch was not found" in err
    assert python("-c", "import torch")[0] != 0


@pytest.mark.parametrize("command", ["ichigo_jax.generate", "ichigo_jax.train", "converters"])
def test_commands_are_silent(python, command):
    code, out, err = python("-m", command, "--help")
    assert (code, err) == (0, "") and "usage" in out


def test_modules_are_silent(python):
    assert python("-c", f"import {', '.join(MODULES)}, transformers") == (0, "", "")


def test_text_works_without_torch(python, tmp_path):
    """A text tokenizer is trained, a chat is rendered and two texts are compared as Whisper does."""
    code = f"""
from ichigo_jax.text import train_llama_tokenizer, TextTokenizer, encode_chat
from ichigo_jax.evaluation.text import exact_fraction
train_llama_tokenizer(["what is it", "it is on"] * 3, {str(tmp_path / "texts")!r}, 270, sound_codes=3, durations=False)
tokenizer = TextTokenizer.from_folder({str(tmp_path / "texts")!r})
print(len(encode_chat(tokenizer, [{{"role": "user", "content": "what"}}], True).ids) > 5)
print(exact_fraction(["it is twenty-one"], ["it's 21"], "whisper-english"))
"""
    assert python("-c", code) == (0, "True\n1.0\n", "")
