"""Times the speech tokenizer: clips in, sound codes out.

    python benchmarks/speech_tokenizer.py                      against the PyTorch original, on the CPU
    python benchmarks/speech_tokenizer.py --parts              what an encoder layer is made of, by PyTorch and by JAX
    python benchmarks/speech_tokenizer.py --device             on an accelerator: whisper-medium in bfloat16

On the CPU the original's own pipeline (``whisper.log_mel_spectrogram``, Whisper's encoder, ``ichigo``'s
``Quantizer.quantize``; float32) and ``SpeechTokenizerModel.tokenize`` run turn by turn in one process on the same random
weights and the same 30 s clips. On an accelerator whole contexts run in growing batches, and the codes are compared with
those of float32. Prints a table and then the figures as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from side_by_side import load_average, report, turn_by_turn

from ichigo_jax.models.attention import attend
from ichigo_jax.models.declare import cast_params
from ichigo_jax.models.quantizer import QuantizerConfig
from ichigo_jax.models.released import WHISPERS
from ichigo_jax.models.speech_tokenizer import SpeechTokenizerConfig, SpeechTokenizerModel

SECONDS, POSITIONS = 30, 1500
SIZES = ("tiny", "base", "small", "medium")


def tokenizer_config(size: str) -> SpeechTokenizerConfig:
    """A released Whisper's encoder, a decoder of next to nothing, and the quantiser that ichigo has on it."""
    whisper = dataclasses.replace(WHISPERS[size], n_vocab=64, n_text_ctx=8, n_text_layer=1)
    quantizer = QuantizerConfig(
        n_head=whisper.n_audio_head,
        head_width=64,
        ffn_mult=4,
        depth=1,
        vq_codes=2560,
        mask_code=2048,
        num_quantizers=1,
        fsq_levels=None,
        codebook_dim=64,
        downsample=2,
        downsampling="mean",
        positions=1500,
        codebook_decay=0.99,
        threshold_ema_dead_code=0.0,
        laplace_eps=1e-5,
        commitment_weight=1.0,
        statistics_over="all_frames",
        query_mult=2.0,
        rope=True,
        rope_base=10000.0,
        layer_norm_eps=1e-5,
        init_std=1.5,
        embeddings_std=0.045,
    )
    return SpeechTokenizerConfig(whisper, quantizer)


def clips(count: int) -> np.ndarray:
    """Melodies in noise, [B, S]."""
    random = np.random.default_rng(0)
    pitch = (150 + 3000 * random.random((count, SECONDS * 10))).repeat(1600, axis=1)
    voice = np.sin(2 * np.pi * np.cumsum(pitch, axis=1) / 16000)
    return (0.3 * voice + 0.03 * random.normal(size=voice.shape)).astype(np.float32)


