"""The corpus of spoken requests: which sentences, which voices, and the folder they are written to.

``train.jsonl``, ``heldout.jsonl`` (sentences that training never has, by training's voices), ``heldout_voice.jsonl`` (the same
sentences by a voice that training never has), the clips in ``audio/`` and ``corpus.json``, which says what is in it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from ichigo_jax import errors, storage
from ichigo_jax.audio.decode import SAMPLE_RATE
from ichigo_jax.synthesis.espeak import Voice, synthesize
from ichigo_jax.synthesis.spoken_requests import Request, requests

TRAINING_VOICES = [
    Voice("american man", "en-us", "", rate_wpm=190, pitch=50),
    Voice("american woman", "en-us", "f2", rate_wpm=190, pitch=50),
    Voice("english man", "en-gb-x-rp", "m3", rate_wpm=190, pitch=45),
    Voice("scottish woman", "en-gb-scotland", "f4", rate_wpm=190, pitch=55),
]
HELDOUT_VOICE = Voice("english woman", "en-gb-x-rp", "belinda", rate_wpm=190, pitch=50)
RATE_SPREAD = 0.12  # of the voice's rate, either way
PITCH_SPREAD = 12  # of espeak-ng's 0 to 99, either way
CHUNK = 32  # clips that a process is handed at a time


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip to make: where, what is said, and by whom; speed and pitch of the voice are the clip's own."""

    path: str
    request: Request
    voice: Voice


def split_requests(heldout_sentences: int, seed: int) -> tuple[list[Request], list[Request]]:
    """All requests as (training, held out), shuffled; of each fact at most one wording is held out.

    Raises:
      InputError: more sentences to hold out than there are facts.
    """
    everything = requests()
    facts = len({(request.kind, request.answer) for request in everything})
    if not 1 <= heldout_sentences <= facts:
        raise errors.InputError(f"--heldout-sentences: found {heldout_sentences}, expected 1 to {facts}, one for each fact")
    random.Random(seed).shuffle(everything)
    training, heldout = [], {}
    for request in everything:
        fact = (request.kind, request.answer)
        if len(heldout) < heldout_sentences and fact not in heldout:
            heldout[fact] = request
        else:
            training.append(request)
    return training, list(heldout.values())


def write_corpus(output: Path, utterances: int, heldout_sentences: int, seed: int) -> None:
    """Writes the corpus that this module describes as the folder ``output``, which appears when it is whole.

    Args:
      output: a folder that does not exist yet.
      utterances: clips to train on, at least 1; the sentences are gone through again and again, each time by a voice
        drawn anew.
      heldout_sentences: sentences that training does not have.
      seed: of the split and the voices.

    Raises:
      InputError: the folder exists, a number is out of bounds, or there is no espeak-ng.
    """
    if utterances < 1:
        raise errors.InputError(f"--utterances: found {utterances}, expected at least 1")
    storage.check_output(output)
    training, heldout = split_requests(heldout_sentences, seed)
    sets = {
        "train": (itertools.islice(itertools.cycle(training), utterances), TRAINING_VOICES),
        "heldout": (heldout, TRAINING_VOICES),
        "heldout_voice": (heldout, [HELDOUT_VOICE]),
    }
    rng = random.Random(seed)
    clips = {
        name: [
            Clip(f"audio/{name}-{index:05d}.wav", request, _varied(rng.choice(voices), rng)) for index, request in enumerate(said)
        ]
        for name, (said, voices) in sets.items()
    }
    rows = {}
    bar = tqdm(total=sum(map(len, clips.values())), desc="speaking", unit="clip")
    # Processes, since the engine speaks with one voice at a time in each; spawned, since a fork would share its threads.
    pool = ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
    with storage.atomic_write(output) as folder, pool, bar:
        (folder / "audio").mkdir(parents=True)
        for name, planned in clips.items():
            rows[name] = []
            for row in pool.map(functools.partial(_speak, folder), planned, chunksize=CHUNK):
                rows[name].append(row)
                bar.update()
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name]]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        storage.write_json(folder / "corpus.json", _summary(rows, seed))


def _varied(voice: Voice, rng: random.Random) -> Voice:
    """The voice at a speed and pitch drawn around its own."""
    return dataclasses.replace(
        voice,
        rate_wpm=round(voice.rate_wpm * rng.uniform(1 - RATE_SPREAD, 1 + RATE_SPREAD)),
        pitch=round(voice.pitch + rng.uniform(-PITCH_SPREAD, PITCH_SPREAD)),
    )


def _speak(folder: Path, clip: Clip) -> dict[str, Any]:
    """Speaks one clip, writes it, returns its row."""
    samples = synthesize(clip.request.text, clip.voice)
    soundfile.write(folder / clip.path, samples, SAMPLE_RATE, subtype="PCM_16")
    seconds = round(len(samples) / SAMPLE_RATE, 4)
    return {"path": clip.path, "seconds": seconds, **dataclasses.asdict(clip.request), "voice": clip.voice.name}


def _summary(rows: dict[str, list[dict[str, Any]]], seed: int) -> dict[str, Any]:
    """What ``corpus.json`` says."""
    everything = [row for group in rows.values() for row in group]
    words = {word for row in everything for word in row["text"].split()}
    return {
        "seed": seed,
        "utterances": {name: len(group) for name, group in rows.items()},
        "sentences": {name: len({row["text"] for row in group}) for name, group in rows.items()},
        "kinds": dict(sorted(Counter(row["kind"] for row in everything).items())),
        "words": len(words),
        "seconds": round(sum(row["seconds"] for row in everything), 1),
        "longest_seconds": max(row["seconds"] for row in everything),
        "training_voices": [dataclasses.asdict(voice) for voice in TRAINING_VOICES],
        "heldout_voice": dataclasses.asdict(HELDOUT_VOICE),
    }
