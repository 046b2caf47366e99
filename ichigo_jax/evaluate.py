"""Measures a model on a manifest of held-out clips and writes metrics and rows as JSON.

    python -m ichigo_jax.evaluate speech-tokenizer --model DIR --output FILE MANIFEST
    python -m ichigo_jax.evaluate assistant --model DIR --speech-tokenizer DIR --output FILE MANIFEST

``speech-tokenizer`` writes every clip down through its codes and compares with the field ``text``: word and character error
rate, and how the codebook is used; of a Whisper by itself the error rates alone. ``assistant`` answers every clip and compares
with the field ``answer``, and asks the language model for the words as well; where rows have a field ``kind``, answers are
counted for each kind too. The output is
{"metrics": {…}, "rows": [{…}, …], "normalizer": …}: the manifest's rows with ``transcription`` and ``reply``. Fields of the
manifest that are called so are kept as ``manifest_transcription`` and ``manifest_reply``. A clip that cannot be used has
``error`` instead and counts in no metric but ``unusable_clips``; the others go on, and the exit code is 1.

Texts are compared as ``--normalizer`` says: ``plain`` (lower case, no punctuation; vowel signs, tones and the signs of numbers
count), or as Whisper does, for figures beside published ones: ``whisper-english`` for English, ``whisper-letters`` for Chinese,
Japanese, Thai, Lao and Burmese, ``whisper-basic`` for the rest. Error rates under two normalisers do not compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from ichigo_jax.arguments import ArgumentParser
from ichigo_jax.data.audio_files import Outcome, Row, for_each_clip, read_manifest, with_other_names
from ichigo_jax.errors import InputError, command, one_line
from ichigo_jax.evaluation.codebook import codebook_statistics
from ichigo_jax.evaluation.normalizers import NORMALIZERS, PLAIN
from ichigo_jax.evaluation.text import error_rates, exact_fraction
from ichigo_jax.inference.assistant import Assistant
from ichigo_jax.inference.clips import MAX_BYTES, MAX_SECONDS
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.inference.plain_whisper import KIND as WHISPER
from ichigo_jax.inference.plain_whisper import PlainWhisper
from ichigo_jax.inference.speech_tokenizer import SpeechTokenizer
from ichigo_jax.storage import STANDARD_OUTPUT, check_output, write_json
from ichigo_jax.storage.model_folder import folder_kind
from ichigo_jax.tasks.checkpoint_model import model_folder
from ichigo_jax.text import encode_chat, transcription_request

LONGEST_ANSWER = 64  # tokens
CLIPS_AT_A_TIME = 16
WORDING = 5  # of the request for a transcription; error rates under another wording do not compare
COLUMNS = ("transcription", "reply", "error")  # of the output's rows, beside the manifest's fields

Found = Iterator[dict[str, Any]]


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m ichigo_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speech-tokenizer", "assistant"))
    parser.add_argument("manifest", metavar="MANIFEST", help="JSON lines with path and text; for assistant also answer")
    parser.add_argument("--model", required=True, metavar="DIR", help="the model folder that is measured")
    parser.add_argument("--step", metavar="N|newest|best", help="--model is a training run's workdir: which checkpoint of it")
    parser.add_argument("--speech-tokenizer", metavar="DIR", help="assistant: the one it was trained with")
    parser.add_argument("--normalizer", choices=NORMALIZERS, default=PLAIN, help=f"how texts are compared ({PLAIN})")
    parser.add_argument("--output", required=True, metavar="FILE", help="a JSON file, replaced if it is there, or -")
    arguments = parser.parse_args(argv)
    check_output(arguments.output, replace=True)
    if arguments.what == "assistant" and arguments.speech_tokenizer is None:
        raise InputError("evaluate assistant needs --speech-tokenizer DIR, the one that the language model was trained with")
    rows = read_manifest(arguments.manifest, ("text",) if arguments.what == "speech-tokenizer" else ("text", "answer"))
    if arguments.what == "assistant":
        check_kinds(arguments.manifest, rows)
    with model_folder(arguments.model, arguments.step) as model:
        if arguments.what == "speech-tokenizer":
            result = evaluate_speech_tokenizer(model, rows, arguments.normalizer)
        else:
            result = evaluate_assistant(model, arguments.speech_tokenizer, rows, arguments.normalizer)
    write_json(arguments.output, result)
    for name, value in result["metrics"].items():
        number = str(value) if isinstance(value, int) else f"{value:.4f}"
        print(f"{one_line(name):24} {number}", file=_beside(arguments.output))
    return 1 if result["metrics"]["unusable_clips"] else 0


def check_kinds(manifest: str, rows: Sequence[Row]) -> None:
    """Refuses a ``kind`` that is no string; a row may have none.

    Raises:
      InputError: naming the first such row.
    """
    for number, row in enumerate(rows, 1):
        kind = row.get("kind")
        if kind is not None and not isinstance(kind, str):
            raise InputError(f"{manifest}: row {number} has kind {kind!r:.60}, expected a string; mend it or leave it out")


def evaluate_speech_tokenizer(model: str, rows: Sequence[Row], normalizer: str = PLAIN) -> dict[str, Any]:
    """``wer``, ``cer``, the codebook's statistics and how often each code (the mask code left out) occurred."""
    if folder_kind(model) == WHISPER:
        return _evaluate_whisper(model, rows, normalizer)
    tokenizer = SpeechTokenizer.from_pretrained(model)
    quantizer = tokenizer.config.quantizer

    def measure(clips: list[np.ndarray]) -> Found:
        for text, codes in zip(tokenizer.transcribe(clips), tokenizer.encode(clips)):
            yield {"transcription": text, "codes": codes.reshape(len(codes), -1)[:, 0]}

    outcomes = _go_over(rows, measure)
    good, rates = _error_rates(outcomes, normalizer)
    counts = np.bincount(np.concatenate([outcome.results["codes"] for outcome in good]), minlength=quantizer.codes)
    if quantizer.mask_code is not None:
        counts = np.delete(counts, quantizer.mask_code)
    metrics = {**rates, **codebook_statistics(counts), **_unusable(outcomes)}
    rows = _output_rows(outcomes, ("transcription",))
    return {"metrics": metrics, "normalizer": normalizer, "code_counts": counts.tolist(), "rows": rows}


