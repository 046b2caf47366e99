"""The built wheel in an environment of its own, without PyTorch or the repository: the commands a newcomer types work."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An empty folder to work in, and the interpreter that has the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("ichigo_jax", "converters"):  # a copy, since building leaves a folder behind that the next wheel would take
        shutil.copytree(ROOT / name, folder / "source" / name)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / "source")
    source, options = folder / "source", ("-q", "--no-deps", "--no-build-isolation")
    built = [sys.executable, "-m", "pip", "wheel", *options, "-w", folder / "wheels", source]
    subprocess.run([str(word) for word in built], check=True, timeout=300)
    (wheel,) = (folder / "wheels").glob("ichigo_jax-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, f"{wheel}[synthesis]"], check=True, timeout=900)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0
    work = folder / "work"
    work.mkdir()
    return work, python


def run(environment, module, *arguments):
    """What a command prints; it must succeed, without a word of warning."""
    work, python = environment
    words = [str(word) for word in (python, "-m", module, *arguments)]
    done = subprocess.run(words, cwd=work, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("warning", "PyTorch", "Traceback", "libtpu"):
        assert word.lower() not in done.stderr.lower(), done.stderr[-2000:]
    return done.stdout


def test_a_newcomers_commands(environment):
    work, _ = environment
    run(environment, "ichigo_jax.synthesize", "--output", "r/corpus", "--utterances", 64, "--heldout-sentences", 8)
    for family, more in (("whisper", ()), ("llama", ("--sound-codes", 33))):
        texts = ("r/corpus/train.jsonl", "--family", family, "--output", f"r/text_tokenizers/{family}", "--vocab-size", 640)
        run(environment, "ichigo_jax.train_text_tokenizer", *texts, *more)
    speech, language = (f"{ROOT}/configs/{name}.py" for name in ("nano_speech_tokenizer", "nano_llama"))
    tokenizer, model = "r/speech_tokenizer/model", "r/language_model/model"
    for config, stage, workdir in ((speech, "whisper", "whisper"), (speech, "quantizer", "speech_tokenizer")):
        run(environment, "ichigo_jax.train", "--config", f"{config}:{stage},smoke,root=r", "--workdir", f"r/{workdir}")
    for split in ("train", "heldout"):
        rows = ("--output", f"r/tokens/{split}.parquet", f"r/corpus/{split}.jsonl")
        run(environment, "ichigo_jax.tokenize", "--model", tokenizer, *rows)
    for stage, workdir in (("pretrain", "pretrain"), ("instruct", "language_model")):
        run(environment, "ichigo_jax.train", "--config", f"{language}:{stage},smoke,root=r", "--workdir", f"r/{workdir}")
    clip = next((work / "r" / "corpus" / "audio").glob("heldout-*.wav"))
    assert '"text"' in run(environment, "ichigo_jax.transcribe", "--model", tokenizer, clip)
    spoken = ("--speech-tokenizer", tokenizer, "--audio", clip, "--max-new-tokens", 4, "--json")
    assert '"text"' in run(environment, "ichigo_jax.generate", "--model", model, *spoken)
    plan = ("--config", f"{language}:pretrain,smoke,root=r", "--topology", "cpu:1", "--json")
    assert '"peak_bytes_per_chip"' in run(environment, "ichigo_jax.plan", *plan)
    assert "converters" in run(environment, "converters", "--help")
