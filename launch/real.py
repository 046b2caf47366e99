"""Fetches real parts and imports them, by commands each of which a user can type. `bash launch/real.sh --help` tells the steps.

Every step leaves its result under its name only when it is whole, so a second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from child_commands import command
from real_parts.fetch import fetch
from real_parts.manifests import write_manifests
from real_parts.table import MODELS, PARTS, RECORDING_SETS

from ichigo_jax import errors


@errors.command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "steps",
        nargs="*",
        metavar="STEP",
        help="fetch: downloads the parts, checks them, makes manifests of the recordings\n"
        "table: imports the models into PARTS/models\n"
        "all of them, in this order, where none is named",
    )
    parser.add_argument("--parts", type=Path, default=Path("parts"), help="where the parts are (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = [step for step in arguments.steps if step not in STEPS]
    if unknown:
        raise errors.InputError(f"step {unknown[0]!r} found, expected {' or '.join(STEPS)}")
    for step, do in STEPS.items():
        if step in (arguments.steps or STEPS):
            code = do(arguments.parts)
            if code:
                return code
    return 0


def fetch_parts(parts: Path) -> int:
    """The parts and the manifests of their recordings; exit code 2 where a part could not be fetched."""
    faults = fetch(PARTS, parts)
    write_manifests([wanted for wanted in RECORDING_SETS if wanted.part not in faults], parts)
    for fault in faults.values():
        print(f"error: {fault}", file=sys.stderr)
    return 2 if faults else 0


def table(parts: Path) -> int:
    """Imports the models that are not imported yet.

    Raises:
      InputError: a model's part is not there.
    """
    for name in MODELS:
        if not (parts / name).is_dir():
            raise errors.InputError(f"{parts / name}: no such part; run 'bash launch/real.sh fetch' first")
        model = parts / "models" / name
        if not model.exists():
            command("converters", "import", parts / name, model)
    return 0


STEPS = {"fetch": fetch_parts, "table": table}


if __name__ == "__main__":
    main()
