"""Random language models of any size as Hugging Face folders, and the peak memory of what is done with them.

Run as a program it converts in a process of its own:
``python -m tests.unit.large_models import|export|extend SRC DST SHARD_BYTES``.
"""

import json
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from converters import engine, extend_vocabulary, language_model, llama, safetensors_files
from converters.recognise import recognise
from ichigo_jax.models.llama import LanguageModelConfig, LlamaConfig
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.text.train_tokenizer import train_llama_tokenizer

FIRST_SOUND_ID = 264  # after 256 bytes and 8 special tokens


def write_random(folder, network, shard_bytes):
    """A folder with random bfloat16 weights, one block of rows in memory at a time."""
    folder.mkdir()
    train_llama_tokenizer(["turn on the kitchen light"], folder / "tokenizer", 256, sound_codes=1, durations=False)
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    (folder / "tokenizer").rmdir()
    description = read_json(folder / "tokenizer.json")
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < FIRST_SOUND_ID]
    write_json(folder / "tokenizer.json", description)
    config = LanguageModelConfig(network, None, (262,), network.vocab_size)
    rng = np.random.default_rng(0)
    infos = {
        piece.source: engine.TensorInfo(np.dtype(ml_dtypes.bfloat16), piece.shape) for piece in language_model.pieces_of(config)
    }

    def blocks(key):
        rows = infos[key].shape[0]
        for begin in range(0, rows, 1024):
            shape = (min(1024, rows - begin), *infos[key].shape[1:])
            yield (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    safetensors_files.write_folder(folder, infos, blocks, shard_bytes)
    special_ids = {"bos_token_id": 256, "eos_token_id": 262, "pad_token_id": 258}
    write_json(folder / "config.json", llama.config_to_hf(config, "bfloat16", special_ids))


def network(vocab_size, hidden_size, intermediate_size, layers):
    """An untied Llama with heads of 64, four of them to a key."""
    heads = hidden_size // 64
    return LlamaConfig(
        "llama",
        vocab_size,
        hidden_size,
        intermediate_size,
        layers,
        heads,
        heads // 4,
        64,
        64,
        1e-5,
        1e4,
        None,
        False,
        False,
        0.02,
    )


def convert(action, source, target, shard_bytes):
    if action == "import":
        language_model.import_hf(source, target, None)
    elif action == "export":
        provenance = language_model.export_hf(source, target, shard_bytes, compare_bytes=0)
        assert provenance["export_not_compared"]
    else:
        extension = extend_vocabulary.Extension(512, durations=False, seed=0, noise=0.05)
        extend_vocabulary.extend(recognise(source), target, extension, None)


def memory(field):
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes. A child's ru_maxrss would count its parent's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def main(action, source, target, shard_bytes):
    # Libraries, compiled programs and thread pools come with the first conversion of a tiny model and are not counted.
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_random(folder / "hf", network(512, 256, 256, 2), 10**9)
        convert("import", folder / "hf", folder / "model", 10**9)
        convert("export", folder / "model", folder / "again", 10**9)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    convert(action, Path(source), Path(target), int(shard_bytes))
    print(json.dumps({"baseline": before, "growth": memory("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
