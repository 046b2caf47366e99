"""Stage 2 of the language model, by the recipe of the released one: to answer what it hears, and to write it down.

    python -m ichigo_jax.train --config configs/llama_instruct.py:8b --workdir runs/llama-instruct-8b

Arguments:

    8b | 1b | 3b | 70b | qwen0.5b | qwen1.5b | qwen7b | qwen32b     size and family: Llama 3.2, Llama 3.1, Qwen2.5
    init=DIR              the model folder to start from (runs/llama-pretrain-SIZE/model)
    data=PATH             conversations, with sound tokens inside: parquet or JSON lines, a file or a folder (data/instruction)
    answers               loss on the answers alone; the release has it on everything
    task_token=TOKEN      the token that asks for a transcription in older data, <|reserved_special_token_69|>
    compressed            runs of equal codes as a duration and one code
    speech_tokenizer=DIR  the one that the sound was made with
    per_row=N             N conversations on average share a row of 4096; the batch is 256 / N rows. 1: one to a row, as released

A conversation of speech has some hundred ids, so `per_row=8` does the work of the released step at an eighth of its cost; the
first lines of the run say how many of yours a row holds.

The release, Llama 3.1 8B: 1.89 million conversations (70 % spoken instructions, 20 % transcription, 10 % text), one epoch of
7400 steps of 256, at most 4096 ids, on 8 H100 (4 on each, 8 times), 10 hours; learning rate 7e-5 after 73 steps, weight decay
0.005. MMLU is back at 63 %; stage 3 goes on from here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ichigo_jax.training.run_config import import_file

shared = import_file(Path(__file__).parent / "shared" / "language_model.py")


def get_config(argument: str = "") -> ConfigDict:
    return shared.conversations_stage(
        argument, after="llama-pretrain", data="data/instruction", steps=7400, learning_rate=7e-5, warmup_steps=73
    )
