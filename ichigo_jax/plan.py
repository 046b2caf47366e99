"""What a training run would need and how fast it could be, before anything is rented.

    python -m ichigo_jax.plan --config configs/llama_pretrain.py:8b --topology v5e:4x4 [--config.section.field=value …]
    python -m ichigo_jax.plan --config configs/speech_tokenizer.py:medium --topology v5e:2x4 --json

Compiles the real training step for the slice with the TPU compiler (``pip install 'jax[tpu]'``), on a machine without a TPU, and
reads from the compiled program what a chip must hold and move. ``--slices N`` plans for N such slices and the network between
them; ``cpu:N`` and ``gpu:N`` are devices of this machine. The times are a roofline: what arithmetic, main memory, interconnect
and network allow at best when they overlap perfectly, so a real run is slower.
``--search`` tries other meshes, rematerialisation and accumulation and shows what fits, the fastest first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ichigo_jax.arguments import ArgumentParser
from ichigo_jax.errors import InputError, command
from ichigo_jax.planning.plan import described, make_plan
from ichigo_jax.planning.search import search, slowness
from ichigo_jax.planning.topology import topology
from ichigo_jax.training import run_config


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m ichigo_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/FILE.py or configs/FILE.py:ARG")
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5p:2x2x4, v5e:4x4, v6e:4x4, cpu:8, gpu:1")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them, joined by the network (1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--search", action="store_true", help="try meshes, rematerialisation and accumulation")
    arguments, overrides = parser.parse_known_args(argv)
    config = run_config.load(arguments.config, overrides)
    slice = topology(arguments.topology, arguments.slices)
    if arguments.search:
        plans = sorted(search(config, slice), key=slowness)
        if not plans:
            raise InputError(f"{slice.name}: nothing that was tried fits; take a larger slice or a smaller batch")
    else:
        plans = [make_plan(config, slice)]
    if arguments.json:
        found: Any = [dataclasses.asdict(plan) for plan in plans]
        print(json.dumps(found if arguments.search else found[0]))
    else:
        print("\n\n".join(map(described, plans)))


if __name__ == "__main__":
    main()
