"""Chains the commands of the whole way, each of which a user can type: speech, sound tokens, a language model that answers.

Every stage leaves its result under its name only when it is whole, so a second run skips what is done and goes on with
what is not. Ends with a table, ROOT/summary.json and pictures in ROOT/pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny numbers: shows that every stage runs, not that it learns")
    parser.add_argument("--root", type=Path, help="where everything is written")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    root = arguments.root or Path("runs/quickstart-smoke" if smoke else "runs/quickstart")
    root.mkdir(parents=True, exist_ok=True)
    corpus, tokens, speech_tokenizer, language_model = (
        root / name for name in ("corpus", "tokens", "speech_tokenizer/model", "language_model/model")
    )
    clock = Clock(root / "seconds.json")
    options = f"{',smoke' if smoke else ''},root={root}"
    sizes = (
        ["--utterances", "64", "--heldout-sentences", "8"] if smoke else ["--utterances", "6000", "--heldout-sentences", "100"]
    )
    codes = "33" if smoke else "129"

    with stage(
        clock, "1 corpus", "Speech is synthesised from a small grammar of requests; text tokenizers are trained on its words."
    ):
        if not corpus.exists():
            run("synthesize", "--output", corpus, "--seed", "0", *sizes)
        for family, extra in (("whisper", []), ("llama", ["--sound-codes", codes])):
            folder = root / "text_tokenizers" / family
            if not folder.exists():
                run(
                    "train_text_tokenizer",
                    corpus / "train.jsonl",
                    "--family",
                    family,
                    "--output",
                    folder,
                    "--vocab-size",
                    "640",
                    *extra,
                )

    with stage(
        clock, "2 speech tokenizer", "A nano Whisper learns to write down speech, then does it through 25 codes a second."
    ):
        for name, workdir in (("whisper", root / "whisper"), ("quantizer", root / "speech_tokenizer")):
            run("train", "--config", f"configs/nano_speech_tokenizer.py:{name}{options}", "--workdir", workdir)

    with stage(clock, "3 sound tokens", "The corpus becomes sound tokens."):
        for split in ("train", "heldout", "heldout_voice"):
            output = tokens / f"{split}.parquet"
            if not output.exists():
                run("tokenize", "--model", speech_tokenizer, "--output", output, corpus / f"{split}.jsonl")

    with stage(
        clock, "4 language model", "A nano Llama learns the sound tokens, then to answer and to write down what it hears."
    ):
        for name, workdir in (("pretrain", root / "pretrain"), ("instruct", root / "language_model")):
            run("train", "--config", f"configs/nano_llama.py:{name}{options}", "--workdir", workdir)

    with stage(clock, "5 export", "The language model becomes a Hugging Face folder, which transformers answers from as we do."):
        exported = root / "exported"
        if not exported.exists():
            command("converters", "export", language_model, exported, "--format", "hf")
        comparison = root / "comparison.json"
        if not comparison.exists():
            write_json(comparison, compare_with_transformers(language_model, exported, tokens / "heldout.parquet"))
        show_comparison(read_json(comparison))

    with stage(clock, "6 answers", "Held-out requests are answered from their WAV files."):
        for split in ("heldout", "heldout_voice"):
            manifest = corpus / f"{split}.jsonl"
            for kind, models in (
                ("speech-tokenizer", ["--model", speech_tokenizer]),
                ("assistant", ["--model", language_model, "--speech-tokenizer", speech_tokenizer]),
            ):
                output = root / "evaluation" / f"{kind}.{split}.json"
                if not output.exists():
                    run("evaluate", kind, *models, "--output", output, manifest)
        show_answers(root)

    summary = summarize(root, clock)
    write_json(root / "summary.json", summary)
    draw_pictures(root)
    show_table(root, summary)


class Clock:
    """Seconds spent in each stage, over all runs of the quickstart that it took."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 1)
            write_json(self.path, self.seconds)


@contextlib.contextmanager
def stage(clock: Clock, name: str, purpose: str) -> Iterator[None]:
    print(f"\n== {name}: {purpose}", flush=True)
    with clock.time(name):
        yield


