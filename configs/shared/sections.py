"""The sections that every config has: optimizer, loop and output. A config names what is its own; the rest stands here once."""

from typing import Any

from ml_collections import config_dict


def optimizer(*, learning_rate: float, warmup_steps: int, decay_to: float, b2: float, weight_decay: float, **own: Any) -> dict:
    """AdamW with a warm-up from zero and a cosine; ``own`` are other fields of ``OptimizerConfig``."""
    return {
        "name": "adamw",
        "state_dtype": "float32",
        "learning_rate": learning_rate,
        "linear_rate_width": None,
        "embedding_rate": 1.0,
        "warmup_steps": warmup_steps,
        "warmup_from": 0.0,
        "decay": "cosine",
        "decay_to": decay_to,
        "b1": 0.9,
        "b2": b2,
        "eps": 1e-8,
        "weight_decay": weight_decay,
        "weight_decay_on": "matrices",
        "clip_norm": 1.0,
        "frozen": (),
        **own,
    }


def train(*, steps: int, batch_size: int, **own: Any) -> dict:
    """A batch in one part, all of it in float32; ``own`` are other fields of ``TrainConfig``."""
    return {
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": 1,
        "param_dtype": "float32",
        "compute_dtype": "float32",
        "attention": "xla",
        "remat": "none",
        "stop_after_skipped": 10,
        "roll_backs": 0,
        "spike_factor": config_dict.placeholder(float),
        "spike_window": 64,
        **own,
    }


def output(*, log_every: int, checkpoint_every: int, **own: Any) -> dict:
    """Two checkpoints kept, no evaluation, metrics in files alone; ``own`` are other fields of ``OutputConfig``."""
    return {
        "log_every": log_every,
        "evaluate_every": 0,
        "checkpoint_every": checkpoint_every,
        "checkpoints_kept": 2,
        "checkpoint_kept_every": 0,
        "checkpoint_best": config_dict.placeholder(str),
        "checkpoints_in": config_dict.placeholder(str),
        "tensorboard": False,
        "wandb": config_dict.placeholder(str),
        "stall_seconds": 0.0,
        **own,
    }
