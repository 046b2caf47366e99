"""Foreign model formats to model folders and back; what a folder or file holds; sound tokens; codebooks grown and merged."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from converters import (
    checkpoints,
    codebook,
    engine,
    extend_vocabulary,
    foreign,
    gguf_language_model,
    language_model,
    lora,
    quantizer,
    speech_tokenizer,
    whisper,
)
from converters.recognise import Recognised, recognise
from converters.safetensors_files import SHARD_BYTES
from ichigo_jax import errors

EXPORTS = {
    language_model.KIND: ("hf", "peft"),
    whisper.KIND: whisper.EXPORTS,
    speech_tokenizer.KIND: (*speech_tokenizer.EXPORTS, *whisper.EXPORTS),
}


def run_import(arguments: argparse.Namespace) -> None:
    found = recognise(arguments.source)
    if found.format == "model folder":
        raise errors.InputError(f"{found.path}: a model folder found, expected a foreign format to import")
    print(f"recognised: {_name(found)}")
    if found.format == checkpoints.FORMAT:
        _import_checkpoint(found, arguments)
        return
    if arguments.step is not None:
        raise errors.InputError(f"--step with {_name(found)} found, expected it with the workdir of a training run only")
    if found.kind != speech_tokenizer.KIND and (arguments.whisper or arguments.set):
        raise errors.InputError(f"--whisper or --set with {_name(found)} found, expected them with a quantiser only")
    if found.format != "peft" and arguments.base:
        raise errors.InputError(f"--base with {_name(found)} found, expected it with an adapter only")
    if found.kind == language_model.KIND and arguments.tokenizer:
        raise errors.InputError(f"--tokenizer with {_name(found)} found, expected it with Whisper only")
    if found.format == "peft":
        notes = _import_adapter(found, arguments)
    elif found.format == "gguf":
        notes = gguf_language_model.import_gguf(found.path, arguments.target, arguments.dtype, arguments.vocab_multiple)
    elif found.kind == language_model.KIND:
        notes = language_model.import_hf(found.path, arguments.target, arguments.dtype, arguments.vocab_multiple)
    elif found.kind == whisper.KIND:
        source = whisper.open_source(found, keeps_dtypes=arguments.dtype is None)
        _print(whisper.describe(source))
        notes = whisper.import_whisper(source, arguments.target, arguments.dtype, arguments.tokenizer)
    else:
        file = speech_tokenizer.open_file(found, quantizer.parse_given(arguments.set), keeps_dtypes=arguments.dtype is None)
        _print(speech_tokenizer.describe_file(file))
        if arguments.whisper is None:
            raise errors.InputError(
                f"{found.path}: a quantiser without its Whisper found; give that by --whisper: {file.whisper}"
            )
        source = whisper.open_source(recognise(arguments.whisper), keeps_dtypes=arguments.dtype is None)
        print(f"recognised: {_name(source.found)}, {whisper.size(source.config)}")
        notes = speech_tokenizer.import_quantizer(file, source, arguments.target, arguments.dtype, arguments.tokenizer)
    for note in notes:
        print(note)
    print(f"written: {arguments.target}")


def _import_checkpoint(found: Recognised, arguments: argparse.Namespace) -> None:
    given = [name for name in ("whisper", "base", "dtype", "tokenizer", "set") if getattr(arguments, name)]
    if given:
        raise errors.InputError(f"--{given[0]} with {_name(found)} found, expected --step only")
    if arguments.step is None:
        raise errors.InputError(f"{found.path}: {_name(found)} found; say which checkpoint: --step N, newest or best")
    for note in checkpoints.import_checkpoint(found.path, arguments.step, arguments.target):
        print(note)
    print(f"written: {arguments.target}")


def _import_adapter(found: Recognised, arguments: argparse.Namespace) -> list[str]:
    if arguments.dtype:
        raise errors.InputError(f"--dtype with {_name(found)} found; the base's dtypes are kept, cast when that is imported")
    return lora.import_peft(found.path, arguments.base, arguments.target)


def run_export(arguments: argparse.Namespace) -> None:
    found = recognise(arguments.source)
    if found.format != "model folder" or found.kind not in EXPORTS:
        raise errors.InputError(f"{found.path}: {_name(found)} found, expected a model folder to export")
    format = arguments.format or _default_format(found)
    if format not in EXPORTS[found.kind]:
        raise errors.InputError(f"--format {format} found, expected one of {', '.join(EXPORTS[found.kind])} for a {found.kind}")
    if format != "peft" and arguments.base:
        raise errors.InputError(f"--base with --format {format} found, expected it with --format peft only")
    if arguments.part and format != "hf":
        raise errors.InputError(f"--part with --format {format} found, expected it with a language model's hf only")
    if format != "hf" or found.kind != language_model.KIND:
        given = [f"--{name.replace('_', '-')}" for name in ("dtype", "max_shard_size") if getattr(arguments, name)]
        if given:
            raise errors.InputError(f"{given[0]} with {_name(found)} found, expected it with a language model's hf only")
    shard_bytes = arguments.max_shard_size or SHARD_BYTES
    print(f"recognised: {_name(found)}")
    if arguments.part:
        files = language_model.export_part(found.path, arguments.target, *_part(arguments.part), shard_bytes, arguments.dtype)
        print(f"written: {len(files)} weight files; the same command without --part ends the export when all parts are there")
        return
    if format == "peft":
        lora.export_peft(found.path, arguments.target, arguments.base)
    elif found.kind == language_model.KIND:
        compare_bytes = int(arguments.compare_up_to * 1e9)
        provenance = language_model.export_hf(found.path, arguments.target, shard_bytes, compare_bytes, arguments.dtype)
        if "export_rounding_logit_diff" in provenance:
            print(f"rounding to {arguments.dtype} changes logits by at most {provenance['export_rounding_logit_diff']:.2g}")
        if "export_not_compared" in provenance:
            print(f"not compared with transformers: {provenance['export_not_compared']}")
        else:
            print(f"same logits in transformers: largest difference {provenance['export_max_abs_logit_diff']:.2g}")
    elif format in whisper.EXPORTS:
        whisper.export_whisper(found, arguments.target, format)
    else:
        speech_tokenizer.export_quantizer(found.path, arguments.target, format)
    print(f"written: {arguments.target} ({format})")


def _part(text: str) -> tuple[int, int]:
    """``"2/4"`` -> 1, 4."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise errors.InputError(f"--part {text} found, expected I/N with 1 <= I <= N")
    return int(part) - 1, int(parts)


