"""Stage 3 of the language model, by the recipe of the released one: several turns, and to say so when nothing can be heard.

    python -m ichigo_jax.train --config configs/llama_enhance.py:8b --workdir runs/llama-enhance-8b

The arguments are those of `llama_instruct.py`; `init` is runs/llama-instruct-SIZE/model unless given, `data` data/enhancement.

The release, Llama 3.1 8B: 165,000 conversations of several turns and of noise that is answered by asking again, one epoch of
644 steps of 256, at most 4096 ids, on 8 H100, 3 hours; learning rate 1.5e-5 after 8 steps, weight decay 0.005. Its results:
MMLU 63.79 (v0.3) and 64.63 (v0.4), the text model 69.4; AudioBench OpenHermes 67.8, ALPACA 67.2.
"""

from pathlib import Path

from ml_collections import ConfigDict

from ichigo_jax.training.run_config import import_file

shared = import_file(Path(__file__).parent / "shared" / "language_model.py")


def get_config(argument: str = "") -> ConfigDict:
    return shared.conversations_stage(
        argument, after="llama-instruct", data="data/enhancement", steps=644, learning_rate=1.5e-5, warmup_steps=8
    )
