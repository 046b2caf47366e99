"""A Llama 3.1 in miniature that hears: sound tokens first, then spoken requests and transcriptions.

    python -m ichigo_jax.train --config configs/nano_llama.py:pretrain --workdir runs/quickstart/pretrain
    python -m ichigo_jax.train --config configs/nano_llama.py:instruct --workdir runs/quickstart/language_model

`pretrain` learns to continue sound tokens; `instruct` goes on from it with spoken requests and their answers, and with
transcriptions. `,lora` has it go on by an adapter of rank 16 on all linear layers, with embedding and head in full. `,smoke`
makes it a few steps of a still smaller model; `,root=DIR` is where the sound tokens, the text tokenizers and the first stage
are.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from ichigo_jax.training.run_config import import_file, parse_argument

sections = import_file(Path(__file__).parent / "shared" / "sections.py")


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(argument, stage="pretrain", lora=False, smoke=False, root="runs/quickstart")
    root, instruct = options.root, options.stage == "instruct"
    tokens = f"{root}/tokens/train.parquet"
    config = ConfigDict(
        {
            "task": "language_model",
            "seed": 0,
            "init_from": config_dict.placeholder(str),
            "model": {
                "text_tokenizer": f"{root}/text_tokenizers/llama",
                "vocab_multiple": 8,
                "llama": {
                    "architecture": "llama",
                    "hidden_size": 192,
                    "intermediate_size": 512,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 3,
                    "num_key_value_heads": 1,
                    "head_dim": 64,
                    "max_position_embeddings": 2048,
                    "rms_norm_eps": 1e-5,
                    "rope_theta": 500000.0,
                    "rope_scaling": {
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 1024,
                    },
                    "tie_word_embeddings": False,
                    "attention_bias": False,
                    "initializer_range": 0.05,
                },
            },
            "data": {
                "length": 176,
                "packing": True,
                "sound_form": "plain",
                "speech_tokenizer": f"{root}/speech_tokenizer/model",
                "chat_date": config_dict.placeholder(str),
                "sources": ({"path": tokens, "format": "sound", "column": None, "request": None, "weight": 1.0},),
                "evaluation": (),
            },
            "objective": {"predict": "all", "loss_chunk": config_dict.placeholder(int), "z_loss": 0.0},
            "optimizer": sections.optimizer(learning_rate=1.5e-3, warmup_steps=30, decay_to=0.1, b2=0.98, weight_decay=0.01),
            "train": sections.train(steps=150, batch_size=8),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1},
            "output": sections.output(log_every=20, checkpoint_every=100),
        }
    )
    if instruct:
        config.init_from = f"{root}/pretrain/model"
        config.model = None
        config.data.sources = (
            {"path": tokens, "format": "instruction", "column": None, "request": None, "weight": 0.6},
            {"path": tokens, "format": "transcription", "column": None, "request": "en", "weight": 0.4},
        )
        config.data.evaluation = (
            {"name": "heldout", "path": f"{root}/tokens/heldout.parquet", "limit": 64, "max_new_tokens": 32},
        )
        config.objective.predict = "answers"
        config.train.steps = 1000
        if options.lora:
            adapter = {"rank": 16, "alpha": 32.0, "rslora": False, "targets": ("all",), "train_also": ("embedding", "lm_head")}
            config.model = {"llama": None, "adapter": adapter, "base_dtype": "float32"}
    elif options.smoke:
        config.model.llama.update(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    if options.smoke:
        config.optimizer.warmup_steps = 5
        config.train.update(steps=20, batch_size=8)
        config.output.log_every = 5
    return config
