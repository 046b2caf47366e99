"""Asks a language model, in speech or in text, and prints the answer as it is written.

python -m ichigo_jax.generate --model DIR --speech-tokenizer DIR --audio request.wav
python -m ichigo_jax.generate --model DIR --prompt "What is three plus four?"
python -m ichigo_jax.generate --model DIR --quantize int8 --prompt "What is three plus four?"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import ichigo_jax
from ichigo_jax.arguments import ArgumentParser, unicode_text, whole_number
from ichigo_jax.data.folders import on_disk
from ichigo_jax.decoding.sampling import Sampling, check_seed, checked
from ichigo_jax.errors import InputError, command, unicode_only
from ichigo_jax.storage import open_output, write_json_line


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ichigo_jax.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="language-model folder")
    parser.add_argument("--speech-tokenizer", metavar="DIR", help="speech-tokenizer folder, needed with --audio")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--audio", metavar="FILE", help="a spoken request")
    question.add_argument("--prompt", type=unicode_text, metavar="TEXT", help="a written request")
    parser.add_argument("--system", type=unicode_text, metavar="TEXT", help="a system prompt before it")
    parser.add_argument(
        "--max-new-tokens", type=whole_number("length", 1), default=256, metavar="N", help="the longest answer (256)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that reach P (1: all)")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="draw from those P times as likely as the likeliest"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: rather new tokens (1: none)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what to compute in (float32)")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="keep the matrices in few bits (not: in the dtype)")
    parser.add_argument("--group-size", type=int, metavar="N", help="with int4: inputs that share a scale, 64 say")
    parser.add_argument("--allow-other-speech-tokenizer", action="store_true", help="accept one the model was not trained with")
    parser.add_argument("--json", action="store_true", help='print one object {"audio" or "prompt", "text"} instead')
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.audio and not arguments.speech_tokenizer:
        raise InputError("--audio found without --speech-tokenizer; give the folder of the model's speech tokenizer")

    sampling = checked(Sampling(*(getattr(arguments, name) for name in Sampling._fields)))  # before the models are loaded
    check_seed(arguments.seed)
    audio = on_disk(arguments.audio) if arguments.audio else None

    speech_tokenizer = ichigo_jax.SpeechTokenizer.from_pretrained(arguments.speech_tokenizer) if audio else None
    language_model = ichigo_jax.LanguageModel.from_pretrained(
        arguments.model, arguments.dtype, arguments.quantize, arguments.group_size
    )
    assistant = ichigo_jax.Assistant(language_model, speech_tokenizer, arguments.allow_other_speech_tokenizer)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.prompt:
        messages.append({"role": "user", "content": arguments.prompt})
    pieces = assistant.stream(audio, messages, max_new_tokens=arguments.max_new_tokens, sampling=sampling, seed=arguments.seed)
    if arguments.json:
        asked = {"audio": unicode_only(arguments.audio)} if arguments.audio else {"prompt": arguments.prompt}
        with open_output("-") as file:
            write_json_line(file, {**asked, "text": "".join(pieces)})
    else:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