def compiled(model: SpeechTokenizerModel, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = cast_params(params, jnp.dtype(dtype))
    run = jax.jit(lambda params, samples, lengths: nnx.merge(graphdef, params, rest).tokenize(samples, lengths))
    return lambda samples: np.asarray(run(params, samples, np.full(len(samples), samples.shape[1], np.int32)))[..., 0]


def original(size: str) -> tuple[Callable[[np.ndarray], np.ndarray], SpeechTokenizerModel]:
    """The PyTorch pipeline, and our model with its weights."""
    import torch
    import whisper

    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))  # only reads files there
    from ichigo.asr.arch.quantizer import Quantizer

    sys.path.append(str(Path(__file__).parents[1] / "tests" / "unit"))
    from reference_weights import quantizer_weights, set_weights, whisper_weights

    config = tokenizer_config(size)
    torch.manual_seed(0)
    dims = {key: value for key, value in dataclasses.asdict(config.whisper).items() if key != "layer_norm_eps"}
    reference = whisper.model.Whisper(whisper.model.ModelDimensions(**dims)).eval()
    torch.nn.init.zeros_(reference.decoder.positional_embedding)  # left as it lay in memory by the constructor
    values = dataclasses.asdict(config.quantizer) | {"q_depth": 1, "use_cosine_sim": True, "mask_embs": True}
    quantizer = Quantizer({"quantizer": values | {"downsample_conv": False, "downsample_mean": True}}).eval()

    def run(samples: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            mel = whisper.log_mel_spectrogram(torch.from_numpy(samples))
            return quantizer.quantize(reference.encoder(mel), mel.shape[-1]).numpy()

    model = nnx.eval_shape(lambda: SpeechTokenizerModel(config, nnx.Rngs(0)))
    set_weights(model.whisper, whisper_weights(reference, config.whisper))
    set_weights(model.quantizer, quantizer_weights(quantizer, config.quantizer))
    return run, model


def against_the_original(sizes: list[str], batches: list[int], repeats: int) -> list[dict]:
    rows = []
    for size in sizes:
        theirs, model = original(size)
        ours = compiled(model, "float32")
        for batch in batches:
            samples = clips(batch)
            same = float((theirs(samples) == ours(samples)).mean())  # the first, untimed turn of both
            their_seconds, our_seconds = turn_by_turn([lambda: theirs(samples), lambda: ours(samples)], repeats)  # noqa: B023
            rows.append(
                {
                    "size": size,
                    "batch": batch,
                    "repeats": repeats,
                    "original_seconds": their_seconds,
                    "our_seconds": our_seconds,
                    "original_clips_per_second": batch / their_seconds,
                    "our_clips_per_second": batch / our_seconds,
                    "times_the_original": their_seconds / our_seconds,
                    "equal_codes": same,
                }
            )
            print(f"{size:8} batch {batch}: {their_seconds:8.3f} s, {our_seconds:8.3f} s", file=sys.stderr, flush=True)
    return rows


def parts_of_a_layer(size: str, repeats: int) -> list[dict]:
    """Nothing that takes time in an encoder's layer is left out but norms and additions."""
    import torch
    from torch.nn import functional

    width, heads = WHISPERS[size].n_audio_state, WHISPERS[size].n_audio_head
    random = np.random.default_rng(0)
    x, up, hidden = (
        random.normal(size=shape).astype(np.float32) for shape in ((POSITIONS, width), (width, 4 * width), (POSITIONS, 4 * width))
    )
    qkv = random.normal(size=(3, 1, POSITIONS, heads, width // heads)).astype(np.float32)
    torch_x, torch_up, torch_hidden = torch.from_numpy(x), torch.from_numpy(up.T.copy()), torch.from_numpy(hidden)
    torch_qkv = [torch.from_numpy(array).transpose(1, 2).contiguous() for array in qkv]
    product, attention, gelu = jax.jit(jnp.dot), jax.jit(attend), jax.jit(lambda x: jax.nn.gelu(x, approximate=False))
    x, up, hidden, qkv = jax.device_put((x, up, hidden, list(qkv)))
    timed = {
        "matrix product": (lambda: functional.linear(torch_x, torch_up), lambda: product(x, up)),
        "attention": (lambda: functional.scaled_dot_product_attention(*torch_qkv), lambda: attention(*qkv)),
        "GELU": (lambda: functional.gelu(torch_hidden), lambda: gelu(hidden)),
    }
    operations = {"matrix product": 8 * POSITIONS * width**2, "attention": 4 * POSITIONS**2 * width}
    rows = []
    for what, (theirs, ours) in timed.items():
        with torch.inference_mode():
            runs = [theirs, lambda: jax.block_until_ready(ours())]  # noqa: B023
            turn_by_turn(runs, 1)
            their_seconds, our_seconds = turn_by_turn(runs, repeats)
        row = {"size": size, "part": what, "repeats": repeats}
        row |= {"pytorch_milliseconds": 1e3 * their_seconds, "jax_milliseconds": 1e3 * our_seconds}
        for library, spent in (("pytorch", their_seconds), ("jax", our_seconds)):
            row[f"{library}_gflops"] = operations[what] / spent / 1e9 if what in operations else ""
        rows.append(row)
    return rows


def on_the_device(sizes: list[str], batches: list[int], repeats: int) -> list[dict]:
    rows = []
    for size in sizes:
        model = SpeechTokenizerModel(tokenizer_config(size), nnx.Rngs(0))
        half, full = compiled(model, "bfloat16"), compiled(model, "float32")
        few = clips(min(batches))
        same = float((half(few) == full(few)).mean())
        for batch in batches:
            samples = jax.device_put(np.resize(few, (batch, few.shape[1])))
            half(samples)
            (spent,) = turn_by_turn([lambda: half(samples)], repeats)  # noqa: B023
            rows.append(
                {
                    "size": size,
                    "batch": batch,
                    "repeats": repeats,
                    "our_seconds": spent,
                    "times_real_time": batch * SECONDS / spent,
                    "codes_equal_to_float32": same,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", action="store_true", help="time an accelerator instead of comparing on the CPU")
    parser.add_argument("--parts", action="store_true", help="time the parts of an encoder layer on the CPU")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="(tiny base medium; with --device medium)")
    parser.add_argument("--batches", nargs="+", type=int, help="clips at a time (1 8; with --device 32 64 128 256)")
    parser.add_argument("--repeats", type=int, default=5, help="turns, of which the median counts (5)")
    arguments = parser.parse_args()
    load = load_average()
    if arguments.device:
        rows = on_the_device(arguments.sizes or ["medium"], arguments.batches or [32, 64, 128, 256], arguments.repeats)
    elif arguments.parts:
        jax.config.update("jax_platforms", "cpu")
        sizes = arguments.sizes or ["tiny", "base", "medium"]
        rows = [row for size in sizes for row in parts_of_a_layer(size, arguments.repeats)]
    else:
        jax.config.update("jax_platforms", "cpu")
        rows = against_the_original(arguments.sizes or ["tiny", "base", "medium"], arguments.batches or [1, 8], arguments.repeats)
    packages = ["jax", "flax"] if arguments.device else ["jax", "flax", "torch", "openai-whisper", "ichigo"]
    report({"rows": rows}, packages, load)


if __name__ == "__main__":
    main()
