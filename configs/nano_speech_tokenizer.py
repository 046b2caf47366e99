"""A speech tokenizer small enough to train on two CPU cores, on the corpus of `python -m ichigo_jax.synthesize`.

    python -m ichigo_jax.train --config configs/nano_speech_tokenizer.py:whisper --workdir runs/quickstart/whisper
    python -m ichigo_jax.train --config configs/nano_speech_tokenizer.py:quantizer --workdir runs/quickstart/speech_tokenizer

`whisper` trains a nano Whisper (encoder and decoder) without the bottleneck; `quantizer` goes on from it through the
bottleneck, everything trained together. `,smoke` makes it a few steps of a still smaller model; `,root=DIR` is where the
corpus, the text tokenizers and the first stage are.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from ichigo_jax.training.run_config import import_file, parse_argument

sections = import_file(Path(__file__).parent / "shared" / "sections.py")


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(argument, stage="whisper", smoke=False, root="runs/quickstart")
    root, quantizer = options.root, options.stage == "quantizer"
    config = ConfigDict(
        {
            "task": "speech_tokenizer",
            "seed": 0,
            "init_from": config_dict.placeholder(str),
            "model": {
                "whisper": {
                    "n_mels": 80,
                    "n_audio_ctx": 104,
                    "n_audio_state": 128,
                    "n_audio_head": 2,
                    "n_audio_layer": 2,
                    "n_vocab": 640,
                    "n_text_ctx": 24,
                    "n_text_state": 128,
                    "n_text_head": 2,
                    "n_text_layer": 2,
                    "layer_norm_eps": 1e-5,
                },
                "quantizer": {
                    "n_head": 2,
                    "head_width": 64,
                    "ffn_mult": 4,
                    "depth": 1,
                    "vq_codes": 128,
                    "mask_code": 128,
                    "num_quantizers": 1,
                    "fsq_levels": None,
                    "codebook_dim": 32,
                    "downsample": 2,
                    "downsampling": "mean",
                    "positions": 104,
                    "codebook_decay": 0.9,
                    "threshold_ema_dead_code": 2.0,
                    "laplace_eps": 1e-5,
                    "commitment_weight": 1.0,
                    "statistics_over": "audio_frames",
                    "query_mult": 1.0,
                    "rope": True,
                    "rope_base": 10000.0,
                    "layer_norm_eps": 1e-5,
                    "init_std": 10.0,
                    "embeddings_std": 0.045,
                },
            },
            "data": {
                "text_tokenizer": f"{root}/text_tokenizers/whisper",
                "text_length": 16,
                "predict_prompt": False,
                "pad": "mel",
                "normalize": False,
                "concatenate": False,
                "sources": ({"path": f"{root}/corpus/train.jsonl", "language": "en", "weight": 1.0},),
                "evaluation": ({"name": "heldout", "path": f"{root}/corpus/heldout.jsonl", "language": "en", "limit": 64},),
            },
            "objective": {
                "bottleneck": quantizer,
                "kl_weight": 0.0,
                "noise_weight": 0.0,
                "noise_snr_db": (5.0, 20.0),
            },
            "optimizer": sections.optimizer(
                learning_rate=1.5e-3, warmup_steps=50, decay_to=0.05, b2=0.98, weight_decay=0.01, frozen=("quantizer",)
            ),
            "train": sections.train(steps=640, batch_size=16),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1},
            "output": sections.output(log_every=20, checkpoint_every=100),
        }
    )
    if quantizer:
        config.init_from = f"{root}/whisper/model"
        config.optimizer.frozen = ()
        config.train.steps = 480
    if options.smoke:
        config.model.whisper.update(n_audio_state=64, n_audio_head=1, n_text_state=64, n_text_head=1)
        config.model.quantizer.update(n_head=1, vq_codes=32, mask_code=32)
        config.optimizer.warmup_steps = 5
        config.train.update(steps=20, batch_size=8)
        config.output.log_every = 5
    return config
