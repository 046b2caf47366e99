"""The speech tokenizer by the recipe of the released Ichigo tokenizers: a bottleneck inside a frozen Whisper.

    python -m converters import openai/whisper-medium models/whisper-medium
    python -m ichigo_jax.train --config configs/speech_tokenizer.py:medium,codes=512,phase=1 --workdir runs/medium-512-1
    python -m ichigo_jax.train --config configs/speech_tokenizer.py:medium,codes=512,phase=2,init=runs/medium-512-1/model \\
        --workdir runs/medium-512-2

Phase 1 (50 epochs) also learns from Whisper's own predictions, phase 2 (20 epochs) from the text alone. Arguments:

    medium | tiny | base | small | large-v3 …   which Whisper, in the model folder `whisper=DIR`
    codes=512|1024|2048, q_depth=1              codes of a quantiser, residual quantisers
    downsample=2                                encoder states to a code: 2 makes 25 codes a second, 4 makes 12.5
    fsq                                         finite scalar quantisation in place of a codebook
    phase=1|2, init=DIR                         the model folder to start from: `whisper` unless given, with a new bottleneck
    data=DIR                                    the folder of vivoice/{train,dev}.jsonl and libritts_r/{train,dev}.jsonl

The released 2048 codes start from a 512-code model of seven languages: `python -m converters grow-codebook`, then `init=`.

Hardware of the original: 8 GPUs, 42 clips on each. Its results there, WER in % on LibriSpeech clean/other: 9.79/14.40 with 512
codes, 4.28/9.35 with 2048 + 512 merged; Whisper medium.en itself 2.88/6.04. Batches that do not fit are split by
`--config.train.accumulation=N`.
"""

import math
from pathlib import Path

from ml_collections import ConfigDict

from ichigo_jax.configuration import to_dict
from ichigo_jax.errors import InputError
from ichigo_jax.models.released import WHISPERS
from ichigo_jax.training.run_config import import_file, parse_argument

sections = import_file(Path(__file__).parent / "shared" / "sections.py")

HEAD_WIDTH = 64
CODES = (512, 1024, 2048)
# Of about as many codes, no number of levels below five (Mentzer et al. 2023, table 1).
FSQ_LEVELS = {512: (8, 8, 8), 1024: (8, 5, 5, 5), 2048: (8, 8, 6, 5)}

# Clips, and how often one is drawn: every clip has a weight, a source that of all its clips.
VIVOICE, LIBRITTS_R = (867_772, 0.1), (112_326, 0.9)
BATCH_SIZE = 8 * 42
STEPS_PER_EPOCH = (VIVOICE[0] + LIBRITTS_R[0]) // BATCH_SIZE
EPOCHS = {1: 50, 2: 20}


def get_config(argument: str = "") -> ConfigDict:
    options = parse_argument(
        argument, family="medium", codes=512, q_depth=1, downsample=2, fsq=False, phase=1, whisper="", init="", data="data"
    )
    if options.family not in WHISPERS or options.codes not in CODES or options.phase not in EPOCHS:
        raise InputError(
            f"family {options.family!r}, codes {options.codes}, phase {options.phase} found, expected a family of "
            f"{', '.join(WHISPERS)}; codes of {', '.join(map(str, CODES))}; phase 1 or 2"
        )
    network = WHISPERS[options.family]
    levels = FSQ_LEVELS[options.codes] if options.fsq else None
    codes = math.prod(levels) if levels else options.codes
    whisper = options.whisper or f"models/whisper-{options.family}"
    data = options.data
    return ConfigDict(
        {
            "task": "speech_tokenizer",
            "seed": 0,
            "init_from": options.init or whisper,
            "model": {
                "whisper": to_dict(network),
                "quantizer": {
                    "n_head": network.n_audio_state // HEAD_WIDTH,
                    "head_width": HEAD_WIDTH,
                    "ffn_mult": 4,
                    "depth": 1,
                    "vq_codes": codes,
                    "mask_code": codes,
                    "num_quantizers": options.q_depth,
                    "fsq_levels": levels,
                    "codebook_dim": len(levels) if levels else 64,
                    "downsample": options.downsample,
                    "downsampling": "mean",
                    "positions": network.n_audio_ctx,
                    "codebook_decay": 0.9,
                    "threshold_ema_dead_code": 0.0,
                    "laplace_eps": 1e-5,
                    "commitment_weight": 1.0,
                    "statistics_over": "all_frames",
                    "query_mult": 2.0,
                    "rope": True,
                    "rope_base": 10000.0,
                    "layer_norm_eps": 1e-5,
                    "init_std": 1.5,
                    "embeddings_std": 0.045,
                },
            },
            "data": {
                "text_tokenizer": f"{whisper}/tokenizer",
                "text_length": 200,
                "predict_prompt": True,
                "pad": "audio",
                "normalize": True,
                "concatenate": False,
                "sources": (
                    {"path": f"{data}/vivoice/train.jsonl", "language": "vi", "weight": math.prod(VIVOICE)},
                    {"path": f"{data}/libritts_r/train.jsonl", "language": "en", "weight": math.prod(LIBRITTS_R)},
                ),
                "evaluation": (
                    {"name": "vivoice", "path": f"{data}/vivoice/dev.jsonl", "language": "vi", "limit": 512},
                    {"name": "libritts_r", "path": f"{data}/libritts_r/dev.jsonl", "language": "en", "limit": 512},
                ),
            },
            "objective": {
                "bottleneck": True,
                "kl_weight": 1.0 if options.phase == 1 else 0.0,
                "noise_weight": 0.0,
                "noise_snr_db": (5.0, 20.0),
            },
            "optimizer": sections.optimizer(
                learning_rate=1e-3,
                linear_rate_width=3 * HEAD_WIDTH,
                warmup_steps=500,
                warmup_from=1e-3,
                decay_to=1 / 25,
                b2=0.95,
                weight_decay=1e-3,
                weight_decay_on="all_but_norms_and_embeddings",
                clip_norm=2.0,
                frozen=("whisper",),
            ),
            "train": sections.train(
                steps=EPOCHS[options.phase] * STEPS_PER_EPOCH, batch_size=BATCH_SIZE, compute_dtype="bfloat16", remat="dots"
            ),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1},
            "output": sections.output(log_every=50, evaluate_every=STEPS_PER_EPOCH, checkpoint_every=1000),
        }
    )
