"""Makes a corpus of spoken requests with text answers: real audio, from espeak-ng.

    python -m ichigo_jax.synthesize --output runs/corpus --utterances 6000 --heldout-sentences 100 --seed 0

Writes ``train.jsonl``, ``heldout.jsonl`` (sentences that training never has, by training's voices),
``heldout_voice.jsonl`` (the same sentences by a voice that training never has), the clips in ``audio/`` (16-bit WAV,
16 kHz) and ``corpus.json`` (what is in it). A row of a manifest:
``{"path": "audio/train-00000.wav", "seconds", "text", "answer", "kind", "voice"}``, the path relative to the manifest.
The same arguments give the same bytes. Needs the extra ``pip install espeakng-loader`` (GPL).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ichigo_jax import errors, storage
from ichigo_jax.arguments import ArgumentParser
from ichigo_jax.synthesis.spoken_corpus import write_corpus

FULL = {"utterances": 6000, "heldout_sentences": 100}
SMOKE = {"utterances": 240, "heldout_sentences": 16}


@errors.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m ichigo_jax.synthesize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="the folder to make; it must not exist")
    parser.add_argument("--utterances", type=int, help=f"clips to train on (default {FULL['utterances']})")
    parser.add_argument("--heldout-sentences", type=int, help=f"sentences held out (default {FULL['heldout_sentences']})")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the voices (default 0)")
    parser.add_argument("--smoke", action="store_true", help=f"a tiny corpus: the defaults become {SMOKE}")
    arguments = parser.parse_args(argv)
    numbers = dict(SMOKE if arguments.smoke else FULL)
    numbers |= {name: given for name in numbers if (given := getattr(arguments, name)) is not None}
    write_corpus(arguments.output, **numbers, seed=arguments.seed)
    summary = storage.read_json(arguments.output / "corpus.json")
    print(
        f"{arguments.output}: {sum(summary['utterances'].values())} clips, {summary['seconds'] / 60:.1f} min, "
        f"{summary['words']} words, longest clip {summary['longest_seconds']:.2f} s"
    )


if __name__ == "__main__":
    main()