def _evaluate_whisper(model: str, rows: Sequence[Row], normalizer: str) -> dict[str, Any]:
    """``wer`` and ``cer`` of a Whisper by itself: what a speech tokenizer on it can reach."""
    whisper = PlainWhisper.from_pretrained(model)

    def measure(clips: list[np.ndarray]) -> Found:
        return ({"transcription": text} for text in whisper.transcribe(clips))

    outcomes = _go_over(rows, measure)
    metrics = {**_error_rates(outcomes, normalizer)[1], **_unusable(outcomes)}
    return {"metrics": metrics, "normalizer": normalizer, "rows": _output_rows(outcomes, ("transcription",))}


def _error_rates(outcomes: Sequence[Outcome], normalizer: str) -> tuple[list[Outcome], dict[str, float]]:
    """The clips that could be used, and the error rates of their transcriptions."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    expected, found = zip(*((outcome.row["text"], outcome.results["transcription"]) for outcome in good))
    return good, error_rates(expected, found, normalizer)


def evaluate_assistant(model: str, speech_tokenizer: str, rows: Sequence[Row], normalizer: str = PLAIN) -> dict[str, Any]:
    """``answers_exact``, the same for each kind of request, and ``wer`` of the language model's own transcriptions."""
    assistant = Assistant(LanguageModel.from_pretrained(model), SpeechTokenizer.from_pretrained(speech_tokenizer))
    language_model = assistant.language_model

    def hear(clips: list[np.ndarray]) -> Found:
        for speech in assistant.hear(clips):
            requests = {"reply": [speech], "transcription": transcription_request(speech, "en", WORDING)}
            yield {name: [{"role": "user", "content": content}] for name, content in requests.items()}

    outcomes = [_checked_length(language_model, outcome) for outcome in _go_over(rows, hear)]
    _refuse_none(outcomes)
    requests = [outcome.results for outcome in outcomes if outcome.error is None]
    texts = {
        name: iter(language_model.answer([request[name] for request in requests], LONGEST_ANSWER))
        for name in ("reply", "transcription")
    }
    outcomes = [
        dataclasses.replace(outcome, results={name: next(text) for name, text in texts.items()})
        if outcome.error is None
        else outcome
        for outcome in outcomes
    ]
    good = [outcome for outcome in outcomes if outcome.error is None]
    replies = [outcome.results["reply"] for outcome in good]
    transcriptions = [outcome.results["transcription"] for outcome in good]
    metrics = {
        "answers_exact": exact_fraction([outcome.row["answer"] for outcome in good], replies, normalizer),
        "wer": error_rates([outcome.row["text"] for outcome in good], transcriptions, normalizer)["wer"],
    }
    kinds = {outcome.row["kind"] for outcome in good if outcome.row.get("kind") is not None}
    for kind in sorted(kinds):
        of_kind = [outcome for outcome in good if outcome.row.get("kind") == kind]
        expected, found = zip(*((outcome.row["answer"], outcome.results["reply"]) for outcome in of_kind))
        metrics[f"answers_exact/{kind}"] = exact_fraction(expected, found, normalizer)
    rows = _output_rows(outcomes, ("transcription", "reply"))
    return {"metrics": metrics | _unusable(outcomes), "normalizer": normalizer, "rows": rows}


