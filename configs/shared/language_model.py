"""What the stages of the language model have in common; `llama_pretrain.py` and its siblings say what is their own.

The numbers are those of the released 8B model, from its paper and from the training configs in its torchtune fork: AdamW with
torch's betas (0.9, 0.999) and decay on every parameter, a warm-up from zero, a cosine to zero at the last step, bfloat16, seed
42, a checkpoint every 1000 steps and three of them kept. The configs bound the gradient norm to 1.0 where they bound it.
Attention is the TPU's; on NVIDIA GPUs give `--config.train.attention=cudnn`, elsewhere `=xla`.
"""

from ml_collections import ConfigDict, config_dict

from ichigo_jax.errors import InputError
from ichigo_jax.training.run_config import parse_argument

# What a size is trained from, with sound tokens in its vocabulary, and whether it needs more than one chip's memory.
SIZES = {
    "1b": ("llama-3.2-1b-instruct", False),
    "3b": ("llama-3.2-3b-instruct", False),
    "8b": ("llama-3.1-8b-instruct", True),
    "70b": ("llama-3.1-70b-instruct", True),
    "qwen0.5b": ("qwen2.5-0.5b-instruct", False),
    "qwen1.5b": ("qwen2.5-1.5b-instruct", False),
    "qwen7b": ("qwen2.5-7b-instruct", True),
    "qwen32b": ("qwen2.5-32b-instruct", True),
}
# Of each: width, feed-forward, layers, heads, key/value heads, head size, whether the head is the embedding.
DIMENSIONS = {
    "1b": (2048, 8192, 16, 32, 8, 64, True),
    "3b": (3072, 8192, 28, 24, 8, 128, True),
    "8b": (4096, 14336, 32, 32, 8, 128, False),
    "70b": (8192, 28672, 80, 64, 8, 128, False),
    "qwen0.5b": (896, 4864, 24, 14, 2, 64, True),
    "qwen1.5b": (1536, 8960, 28, 12, 2, 128, True),
    "qwen7b": (3584, 18944, 28, 28, 4, 128, False),
    "qwen32b": (5120, 27648, 64, 40, 8, 128, False),
}
# Of the released models up to v0.4; its 512 codes and the mask code are `extend-vocab --sound-codes 512`.
SPEECH_TOKENIZER = "models/whisper-vq-stoks-v3-7lang"


def extended_model(size: str) -> str:
    """The folder of the text model with sound tokens, as the docstrings' commands name it."""
    check_size(size, SIZES)
    return f"models/{SIZES[size][0]}-sound"


def network(size: str) -> dict:
    """What the model folder must hold; of another vocabulary than 512 codes and their mask code make, the folder's own counts."""
    width, feed_forward, layers, heads, kv_heads, head, tied = DIMENSIONS[size]
    qwen = size.startswith("qwen")
    scaling = {
        "factor": 32.0 if size in ("1b", "3b") else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "architecture": "qwen2" if qwen else "llama",
        "vocab_size": 152_180 if qwen else 128_771,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "max_position_embeddings": 32_768 if qwen else 131_072,
        "rms_norm_eps": 1e-6 if qwen else 1e-5,
        "rope_theta": 1_000_000.0 if qwen else 500_000.0,
        "rope_scaling": None if qwen else scaling,
        "tie_word_embeddings": tied,
        "attention_bias": qwen,
        "initializer_range": 0.02,
    }


def check_size(size: str, sizes) -> None:
    if size not in sizes:
        raise InputError(f"size {size!r} found, expected one of {', '.join(sizes)}")


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
    check_size(size, SIZES)
    if examples_per_row < 1 or batch_size % examples_per_row:
        raise InputError(f"per_row={examples_per_row} found, expected a divisor of the batch of {batch_size} examples")
    large = SIZES[size][1]
    rows = batch_size // examples_per_row
    parts = next(parts for parts in range(max(1, accumulation // examples_per_row), 0, -1) if rows % parts == 0)
    return ConfigDict(
        {
            "task": "language_model",
            "seed": 42,
            "init_from": init_from,
            "model": {"llama": network(size), "adapter": None, "base_dtype": None},
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
            "optimizer": {
                "name": "adamw",
                "state_dtype": "float32",
                "learning_rate": learning_rate,
                "linear_rate_width": None,
                "embedding_rate": 1.0,
                "warmup_steps": warmup_steps,
                "warmup_from": 0.0,
                "decay": "cosine",
                "decay_to": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": weight_decay,
                "weight_decay_on": "all",
                "clip_norm": 1.0,
                "frozen": (),
            },
            "train": {
                "steps": steps,
                "batch_size": rows,
                "accumulation": parts,
                "param_dtype": "float32",
                "compute_dtype": "bfloat16",
                "attention": "splash",
                "remat": "full" if large else "dots",
                "stop_after_skipped": 10,
                "roll_backs": 0,
                "spike_factor": None,
                "spike_window": 64,
            },
            "mesh": {"data": 1 if large else -1, "fsdp": -1 if large else 1, "tensor": 1, "context": 1},
            "output": {
                "log_every": 10,
                "evaluate_every": 0,
                "checkpoint_every": 1000,
                "checkpoints_kept": 3,
                "checkpoint_kept_every": 0,
                "checkpoint_best": config_dict.placeholder(str),
                "checkpoints_in": config_dict.placeholder(str),
                "tensorboard": False,
                "wandb": config_dict.placeholder(str),
                "stall_seconds": 0.0,
            },
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
