"""What the stages of the language model have in common; `llama_pretrain.py` and its siblings say what is their own.

The numbers are those of the released 8B model, from its paper and from the training configs in its torchtune fork: AdamW with
torch's betas (0.9, 0.999) and decay on every parameter, a warm-up from zero, a cosine to zero at the last step, bfloat16, seed
42, a checkpoint every 1000 steps and three of them kept. The configs bound the gradient norm to 1.0 where they bound it.
Attention is the TPU's; on NVIDIA GPUs give `--config.train.attention=cudnn`, elsewhere `=xla`.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from ichigo_jax.configuration import to_dict
from ichigo_jax.errors import InputError
from ichigo_jax.models.released import text_model
from ichigo_jax.training.run_config import import_file, parse_argument

sections = import_file(Path(__file__).parent / "sections.py")

# Of the released models up to v0.4; its 512 codes and the mask code are `extend-vocab --sound-codes 512`.
SPEECH_TOKENIZER = "models/whisper-vq-stoks-v3-7lang"


def extended_model(size: str) -> str:
    """The folder of the text model with sound tokens, as the docstrings' commands name it."""
    return f"models/{text_model(size).name}-sound"


def source(path: str, format: str, column: str | None = None, request: str | None = None, weight: float = 1.0) -> dict:
    return {"path": path, "format": format, "column": column, "request": request, "weight": weight}


def stage(
    size: str,
    *,
    init_from: str,
    speech_tokenizer: str,
    sources: tuple[dict, ...],
    length: int,
    predict: str,
    compressed: bool,
    steps: int,
    batch_size: int,
    accumulation: int,
    examples_per_row: int,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float,
) -> ConfigDict:
    """One stage. ``batch_size`` counts examples; with several to a row, a step has so many fewer rows and parts."""
    model = text_model(size)
    if examples_per_row < 1 or batch_size % examples_per_row:
        raise InputError(f"per_row={examples_per_row} found, expected a divisor of the batch of {batch_size} examples")
    rows = batch_size // examples_per_row
    parts = next(parts for parts in range(max(1, accumulation // examples_per_row), 0, -1) if rows % parts == 0)
    return ConfigDict(
        {
            "task": "language_model",
            "seed": 42,
            "init_from": init_from,
            "model": {"llama": to_dict(model.llama), "adapter": None, "base_dtype": None},
            "data": {
                "length": length,
                "packing": examples_per_row > 1,
                "sound_form": "compressed" if compressed else "plain",
                "speech_tokenizer": speech_tokenizer,
                "chat_date": config_dict.placeholder(str),
                "sources": sources,
                "evaluation": (),
            },
            "objective": {"predict": predict, "loss_chunk": 1024, "z_loss": 0.0},
            "optimizer": sections.optimizer(
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
                decay_to=0.0,
                b2=0.999,
                weight_decay=weight_decay,
                weight_decay_on="all",
            ),
            "train": sections.train(
                steps=steps,
                batch_size=rows,
                accumulation=parts,
                compute_dtype="bfloat16",
                attention="splash",
                remat="full" if model.large else "dots",
            ),
            "mesh": {"data": 1 if model.large else -1, "fsdp": -1 if model.large else 1, "tensor": 1, "context": 1},
            "output": sections.output(log_every=10, checkpoint_every=1000, checkpoints_kept=3),
        }
    )


def conversations_stage(
    argument: str, *, after: str, data: str, steps: int, learning_rate: float, warmup_steps: int
) -> ConfigDict:
    """A stage on conversations, which goes on from the stage ``after``; its arguments are those of `llama_instruct.py`."""
    options = parse_argument(
        argument,
        size="8b",
        init="",
        data=data,
        answers=False,
        task_token="",
        compressed=False,
        speech_tokenizer=SPEECH_TOKENIZER,
        per_row=1,
    )
    return stage(
        options.size,
        init_from=options.init or f"runs/{after}-{options.size}/model",
        speech_tokenizer=options.speech_tokenizer,
        sources=(source(options.data, "conversations", request=options.task_token or None),),
        length=4096,
        predict="answers" if options.answers else "all",
        compressed=options.compressed,
        steps=steps,
        batch_size=256,
        accumulation=8,
        examples_per_row=options.per_row,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=0.005,
    )