def run(name: str, *arguments: object) -> None:
    command(f"ichigo_jax.{name}", *arguments)


def command(module: str, *arguments: object) -> None:
    """Shows a command as a user would type it, and runs it."""
    words = ["-m", module, *map(str, arguments)]
    print(f"$ python {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the command got it too, and saves what it has
        code = process.wait()
        print("interrupted; the same command goes on from here")
    if code:
        sys.exit(code if code > 0 else 128 - code)


def compare_with_transformers(language_model: Path, exported: Path, rows: Path) -> dict:
    """The answers of both to the same sound tokens, and the largest difference of their logits."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ichigo_jax import LanguageModel
    from ichigo_jax.text import SoundCodes, encode_chat
    from ichigo_jax.vocab import sound_text

    ours = LanguageModel.from_pretrained(language_model)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    answers, difference = [], 0.0
    for row in pq.read_table(rows).slice(0, 8).to_pylist():
        request = [{"role": "user", "content": sound_text(row["tokens"])}]
        prompt = tokenizer.apply_chat_template(request, add_generation_prompt=True, return_dict=False)
        same = encode_chat(ours.tokenizer, [{"role": "user", "content": [SoundCodes(row["tokens"])]}], add_generation_prompt=True)
        assert prompt == same.ids, "the exported chat template and tokenizer give other ids than ours"
        our_answer = ours.generate([prompt], max_new_tokens=32)[0]
        inputs = torch.tensor([prompt])
        with torch.no_grad():
            their_answer = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=32, do_sample=False)
            sequence = [*prompt, *our_answer]
            their_logits = theirs(torch.tensor([sequence])).logits.numpy()
        difference = max(difference, float(np.abs(ours.logits([sequence]) - their_logits).max()))
        their_answer = their_answer[0, len(prompt) :].tolist()
        answers.append(
            {
                "said": row["text"],
                "ichigo_jax": ours.tokenizer.decode(our_answer),
                "transformers": tokenizer.decode(their_answer, skip_special_tokens=True),
                "same_tokens": our_answer == their_answer,
            }
        )
    return {"answers": answers, "export_max_abs_logit_diff": difference}


def show_comparison(comparison: dict) -> None:
    for answer in comparison["answers"][:4]:
        print(
            f"  said {answer['said']!r}\n    ichigo_jax   {answer['ichigo_jax']!r}\n    transformers {answer['transformers']!r}"
        )
    same = sum(answer["same_tokens"] for answer in comparison["answers"])
    print(f"  {same} of {len(comparison['answers'])} answers equal token for token,", end=" ")
    print(f"largest logit difference {comparison['export_max_abs_logit_diff']:.1e}")


def show_answers(root: Path) -> None:
    for split in ("heldout", "heldout_voice"):
        print(f"  {split.replace('_', ' ')}:")
        for row in read_json(root / "evaluation" / f"assistant.{split}.json")["rows"][:6]:
            print(
                f"    said        {row['text']!r}\n    transcribed {row['transcription']!r}\n    answered    {row['reply']!r}\n"
            )


def summarize(root: Path, clock: Clock) -> dict:
    results = {
        (kind, split): read_json(root / "evaluation" / f"{kind}.{split}.json")["metrics"]
        for kind in ("speech-tokenizer", "assistant")
        for split in ("heldout", "heldout_voice")
    }
    comparison = read_json(root / "comparison.json")
    return {
        "tokenizer_wer_heldout": results["speech-tokenizer", "heldout"]["wer"],
        "tokenizer_wer_heldout_voice": results["speech-tokenizer", "heldout_voice"]["wer"],
        "codes_used_fraction": results["speech-tokenizer", "heldout"]["codes_used_fraction"],
        "codebook_perplexity": results["speech-tokenizer", "heldout"]["codebook_perplexity"],
        "answers_exact_heldout": results["assistant", "heldout"]["answers_exact"],
        "answers_exact_heldout_voice": results["assistant", "heldout_voice"]["answers_exact"],
        "export_max_abs_logit_diff": comparison["export_max_abs_logit_diff"],
        "export_answers_equal": all(answer["same_tokens"] for answer in comparison["answers"]),
        "seconds": clock.seconds,
        "seconds_total": round(sum(clock.seconds.values()), 1),
    }


def show_table(root: Path, summary: dict) -> None:
    percent = lambda value: f"{100 * value:.1f} %"  # noqa: E731
    rows = [
        ("", "held-out sentences", "held-out voice"),
        (
            "speech tokenizer, word error rate",
            percent(summary["tokenizer_wer_heldout"]),
            percent(summary["tokenizer_wer_heldout_voice"]),
        ),
        ("answers exact", percent(summary["answers_exact_heldout"]), percent(summary["answers_exact_heldout_voice"])),
        ("codes in use", percent(summary["codes_used_fraction"]), ""),
        ("codebook perplexity", f"{summary['codebook_perplexity']:.1f}", ""),
        ("export, largest logit difference", f"{summary['export_max_abs_logit_diff']:.1e}", ""),
        ("seconds in all", f"{summary['seconds_total']:.0f}", ""),
    ]
    print()
    for left, middle, right in rows:
        print(f"  {left:36}{middle:>20}{right:>20}")
    print(f"\n  {root}/summary.json has these figures, {root}/pictures the losses, the codebook and an utterance.")


def draw_pictures(root: Path) -> None:
    """losses.png, codebook.png and utterance.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from ichigo_jax import SpeechTokenizer
    from ichigo_jax.audio.decode import SAMPLE_RATE, load_audio
    from ichigo_jax.audio.log_mel import log_mel
    from ichigo_jax.storage import read_json_lines

    folder = root / "pictures"
    folder.mkdir(exist_ok=True)

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5), constrained_layout=True)
    for axis, run_name in zip(axes, ("whisper", "speech_tokenizer", "pretrain", "language_model")):
        rows = [row for row in read_json_lines(root / run_name / "metrics.jsonl") if "loss" in row]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows])
        axis.set(title=run_name.replace("_", " "), xlabel="step", ylabel="loss")
    figure.savefig(folder / "losses.png", dpi=110)

    counts = np.asarray(read_json(root / "evaluation" / "speech-tokenizer.heldout.json")["code_counts"])
    figure, axis = plt.subplots(figsize=(10, 3.5), constrained_layout=True)
    axis.bar(np.arange(len(counts)), np.sort(counts)[::-1] / counts.sum())
    axis.set(title="codebook use on held-out sentences", xlabel="codes, most used first", ylabel="share")
    figure.savefig(folder / "codebook.png", dpi=110)

    tokenizer = SpeechTokenizer.from_pretrained(root / "speech_tokenizer" / "model")
    row = read_json_lines(root / "corpus" / "heldout.jsonl")[0]
    audio = load_audio(root / "corpus" / row["path"], max_seconds=30.0, max_bytes=1 << 24)
    codes = tokenizer.encode([audio])[0]
    frames = len(audio) // 160
    mels = tokenizer.config.whisper.n_mels
    mel = np.asarray(log_mel(audio[None], np.array([len(audio)], np.int32), mels=mels, frames=frames))[0]
    seconds = len(audio) / SAMPLE_RATE
    figure, axes = plt.subplots(3, 1, figsize=(11, 7), sharex=True, constrained_layout=True)
    axes[0].plot(np.arange(len(audio)) / SAMPLE_RATE, audio, linewidth=0.5)
    axes[0].set(title=f"“{row['text']}”", ylabel="waveform")
    axes[1].imshow(mel.T, origin="lower", aspect="auto", extent=(0, frames / 100, 0, mels))
    axes[1].set(ylabel="log-mel")
    axes[2].step(np.arange(len(codes) + 1) / 25, [*codes, codes[-1]], where="post")
    for position, code in enumerate(codes):
        axes[2].text(position / 25 + 0.02, code, str(code), fontsize=6, ha="center", va="bottom")
    axes[2].set(ylabel="sound token", xlabel="seconds", xlim=(0, seconds))
    figure.savefig(folder / "utterance.png", dpi=110)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