def _go_over(rows: Sequence[Row], function: Callable[[list[np.ndarray]], Found]) -> list[Outcome]:
    """Decodes the clips and hands them to ``function``, some at a time; tells of those that cannot be used."""

    def each(clips: Iterable[np.ndarray]) -> Found:
        clips = iter(clips)
        while some := list(itertools.islice(clips, CLIPS_AT_A_TIME)):
            yield from function(some)

    outcomes = list(for_each_clip(rows, each, max_seconds=MAX_SECONDS, max_bytes=MAX_BYTES))
    for outcome in outcomes:
        if outcome.error is not None:
            print(outcome.error, file=sys.stderr)
    _refuse_none(outcomes)
    return outcomes


def _refuse_none(outcomes: Sequence[Outcome]) -> None:
    if all(outcome.error is not None for outcome in outcomes):
        raise InputError(f"none of the {len(outcomes)} clips can be used, the first because of {outcomes[0].error}")


def _checked_length(language_model: LanguageModel, outcome: Outcome) -> Outcome:
    """The same outcome, or its error where the language model cannot take the clip: too long for its context, say."""
    if outcome.error is not None:
        return outcome
    context = language_model.config.llama.max_position_embeddings
    try:
        for conversation in outcome.results.values():
            length = len(encode_chat(language_model.tokenizer, conversation, add_generation_prompt=True).ids)
            if length >= context:
                raise InputError(f"found a request of {length} tokens, expected fewer than the model's context, {context}")
    except InputError as error:
        message = one_line(f"{outcome.row['path']}: {error}")
        print(message, file=sys.stderr)
        return Outcome(outcome.row, error=message)
    return outcome


def _unusable(outcomes: Iterable[Outcome]) -> dict[str, int]:
    return {"unusable_clips": sum(outcome.error is not None for outcome in outcomes)}


def _output_rows(outcomes: Sequence[Outcome], names: Sequence[str]) -> list[Row]:
    """The manifest's rows with what was found, under the ``names``, or with the error."""
    rows = with_other_names([dict(outcome.row) for outcome in outcomes], COLUMNS)
    found = [
        {name: outcome.results[name] for name in names} if outcome.error is None else {"error": outcome.error}
        for outcome in outcomes
    ]
    return [{**row, "path": outcome.path, **new} for row, outcome, new in zip(rows, outcomes, found)]


def _beside(output: str) -> IO[str]:
    """Where the metrics are printed: not into the output itself."""
    return sys.stderr if output in STANDARD_OUTPUT else sys.stdout


if __name__ == "__main__":
    main()
