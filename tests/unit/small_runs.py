"""Training runs of tiny models that take seconds: what they read, and their configs."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx

from ichigo_jax.models.llama import LanguageModelConfig, Llama, LlamaConfig
from ichigo_jax.storage import write_json
from ichigo_jax.storage.model_folder import save_model
from ichigo_jax.text import TextTokenizer, train_llama_tokenizer
from ichigo_jax.training import run_config

STEPS = (
    "--config.train.steps=4",
    "--config.train.batch_size=8",
    "--config.optimizer.warmup_steps=1",
    "--config.output.log_every=1",
    "--config.output.checkpoint_every=2",
    "--config.output.checkpoints_kept=4",
)


def write_language_root(root):
    """What ``configs/nano_llama.py`` reads: a tokenizer, sound tokens, a first stage."""
    words = ["turn on the light", "user", "assistant", "yes"] * 3
    train_llama_tokenizer(words, root / "text_tokenizers" / "llama", 300, sound_codes=8, durations=False)
    write_json(root / "speech_tokenizer" / "model" / "provenance.json", {"fingerprint": "0123456789abcdef"})
    (root / "tokens").mkdir()
    rows = [{"tokens": [number % 8, 5], "answer": "yes", "text": "on"} for number in range(16)]
    for name in ("train", "heldout"):
        pq.write_table(pa.Table.from_pylist(rows), root / "tokens" / f"{name}.parquet")
    tokenizer = TextTokenizer.from_folder(root / "text_tokenizers" / "llama")
    network = LlamaConfig("llama", tokenizer.size, 32, 48, 2, 4, 2, 8, 64, 1e-5, 1e4, None, False, False, 0.1)
    config = LanguageModelConfig(network, tokenizer.sound, tokenizer.eos_ids, -(-tokenizer.size // 8) * 8)
    state = nnx.to_pure_dict(nnx.state(Llama(config, nnx.Rngs(0))))
    save_model(root / "pretrain" / "model", "language_model", config, state, {}, root / "text_tokenizers" / "llama")
    return root


def language_config(root, *overrides, stage="instruct"):
    return run_config.load(f"configs/nano_llama.py:{stage},root={root}", [*STEPS, "--config.data.length=48", *overrides])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
