"""Times the language model: a training step, and decoding one answer.

    python benchmarks/language_model.py                             against transformers, on the CPU
    python benchmarks/language_model.py --device --dtype-of-state bfloat16 --optimizer adafactor
                                                                    on an accelerator: Llama 3.1 8B's shapes in bfloat16

On the CPU ``transformers`` with ``torch.optim.AdamW`` and this package run turn by turn in one process, in float32, on the
same random weights of a Llama with 103 million parameters. The step is loss, gradients, clipping and AdamW on the same
tokens, and the losses of all steps are compared; decoding is greedy, of one prompt, and the answers are compared. Then come
the same weights in int8 and int4, with how far their logits are off.

On an accelerator the operations that count for utilisation are those that the model needs, not what is computed anew: 6 for
each weight of a matrix and token (the head counted, the embedding not, since it is looked up), and 12 · layers · heads · head
size for each pair of a token and one that it sees, itself or before it in its own segment. Decoding is measured by the bytes
that a step must read: every matrix, and the keys and values so far. Prints tables and then the figures as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from side_by_side import load_average, report, turn_by_turn

from ichigo_jax.data.loading import IGNORE
from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.inference.quantization import quantization_error
from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig, RopeScaling
from ichigo_jax.models.stack import unstack_layers
from ichigo_jax.parallel import make_mesh
from ichigo_jax.parallel.chips import chip_of
from ichigo_jax.tasks import planned_task
from ichigo_jax.train import make_program
from ichigo_jax.training import run_config

ROOT = Path(__file__).parents[1]
PROMPT, ANSWER = 64, 128
FEWER_LAYERS = (32, 24, 16, 12, 8, 4)
SEGMENTS = (1536, 1024, 1024, 512)  # of a packed row


def small() -> LlamaConfig:
    """103 million parameters."""
    scaling = RopeScaling(8.0, 1.0, 4.0, 1024)
    return LlamaConfig("llama", 32000, 640, 2048, 12, 10, 5, 64, 2048, 1e-5, 500000.0, scaling, False, False, 0.02)


def llama_8b(layers: int) -> LlamaConfig:
    """Llama 3.1 8B with the sound tokens of 512 codes, the vocabulary rounded up to a multiple of 128."""
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    return LlamaConfig("llama", 128896, 4096, 14336, layers, 32, 8, 128, 131072, 1e-5, 500000.0, scaling, False, False, 0.02)


def training(llama: LlamaConfig, length: int, overrides: list[str], folder: Path | None, batch: dict) -> Callable[[], float]:
    """A step of ``ichigo_jax.train`` to call again and again; it gives its loss.

    Args:
      llama: the network.
      length: ids in a row.
      overrides: what differs from the nano Llama's training config.
      folder: a model folder with the weights; None: random ones.
      batch: tokens, targets, positions, segment_ids, int32 [B, T].
    """
    rate = ["learning_rate=1e-4", "decay=constant", "warmup_steps=1", "warmup_from=1.0", "weight_decay_on=all"]
    fields = [f"optimizer.{field}" for field in rate] + [f"data.length={length}", f"train.batch_size={len(batch['tokens'])}"]
    config = run_config.load(str(ROOT / "configs" / "nano_llama.py"), [f"--config.{field}" for field in fields + overrides])
    model = {"llama": dataclasses.asdict(llama), "adapter": None, "base_dtype": None}
    config = dataclasses.replace(config, init_from=str(folder), model=model)
    task, mesh = planned_task(config), make_mesh(vars(config.mesh))
    with jax.set_mesh(mesh):
        program = make_program(task, config, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, program.state)
        model = random_model(task.model_config, config.train.param_dtype) if folder is None else task.load_model(folder, mesh)
        state = jax.jit(program.initial_state, out_shardings=shardings)(model)
        del model

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.step(state, batch)
        return float(metrics["loss"])

    return step


def rows_of(tokens: np.ndarray, segments: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A batch of int32 [B, T] as ``data.language.Rows`` lays it out; every row is that many segments."""
    ends = np.cumsum(segments)
    targets = np.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:]
    targets[:, ends - 1] = IGNORE
    every = lambda parts: np.broadcast_to(np.concatenate(parts).astype(np.int32), tokens.shape).copy()  # noqa: E731
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": every([np.arange(size) for size in segments]),
        "segment_ids": every([np.full(size, number + 1) for number, size in enumerate(segments)]),
    }


