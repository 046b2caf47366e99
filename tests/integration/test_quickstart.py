"""The quickstart with tiny numbers: every stage runs, losses fall, the export agrees, a second run has nothing left to do."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.integration.conftest import REPOSITORY, environment, run

pytest.importorskip("torch")
pytest.importorskip("espeakng_loader")


def quickstart(root):
    words = [sys.executable, "launch/quickstart.py", "--smoke", "--root", str(root)]
    return subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("smoke") / "root"
    result = quickstart(root)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return root


def test_summary_has_every_figure(root):
    summary = json.loads((root / "summary.json").read_text())
    for name in (
        "tokenizer_wer_heldout",
        "tokenizer_wer_heldout_voice",
        "codes_used_fraction",
        "codebook_perplexity",
        "answers_exact_heldout",
        "answers_exact_heldout_voice",
        "export_max_abs_logit_diff",
        "seconds_total",
    ):
        assert np.isfinite(summary[name]), name
    assert len(summary["seconds"]) == 6
    assert summary["export_max_abs_logit_diff"] <= 1e-4 and summary["export_answers_equal"]


@pytest.mark.parametrize("stage", ["whisper", "speech_tokenizer", "pretrain", "language_model"])
def test_losses_fall(root, stage):
    rows = map(json.loads, (root / stage / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["losses", "codebook", "utterance"])
def test_pictures_are_drawn(root, name):
    assert (root / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_finds_everything_done(root):
    models = {path: path.stat().st_mtime_ns for path in root.glob("*/model/config.json")}
    start = time.perf_counter()
    assert quickstart(root).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in root.glob("*/model/config.json")} == models
    assert time.perf_counter() - start < 120


def test_generate_answers_from_a_wav_file(root):
    clip = next((root / "corpus" / "audio").glob("heldout-*.wav"))
    models = ["--model", root / "language_model" / "model", "--speech-tokenizer", root / "speech_tokenizer" / "model"]
    code, out, err = run("ichigo_jax.generate", *models, "--audio", clip, "--max-new-tokens", "4", "--json")
    assert code == 0, err
    assert isinstance(json.loads(out.splitlines()[-1]), dict)


def test_another_speech_tokenizer_is_refused(root):
    clip = next((root / "corpus" / "audio").glob("heldout-*.wav"))
    models = ["--model", root / "language_model" / "model", "--speech-tokenizer", root / "whisper" / "model"]
    code, _, err = run("ichigo_jax.generate", *models, "--audio", clip)
    assert code == 2 and "was trained with" in err and err.count("\n") == 1


def test_missing_audio_is_one_line(root):
    model = root / "speech_tokenizer" / "model"
    for module, output in (("tokenize", "-"), ("transcribe", "-")):
        code, _, err = run(f"ichigo_jax.{module}", "--model", model, "--output", output, "nowhere.wav")
        assert code == 2 and err == "error: nowhere.wav: no such file or folder\n"
