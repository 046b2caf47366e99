"""Small byte-level BPE tokenizers for small models, saved as ordinary Hugging Face tokenizer folders.

They treat text as the real ones do (Llama 3's regular expression, then bytes) and have the real ones' special tokens, so a
nano model's folder goes through export, ``transformers`` and vLLM like a released one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ichigo_jax.errors import InputError
from ichigo_jax.storage import atomic_write, read_json, write_json
from ichigo_jax.vocab import sound_vocabulary

BYTES = 256

# How Llama 3 splits text before BPE: English contractions, words with one leading mark or space, up to three digits,
# runs of punctuation, line ends, other space.
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3.1's own, in its order; the numbered reserved ones between and after them are left out.
LLAMA_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)

# Those of Whisper's that an English transcription needs, in its order.
WHISPER_SPECIAL_TOKENS = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")

# A conversation as Llama 3 lays it out: a header with the role, an empty line, the trimmed content, end of turn.
LLAMA_CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)


def train_llama_tokenizer(
    texts: Iterable[str], folder: str | os.PathLike, vocab_size: int, sound_codes: int, durations: bool
) -> None:
    """Trains a tokenizer with Llama 3's special tokens and chat layout, and sound tokens after its last id.

    Args:
      texts: what to learn merges from; the result depends on nothing else.
      folder: where the tokenizer folder is written, whole.
      vocab_size: BPE entries without special and sound tokens, at least 256; fewer when the texts have no more to merge.
      sound_codes: codes of the speech tokenizer, the mask code included.
      durations: whether the run-length tokens are added as well.

    Raises:
      InputError: no texts, a vocabulary of fewer than 256 entries, or a folder that exists.
    """
    backend = _train_bpe(texts, vocab_size)
    _add_special(backend, LLAMA_SPECIAL_TOKENS)
    _add_special(backend, sound_vocabulary(sound_codes, durations))
    bos = "<|begin_of_text|>"
    begin = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    save_tokenizer(
        backend,
        folder,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=LLAMA_CHAT_TEMPLATE,
    )


def train_whisper_tokenizer(texts: Iterable[str], folder: str | os.PathLike, vocab_size: int) -> None:
    """Trains a tokenizer with Whisper's special tokens; arguments and errors as ``train_llama_tokenizer``."""
    backend = _train_bpe(texts, vocab_size)
    _add_special(backend, WHISPER_SPECIAL_TOKENS)
    save_tokenizer(backend, folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    texts = list(texts)
    if not any(texts):
        raise InputError("no text found to train a tokenizer on, expected at least one line")
    if vocab_size < BYTES:
        raise InputError(f"vocabulary of {vocab_size} found, expected at least {BYTES}: one entry for each byte")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _add_special(backend: Tokenizer, names: Sequence[str]) -> None:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def save_tokenizer(backend: Tokenizer, folder: str | os.PathLike, **settings: str) -> None:
    """Writes a tokenizer folder, whole; ``settings`` are its special tokens by their roles and its chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)
    with atomic_write(folder) as partial:
        tokenizer.save_pretrained(partial)
        # transformers 5 names its own class and leaves the map out; written like this, version 4 and vLLM load it as well.
        config = read_json(partial / "tokenizer_config.json")
        del config["backend"]
        write_json(partial / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})
        write_json(partial / "special_tokens_map.json", tokenizer.special_tokens_map)