def random_model(config: LanguageModelConfig, dtype: str) -> Llama:
    """Random weights in ``dtype`` from the start: the real initialisers make them in float32."""
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    normal = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    flat = nnx.to_flat_state(nnx.state(model))
    state = []
    for (path, variable), key in zip(flat, jax.random.split(jax.random.key(0), len(flat))):
        ones = path[-1] == "scale"
        state.append((path, variable.replace(jnp.ones(variable.shape, dtype) if ones else normal(key, variable.shape))))
    nnx.update(model, nnx.from_flat_state(state))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# On the CPU, against transformers
# ---------------------------------------------------------------------------------------------------------------------


def original(llama: LlamaConfig, folder: Path):
    """The ``transformers`` model, random, and its weights as a model folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    fields = dataclasses.asdict(llama)
    scaling = {"rope_type": "llama3", "rope_theta": fields.pop("rope_theta"), **fields.pop("rope_scaling")}
    del fields["architecture"]
    config = transformers.LlamaConfig(**fields, rope_parameters=scaling, bos_token_id=0, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "original")
    command = [sys.executable, "-m", "converters", "import", folder / "original", folder / "ours"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return model, folder / "ours"


def training_rows(model, folder: Path, llama: LlamaConfig, rows: int, length: int, repeats: int) -> list[dict]:
    import torch

    tokens = np.random.default_rng(0).integers(0, llama.vocab_size, (rows, length), np.int32)
    betas = ["optimizer.b1=0.9", "optimizer.b2=0.999", "optimizer.weight_decay=0.01", "data.packing=false"]
    ours = training(llama, length, betas, folder, rows_of(tokens, (length,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    ids = torch.from_numpy(tokens).long()
    model.train()

    def theirs() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    losses: tuple[list[float], list[float]] = ([theirs()], [ours()])  # the first, untimed turn of both
    noted = [lambda: losses[0].append(theirs()), lambda: losses[1].append(ours())]
    their_seconds, our_seconds = turn_by_turn(noted, repeats)
    return [
        {
            "what": f"training step, {rows} x {length} tokens",
            "repeats": repeats,
            "transformers_seconds": their_seconds,
            "our_seconds": our_seconds,
            "transformers_tokens_per_second": tokens.size / their_seconds,
            "our_tokens_per_second": tokens.size / our_seconds,
            "times_transformers": their_seconds / our_seconds,
            "largest_relative_difference_of_losses": float(np.abs(np.divide(*losses) - 1).max()),
        }
    ]


def decoding_rows(model, ours: LanguageModel, prompt: np.ndarray, answer: int, repeats: int) -> list[dict]:
    import torch

    ids = torch.from_numpy(prompt[None]).long()
    model.eval()

    def theirs(count: int) -> list[int]:
        with torch.inference_mode():
            options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    equal = theirs(answer) == ours.generate([prompt], answer)[0]  # the first, untimed turn of both
    theirs(1), ours.generate([prompt], 1)
    runs = [
        lambda: theirs(answer),
        lambda: ours.generate([prompt], answer),
        lambda: theirs(1),
        lambda: ours.generate([prompt], 1),
    ]
    their_seconds, our_seconds, their_first, our_first = turn_by_turn(runs, repeats)
    return [
        {
            "what": f"greedy answer of {answer} tokens to {len(prompt)}",
            "repeats": repeats,
            "transformers_seconds": their_seconds,
            "our_seconds": our_seconds,
            "transformers_tokens_per_second": answer / their_seconds,
            "our_tokens_per_second": answer / our_seconds,
            "times_transformers": their_seconds / our_seconds,
            "transformers_seconds_to_first_token": their_first,
            "our_seconds_to_first_token": our_first,
            "equal_answers": equal,
        }
    ]


def quantized_rows(folder: Path, exact: LanguageModel, prompt: np.ndarray, answer: int, repeats: int) -> list[dict]:
    formats = [("float32", None), ("int8", None), ("int4", 128), ("int4", 32)]
    models = [exact, *(LanguageModel.from_pretrained(folder, quantize=to, group_size=size) for to, size in formats[1:])]
    for model in models:
        model.generate([prompt], answer)
    spent = turn_by_turn([lambda model=model: model.generate([prompt], answer) for model in models], repeats)
    rows, logits = [], exact.logits(prompt[None])
    for (to, group_size), model, taken in zip(formats, models, spent):
        error = quantization_error(logits, model.logits(prompt[None]))
        rows.append(
            {
                "weights": to if group_size is None else f"{to}, groups of {group_size}",
                "megabytes": stored_bytes(model) / 1e6,
                "our_tokens_per_second": answer / taken,
                "relative_logit_error": error.relative,
                "largest_logit_error": error.largest,
                "same_choice": error.same_choice,
            }
        )
    return rows


def stored_bytes(model: LanguageModel) -> int:
    """Of the parameters on the device; four-bit integers lie two in a byte."""
    leaves = jax.tree.leaves(model.arrays)
    program = jax.jit(lambda leaves: [leaf.ravel()[0] for leaf in leaves]).lower(leaves).compile()
    return program.memory_analysis().argument_size_in_bytes


def against_transformers(llama: LlamaConfig, rows: int, length: int, prompt: int, answer: int, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        model, folder = original(llama, Path(scratch))
        ours = LanguageModel.from_pretrained(folder)
        ids = np.random.default_rng(1).integers(0, llama.vocab_size, prompt)
        decoding = decoding_rows(model, ours, ids, answer, repeats)
        quantized = quantized_rows(folder, ours, ids, answer, repeats)
        return {
            "training": training_rows(model, folder, llama, rows, length, repeats),
            "decoding": decoding,
            "quantized": quantized,
        }


# ---------------------------------------------------------------------------------------------------------------------
# On an accelerator
# ---------------------------------------------------------------------------------------------------------------------


def weights_in_matrices(llama: LlamaConfig) -> int:
    """Of the layers and the head; the embedding is looked up, norms are next to nothing."""
    D, N, K, H = llama.hidden_size, llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim
    return llama.num_hidden_layers * (2 * D * (N + K) * H + 3 * D * llama.intermediate_size) + D * llama.vocab_size


def step_flops(llama: LlamaConfig, segments: tuple[int, ...], rows: int) -> float:
    """What the model needs for a forward and a backward pass, counted as the docstring of this file says."""
    pairs = rows * sum(size * (size + 1) // 2 for size in segments)
    attention = 12 * llama.num_hidden_layers * llama.num_attention_heads * llama.head_dim * pairs
    return 6.0 * weights_in_matrices(llama) * rows * sum(segments) + attention


def device_training(layers: tuple[int, ...], rows: int, options: list[str], flops: float, repeats: int) -> list[dict]:
    """The most layers whose state fits."""
    length = sum(SEGMENTS)
    for count in layers:
        llama = llama_8b(count)
        tokens = np.random.default_rng(0).integers(0, llama.vocab_size, (rows, length), np.int32)
        try:
            step = training(llama, length, options, None, rows_of(tokens, SEGMENTS))
            step()
            (spent,) = turn_by_turn([step], repeats)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{count} layers do not fit", file=sys.stderr)
            continue
        chips = jax.device_count()
        return [
            {
                "what": f"training step, {rows} x {length} tokens, {len(SEGMENTS)} segments a row",
                "layers": count,
                "repeats": repeats,
                "our_seconds": spent,
                "tokens_per_second_per_chip": tokens.size / spent / chips,
                "model_flops_utilisation": step_flops(llama, SEGMENTS, rows) / spent / chips / flops,
                "options": " ".join(options),
            }
        ]
    return [{"what": "training step", "layers": f"none of {layers} fit", "options": " ".join(options)}]


def device_decoding(layers: int, bandwidth: float, repeats: int) -> list[dict]:
    llama = llama_8b(layers)
    config = LanguageModelConfig(llama, None, (), llama.vocab_size)
    model = random_model(config, "bfloat16")
    model.layers = unstack_layers(model.layers)
    ours = LanguageModel(model, config, None)
    del model
    prompt = np.random.default_rng(1).integers(0, llama.vocab_size, PROMPT)
    ours.generate([prompt], ANSWER), ours.generate([prompt], 1)
    all_tokens, first = turn_by_turn([lambda: ours.generate([prompt], ANSWER), lambda: ours.generate([prompt], 1)], repeats)
    step = (all_tokens - first) / (ANSWER - 1)
    seen = PROMPT + ANSWER / 2
    cache = 2 * llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim * seen
    read = 2 * (weights_in_matrices(llama) + cache)
    return [
        {
            "what": f"greedy answer of {ANSWER} tokens to {PROMPT}",
            "layers": layers,
            "repeats": repeats,
            "our_tokens_per_second": 1 / step,
            "our_seconds_to_first_token": first,
            "gigabytes_read_per_token": read / 1e9,
            "share_of_bandwidth": read / step / bandwidth,
        }
    ]


def on_the_device(arguments: argparse.Namespace) -> dict:
    kind = jax.devices()[0].device_kind
    chip = chip_of(jax.devices()[0])
    flops, bandwidth = arguments.peak_flops or (chip and chip.flops), arguments.bandwidth or (chip and chip.bandwidth)
    if flops is None or bandwidth is None:
        sys.exit(f"{kind}: its peaks are not known here; give --peak-flops and --bandwidth")
    print(f"{kind}: peak {flops / 1e12:.0f} TFLOP/s in bfloat16, {bandwidth / 1e12:.2f} TB/s of memory\n")
    options = [
        "data.packing=true",
        f"objective.loss_chunk={arguments.loss_chunk}",
        f"optimizer.name={arguments.optimizer}",
        f"optimizer.b1={0.0 if arguments.optimizer == 'adafactor' else 0.9}",
        f"optimizer.state_dtype={arguments.dtype_of_state}",
        f"train.param_dtype={arguments.dtype_of_state}",
        "train.compute_dtype=bfloat16",
        f"train.attention={arguments.attention}",
        f"train.remat={arguments.remat}",
        "mesh.data=1",
        "mesh.fsdp=-1",
    ]
    layers = arguments.layers and (arguments.layers,)
    decoding = device_decoding(arguments.layers or FEWER_LAYERS[0], bandwidth, arguments.repeats)
    training = device_training(layers or FEWER_LAYERS, arguments.rows, options, flops, arguments.repeats)
    return {"training": training, "decoding": decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns, of which the median counts (5)")
    device = parser.add_argument_group("on an accelerator")
    device.add_argument("--device", action="store_true", help="time an accelerator instead of comparing on the CPU")
    device.add_argument("--layers", type=int, help=f"of the 8B model's 32 (the most of {FEWER_LAYERS} that fit)")
    device.add_argument("--rows", type=int, default=1, help="rows of 4096 tokens in a step (1)")
    device.add_argument("--optimizer", choices=["adamw", "adam_mini", "adafactor"], default="adafactor", help="(adafactor)")
    device.add_argument("--dtype-of-state", choices=["float32", "bfloat16"], default="bfloat16", help="(bfloat16)")
    device.add_argument("--attention", choices=["xla", "cudnn", "splash"], default="cudnn", help="(cudnn)")
    device.add_argument("--remat", choices=["none", "dots", "full"], default="full", help="(full)")
    device.add_argument("--loss-chunk", type=int, default=1024, help="tokens whose logits are in memory at a time (1024)")
    device.add_argument("--peak-flops", type=float, help="bfloat16 operations a second (as parallel/chips.py has it)")
    device.add_argument("--bandwidth", type=float, help="bytes of memory a second (as parallel/chips.py has it)")
    arguments = parser.parse_args()
    load = load_average()
    if arguments.device:
        report(on_the_device(arguments), ["jax", "flax"], load)
    else:
        jax.config.update("jax_platforms", "cpu")
        tables = against_transformers(small(), 2, 256, PROMPT, ANSWER, arguments.repeats)
        report(tables, ["jax", "flax", "torch", "transformers"], load)


if __name__ == "__main__":
    main()
