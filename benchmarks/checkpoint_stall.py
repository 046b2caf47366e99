"""Measures what saving checkpoints costs the training loop.

    python benchmarks/checkpoint_stall.py            the language model with 103 million parameters, one save in 100 steps
    python benchmarks/checkpoint_stall.py --tiny     a very small one, to see that it runs

The step of ``ichigo_jax.train`` in a loop, each waited for, runs turn by turn without a save and with one in its middle, written
in the background as in training; what is not written when a turn's last step is done is waited for outside of the turn, and told.
``stall`` is how much longer a turn with a save takes, by the medians of all turns, as a share of a turn without; ``blocked`` is
the part of it that the call itself takes, and the rest is steps that are slower while the save is written. The target is a stall
below 2 %. Prints a table and then the figures as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from language_model import ROOT, rows_of, small
from side_by_side import load_average, report, seconds

from ichigo_jax.models.llama import LlamaConfig
from ichigo_jax.parallel import make_mesh
from ichigo_jax.tasks import planned_task
from ichigo_jax.train import make_program
from ichigo_jax.training import run_config
from ichigo_jax.training.checkpoint import Checkpoints


def tiny() -> LlamaConfig:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return dataclasses.replace(small(), **sizes, **heads)


def stall_rows(llama: LlamaConfig, rows: int, length: int, steps: int, repeats: int) -> list[dict]:
    """One row of figures: the loop of ``steps`` steps with and without a save.

    Args:
      llama: the network, of random weights.
      rows, length: ids of a batch.
      steps: from save to save.
      repeats: turns of each kind.
    """
    overrides = [f"--config.data.length={length}", f"--config.train.batch_size={rows}", "--config.data.packing=false"]
    config = run_config.load(str(ROOT / "configs" / "nano_llama.py"), overrides)
    model = {"llama": dataclasses.asdict(llama), "adapter": None, "base_dtype": None}
    config = dataclasses.replace(config, init_from="random", model=model)
    task, mesh = planned_task(config), make_mesh(vars(config.mesh))
    batch = rows_of(np.random.default_rng(0).integers(0, llama.vocab_size, (rows, length), np.int32), (length,))
    spent, blocked, left = [], [], []
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
        program = make_program(task, config, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, program.state)
        make = lambda: program.initial_state(task.make_model(nnx.Rngs(0)))  # noqa: E731
        state = jax.jit(make, out_shardings=shardings)()

        def turn(checkpoints: Checkpoints | None) -> None:
            nonlocal state
            for step in range(steps):
                state, metrics = program.step(state, batch)
                jax.block_until_ready(metrics)
                if checkpoints is not None and step == steps // 2:
                    blocked.append(seconds(checkpoints.save, state, 1, {}, {}))

        turn(None)  # the first, untimed one
        for number in range(repeats):
            folder = Path(scratch) / str(number)
            checkpoints = Checkpoints(folder, kept=1, keep_every=0, best=None)
            spent.append((seconds(turn, None), seconds(turn, checkpoints)))
            left.append(seconds(checkpoints.close))
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            shutil.rmtree(folder)
    without, with_save = (statistics.median(column) for column in zip(*spent))
    return [
        {
            "what": f"{steps} steps of {rows} x {length} tokens, one save",
            "parameters": sum(x.size for x in jax.tree.leaves(program.state.params)),
            "repeats": repeats,
            "megabytes_written": size / 1e6,
            "seconds_without": without,
            "seconds_with": with_save,
            "stall": with_save / without - 1,
            "blocked": statistics.median(blocked) / without,
            "seconds_left_to_write": statistics.median(left),
        }
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="from save to save")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a very small model")
    arguments = parser.parse_args(argv)
    load = load_average()
    llama = tiny() if arguments.tiny else small()
    rows = stall_rows(llama, arguments.rows, arguments.length, arguments.steps, arguments.repeats)
    report({"checkpoint stall": rows}, ("jax", "orbax-checkpoint"), load)


if __name__ == "__main__":
    main()
