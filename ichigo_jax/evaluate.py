"""Measures a model on a manifest of held-out clips and writes metrics and rows as JSON.

    python -m ichigo_jax.evaluate speech-tokenizer --model DIR --output FILE MANIFEST
    python -m ichigo_jax.evaluate assistant --model DIR --speech-tokenizer DIR --output FILE MANIFEST

``speech-tokenizer`` writes every clip down through its codes and compares with the field ``text``: word and character error
rate, and how the codebook is used. ``assistant`` answers every clip and compares with the field ``answer``, and asks the
language model for the words as well. The output is {"metrics": {…}, "rows": [{…}, …]}.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from ichigo_jax.data.audio_files import read_manifest
from ichigo_jax.errors import InputError, command
from ichigo_jax.evaluation.codebook import codebook_statistics
from ichigo_jax.evaluation.text import error_rates, exact_fraction
from ichigo_jax.inference.assistant import Assistant
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer
from ichigo_jax.storage import write_json
from ichigo_jax.tasks.checkpoint_model import model_folder
from ichigo_jax.text import transcription_request

LONGEST_ANSWER = 64  # tokens


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ichigo_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speech-tokenizer", "assistant"))
    parser.add_argument("manifest", metavar="MANIFEST", help="JSON lines with path and text; for assistant also answer")
    parser.add_argument("--model", required=True, metavar="DIR", help="the model folder that is measured")
    parser.add_argument("--step", metavar="N|newest|best", help="--model is a training run's workdir: which checkpoint of it")
    parser.add_argument("--speech-tokenizer", metavar="DIR", help="assistant: the one it was trained with")
    parser.add_argument("--output", required=True, metavar="FILE", help="a JSON file")
    arguments = parser.parse_args(argv)
    if arguments.what == "assistant" and arguments.speech_tokenizer is None:
        raise InputError("evaluate assistant needs --speech-tokenizer DIR, the one that the language model was trained with")
    rows = read_manifest(arguments.manifest, ("text",) if arguments.what == "speech-tokenizer" else ("text", "answer"))
    with model_folder(arguments.model, arguments.step) as model:
        if arguments.what == "speech-tokenizer":
            result = evaluate_speech_tokenizer(model, rows)
        else:
            result = evaluate_assistant(model, arguments.speech_tokenizer, rows)
    write_json(arguments.output, result)
    for name, value in result["metrics"].items():
        print(f"{name:24} {value:.4f}")


def evaluate_speech_tokenizer(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``wer``, ``cer``, the codebook's statistics and how often each code (the mask code left out) occurred."""
    tokenizer = SpeechTokenizer.from_pretrained(model)
    quantizer = tokenizer.config.quantizer
    paths = [row["path"] for row in rows]
    transcriptions = tokenizer.transcribe(paths)
    codes = np.concatenate([found.reshape(len(found), -1)[:, 0] for found in tokenizer.encode(paths)])
    counts = np.bincount(codes, minlength=quantizer.codes)
    if quantizer.mask_code is not None:
        counts = np.delete(counts, quantizer.mask_code)
    metrics = {**error_rates([row["text"] for row in rows], transcriptions), **codebook_statistics(counts)}
    rows = [{**row, "transcription": text} for row, text in zip(rows, transcriptions)]
    return {"metrics": metrics, "code_counts": counts.tolist(), "rows": rows}


def evaluate_assistant(model: str, speech_tokenizer: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``answers_exact``, the same for each kind of request, and ``wer`` of the language model's own transcriptions."""
    assistant = Assistant(LanguageModel.from_pretrained(model), SpeechTokenizer.from_pretrained(speech_tokenizer))
    heard = assistant.hear([row["path"] for row in rows])

    def ask(contents: list) -> list[str]:
        return assistant.language_model.answer([[{"role": "user", "content": content}] for content in contents], LONGEST_ANSWER)

    replies = ask([[speech] for speech in heard])
    transcriptions = ask([transcription_request(speech, "en", seed=0) for speech in heard])
    done = [{**row, "transcription": text, "reply": reply} for row, text, reply in zip(rows, transcriptions, replies)]
    metrics = {
        "answers_exact": exact_fraction([row["answer"] for row in done], replies),
        "wer": error_rates([row["text"] for row in done], transcriptions)["wer"],
    }
    for kind in sorted({row["kind"] for row in done if "kind" in row}):
        of_kind = [row for row in done if row.get("kind") == kind]
        metrics[f"answers_exact/{kind}"] = exact_fraction([row["answer"] for row in of_kind], [row["reply"] for row in of_kind])
    return {"metrics": metrics, "rows": done}


if __name__ == "__main__":
    main()