def _shard_bytes(text: str) -> int:
    """``"2GB"`` -> 2,000,000,000, as transformers reads it."""
    found = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} found, expected a size such as 2GB, 500MB")
    return int(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")


def _default_format(found: Recognised) -> str:
    """The format that the model was imported from, where that can be written."""
    part = "quantizer" if found.kind == speech_tokenizer.KIND else "whisper"
    format = foreign.read_sections(found.path).get(part, {}).get("format")
    return format if format in EXPORTS[found.kind] else EXPORTS[found.kind][0]


def run_inspect(arguments: argparse.Namespace) -> None:
    found = recognise(arguments.source)
    lines = {"format": found.format, "kind": found.kind}
    if found.format == checkpoints.FORMAT:
        lines |= checkpoints.describe(found.path)
    elif found.format == "peft":
        lines |= lora.describe(found.path)
    elif found.format == "gguf":
        lines |= gguf_language_model.describe(found.path)
    elif found.kind == language_model.KIND:
        lines |= language_model.describe(found.path, found.format) | lora.describe_merged(found.path)
    elif found.kind == whisper.KIND:
        lines |= whisper.describe(whisper.open_source(found, keeps_dtypes=False))
    elif found.kind == speech_tokenizer.KIND and found.format == "model folder":
        lines |= speech_tokenizer.describe_folder(found)
    elif found.kind == speech_tokenizer.KIND:
        given = quantizer.parse_given(arguments.set)
        lines |= speech_tokenizer.describe_file(speech_tokenizer.open_file(found, given, keeps_dtypes=False))
    _print(lines)


def run_grow(arguments: argparse.Namespace) -> None:
    config = codebook.grow(arguments.source, arguments.target, arguments.copies, arguments.noise, arguments.seed)
    _print_codes(config.quantizer)
    print(f"written: {arguments.target}")


def run_merge(arguments: argparse.Namespace) -> None:
    config = codebook.merge(arguments.first, arguments.second, arguments.target)
    _print_codes(config.quantizer)
    print(f"written: {arguments.target}")


def run_extend(arguments: argparse.Namespace) -> None:
    found = recognise(arguments.source)
    if found.kind != language_model.KIND:
        raise errors.InputError(f"{found.path}: {_name(found)} found, expected a language model")
    if found.format not in ("hf", "model folder"):
        raise errors.InputError(
            f"{found.path}: {_name(found)} found, expected a Hugging Face folder or a model folder; import it first"
        )
    print(f"recognised: {_name(found)}")
    extension = extend_vocabulary.Extension(arguments.sound_codes, arguments.duration_tokens, arguments.seed, arguments.noise)
    for line in extend_vocabulary.extend(found, arguments.target, extension, arguments.vocab_multiple):
        print(line)
    print(f"written: {arguments.target}")


def _name(found: Recognised) -> str:
    return f"{found.kind} as {found.format}"


def _print(lines: Mapping[str, str]) -> None:
    for name, value in lines.items():
        print(f"{name}: {value}")


def _print_codes(config: quantizer.QuantizerConfig) -> None:
    print(f"codes: {config.vq_codes}, mask code {config.mask_code}, {config.codes} rows")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m converters", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    multiple_help = (
        "add rows of zeros to a language model's embedding up to a multiple of this, so that a mesh divides them; "
        "no export has them"
    )
    set_help = "a field of the quantiser's config that the file does not say; may be repeated"

    importing = commands.add_parser("import", help="write a model folder from a foreign format")
    importing.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="a Hugging Face folder (Llama 3.x, Qwen2.5, Whisper), a PEFT adapter folder, a GGUF file (Llama 3.x, Qwen2.5), "
        "OpenAI's Whisper (.pt), a faster-whisper folder, WhisperSpeech (.model) or Ichigo (.pth, .ckpt); or, with --step, the "
        "workdir of ichigo_jax.train",
    )
    importing.add_argument("target", metavar="DST", type=Path, help="the model folder to write; must not exist")
    importing.add_argument("--whisper", metavar="SRC2", type=Path, help="the Whisper of a WhisperSpeech or Ichigo file")
    importing.add_argument(
        "--base",
        metavar="DIR",
        type=Path,
        help="the model folder that a PEFT adapter was trained on (default: the one that it names)",
    )
    importing.add_argument("--dtype", choices=[*engine.IMPORT_DTYPES], help="cast the weights (default: as they are)")
    importing.add_argument("--tokenizer", metavar="DIR", type=Path, help="Whisper's text tokenizer, a Hugging Face folder")
    importing.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[], help=set_help)
    importing.add_argument("--vocab-multiple", metavar="N", type=int, default=1, help=multiple_help)
    importing.add_argument(
        "--step", metavar="N|newest|best", help="which checkpoint of a training run, best by its output.checkpoint_best"
    )
    importing.set_defaults(run=run_import)

    exporting = commands.add_parser("export", help="write a foreign format from a model folder")
    exporting.add_argument("source", metavar="SRC", type=Path, help="a model folder")
    exporting.add_argument("target", metavar="DST", type=Path, help="the folder or file to write; must not exist")
    exporting.add_argument(
        "--format",
        choices=sorted({format for formats in EXPORTS.values() for format in formats}),
        help="default: the one that the model was imported from, else hf (ichigo for a speech tokenizer); "
        "hf and openai write a speech tokenizer's Whisper, peft the adapter that a language model was trained with",
    )
    exporting.add_argument("--base", metavar="NAME", help="what a PEFT folder calls its base model")
    exporting.add_argument(
        "--compare-up-to",
        metavar="GB",
        type=float,
        default=language_model.COMPARE_BYTES / 1e9,
        help="a language model that takes more than this in float32 is not run through transformers before it is published; "
        "the comparison holds it in memory (default: %(default)s)",
    )
    exporting.add_argument(
        "--dtype", choices=[*engine.IMPORT_DTYPES], help="round a language model's weights (default: as they are)"
    )
    exporting.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_shard_bytes,
        help="largest weight file of a language model, such as 2GB (default: 5GB)",
    )
    exporting.add_argument(
        "--part",
        metavar="I/N",
        help="write only every N-th weight file of a language model, from the I-th on, as one of N hosts that share a disk; "
        "afterwards export without it",
    )
    exporting.set_defaults(run=run_export)

    inspecting = commands.add_parser("inspect", help="say what a folder or file holds")
    inspecting.add_argument("source", metavar="SRC", type=Path)
    inspecting.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[], help=set_help)
    inspecting.set_defaults(run=run_inspect)

    extending = commands.add_parser("extend-vocab", help="sound tokens for a text model, in a copy of it")
    extending.add_argument("source", metavar="SRC", type=Path, help="a language model's Hugging Face folder or model folder")
    extending.add_argument("target", metavar="DST", type=Path, help="the folder to write, in SRC's format; must not exist")
    extending.add_argument(
        "--sound-codes", type=int, required=True, help="codes of the speech tokenizer, e.g. 512 or 2560; the mask code is added"
    )
    extending.add_argument("--duration-tokens", action="store_true", help="run-length tokens as well")
    extending.add_argument("--seed", type=int, default=0, help="of the new rows' noise (default: %(default)s)")
    extending.add_argument(
        "--noise",
        type=float,
        default=0.05,
        help="new rows are the mean of the old ones and noise of this fraction of their deviation (default: %(default)s)",
    )
    extending.add_argument("--vocab-multiple", metavar="N", type=int, help="of a model folder: " + multiple_help)
    extending.set_defaults(run=run_extend)

    growing = commands.add_parser("grow-codebook", help="copies of a speech tokenizer's codes, with noise")
    growing.add_argument("source", metavar="SRC", type=Path, help="a model folder")
    growing.add_argument("target", metavar="DST", type=Path, help="the model folder to write; must not exist")
    growing.add_argument("--copies", type=int, required=True, help="how often each code is there afterwards")
    growing.add_argument("--noise", type=float, required=True, help="standard deviation; codes are unit vectors")
    growing.add_argument("--seed", type=int, required=True)
    growing.set_defaults(run=run_grow)

    merging = commands.add_parser("merge-codebooks", help="the codes of two speech tokenizers in one")
    merging.add_argument("first", metavar="SRC_A", type=Path, help="a model folder; all but the codes of B is its own")
    merging.add_argument("second", metavar="SRC_B", type=Path, help="a model folder; its mask code is left out")
    merging.add_argument("target", metavar="DST", type=Path, help="the model folder to write; must not exist")
    merging.set_defaults(run=run_merge)
    return parser


@errors.command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
