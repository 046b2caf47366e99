"""``python -m converters import|export|inspect``: foreign model formats to model folders and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from converters import language_model
from converters.recognise import Recognised, recognise
from ichigo_jax import errors


def run_import(arguments: argparse.Namespace) -> None:
    found = recognise(arguments.source)
    _expect(found, "hf", "import")
    print(f"recognised: {found.kind} in a Hugging Face folder")
    language_model.import_hf(found.path, arguments.target, arguments.dtype)
    print(f"written: {arguments.target}")


def run_export(arguments: argparse.Namespace) -> None:
    found = recognise(arguments.source)
    _expect(found, "model folder", "export")
    print(f"recognised: {found.kind} in a model folder")
    difference = language_model.export_hf(found.path, arguments.target)["export_max_abs_logit_diff"]
    if difference is None:
        print("not compared with transformers: torch or transformers is not installed")
    else:
        print(f"same logits in transformers: largest difference {difference:.2g}")
    print(f"written: {arguments.target}")


def run_inspect(arguments: argparse.Namespace) -> None:
    found = recognise(arguments.source)
    lines = {"format": found.format, "kind": found.kind}
    if found.kind == language_model.KIND:
        lines |= language_model.describe(found.path, found.format)
    for name, value in lines.items():
        print(f"{name}: {value}")


def _expect(found: Recognised, format: str, action: str) -> None:
    if found.format != format or found.kind != language_model.KIND:
        raise errors.InputError(
            f"{found.path}: {found.kind} as {found.format} found, expected {language_model.KIND} as {format} to {action}"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m converters", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    importing = commands.add_parser("import", help="write a model folder from a foreign format")
    importing.add_argument("source", metavar="SRC", type=Path, help="a Hugging Face folder (Llama 3.x, Qwen2.5)")
    importing.add_argument("target", metavar="DST", type=Path, help="the model folder to write; must not exist")
    importing.add_argument("--dtype", choices=[*language_model.DTYPES], help="cast the weights (default: as they are)")
    importing.set_defaults(run=run_import)

    exporting = commands.add_parser("export", help="write a foreign format from a model folder")
    exporting.add_argument("source", metavar="SRC", type=Path, help="a model folder")
    exporting.add_argument("target", metavar="DST", type=Path, help="the folder to write; must not exist")
    exporting.add_argument("--format", choices=["hf"], default="hf", help="default: hf, a Hugging Face folder")
    exporting.set_defaults(run=run_export)

    inspecting = commands.add_parser("inspect", help="say what a folder holds")
    inspecting.add_argument("source", metavar="SRC", type=Path)
    inspecting.set_defaults(run=run_inspect)
    return parser


@errors.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
