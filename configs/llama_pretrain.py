"""Stage 1 of the language model, by the recipe of the released one: to continue speech in sound tokens, in many languages.

    python -m converters import meta-llama/Llama-3.1-8B-Instruct models/llama-3.1-8b-instruct
    python -m converters extend-vocab models/llama-3.1-8b-instruct models/llama-3.1-8b-instruct-sound --sound-codes 512
    python -m ichigo_jax.train --config configs/llama_pretrain.py:8b --workdir runs/llama-pretrain-8b

Arguments:

    8b | 1b | 3b | 70b | qwen0.5b | qwen1.5b | qwen7b | qwen32b     size and family: Llama 3.2, Llama 3.1, Qwen2.5
    init=DIR              the model folder to start from, with sound tokens: models/llama-3.1-8b-instruct-sound and so on
    data=PATH             rows of sound: parquet or JSON lines, a file or a folder (data/pretraining)
    column=NAME           which column holds the sound, as codes or as <|sound_…|> (text, as released)
    compressed            runs of equal codes as a duration and one code; the release's column for that is compress_prompt
    speech_tokenizer=DIR  the one that the sound was made with
    per_row=N             N examples on average share a row of 512; the batch is 480 / N rows. 1: one to a row, as released

The release, Llama 3.1 8B: 16,000 hours of speech in over seven languages, one epoch of 8064 steps of 480 rows of 512 ids on 10
A6000 (12 rows on each, 4 times), 45 hours; learning rate 2e-4 after 50 steps; weight decay 0.005 in the paper, 0.01 in the
config. MMLU falls from 69 to 42 % here and comes back in stage 2.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ichigo_jax.training.run_config import import_file, parse_argument

shared = import_file(Path(__file__).parent / "shared" / "language_model.py")


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(
        argument,
        size="8b",
        init="",
        data="data/pretraining",
        column="text",
        compressed=False,
        speech_tokenizer=shared.SPEECH_TOKENIZER,
        per_row=1,
    )
    return shared.stage(
        options.size,
        init_from=options.init or shared.extended_model(options.size),
        speech_tokenizer=options.speech_tokenizer,
        sources=(shared.source(options.data, "sound", options.column),),
        length=512,
        predict="all",
        compressed=options.compressed,
        steps=8064,
        batch_size=480,
        accumulation=4,
        examples_per_row=options.per_row,
        learning_rate=2e-4,
        warmup_steps=50,
        weight_decay=0.005,
    )
