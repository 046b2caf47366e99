"""A language model that writes sound tokens for a text, by the recipes of the released ones: speech data without a voice.

    python -m converters import meta-llama/Llama-3.2-1B-Instruct models/llama-3.2-1b-instruct
    python -m converters extend-vocab models/llama-3.2-1b-instruct models/llama-3.2-1b-instruct-sound --sound-codes 512 \\
        --duration-tokens
    python -m ichigo_jax.tokenize --model models/whisper-vq-stoks-v3-7lang --output data/text_to_sound.parquet list.jsonl
    python -m ichigo_jax.train --config configs/text_to_sound.py:1b,rows=100000 --workdir runs/text-to-sound-1b

Arguments:

    1b | qwen0.5b | qwen1.5b   Llama 3.2 1B (compressed sound), Qwen2.5 0.5B and 1.5B (plain sound)
    rows=N                     how many examples the data has: it makes the steps, three epochs for 1b, one for the others
    data=PATH                  rows of `text` and `tokens`, as `tokenize` writes them from a manifest with texts
    released                   the data are conversations, as released: the text in the user's content, sound in the answer
    everything                 loss on the text as well, as released; otherwise on the sound and its end alone
    init=DIR                   the model folder to start from, with sound tokens: models/llama-3.2-1b-instruct-sound and so on
    speech_tokenizer=DIR       the one that the sound was made with
    per_row=N                  N examples on average share a row

On Llama the text follows the task token of the release, <|reserved_special_token_69|>, which Qwen2.5 does not have.

The releases, of which the configs do not tell the number of GPUs (8 are assumed here, as in stage 2), nor any metric:

    1b         28 rows on each, 512 ids; learning rate 1.5e-4 after 200 steps
    qwen0.5b   16 rows on each, 4 times, 1024 ids; 3e-4 after 48 steps
    qwen1.5b   14 rows on each, 1024 ids; 1.5e-3 after 200 steps

AdamW, cosine to zero, weight decay 0.01, clip 1.0, bfloat16.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from ichigo_jax.errors import InputError
from ichigo_jax.training.run_config import import_file, parse_argument
from ichigo_jax.vocab import RELEASED_TASK_TOKEN

shared = import_file(Path(__file__).parent / "shared" / "language_model.py")


class Recipe(NamedTuple):
    batch_size: int
    accumulation: int
    length: int
    epochs: int
    learning_rate: float
    warmup_steps: int
    compressed: bool
    task_token: str | None


RECIPES = {
    "1b": Recipe(8 * 28, 1, 512, 3, 1.5e-4, 200, True, RELEASED_TASK_TOKEN),
    "qwen0.5b": Recipe(8 * 16 * 4, 4, 1024, 1, 3e-4, 48, False, None),
    "qwen1.5b": Recipe(8 * 14, 1, 1024, 1, 1.5e-3, 200, False, None),
}


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(
        argument,
        size="1b",
        rows=1_000_000,
        data="data/text_to_sound.parquet",
        released=False,
        everything=False,
        init="",
        speech_tokenizer=shared.SPEECH_TOKENIZER,
        per_row=1,
    )
    if options.size not in RECIPES:
        raise InputError(f"size {options.size!r} found, expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[options.size]
    steps = recipe.epochs * options.rows // recipe.batch_size
    if steps <= recipe.warmup_steps:
        raise InputError(
            f"rows={options.rows} found, which make {steps} steps, expected more than the warm-up of {recipe.warmup_steps}"
        )
    format = "conversations" if options.released else "text_to_sound"
    return shared.stage(
        options.size,
        init_from=options.init or shared.extended_model(options.size),
        speech_tokenizer=options.speech_tokenizer,
        sources=(shared.source(options.data, format, request=recipe.task_token),),
        length=recipe.length,
        predict="all" if options.everything else "answers",
        compressed=recipe.compressed,
        steps=steps,
        batch_size=recipe.batch_size,
        accumulation=recipe.accumulation,
        examples_per_row=options.per_row,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        weight_decay=0.01,
    )
