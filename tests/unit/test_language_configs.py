"""The language model's configs: every argument gives a run, and each stage's run is built on a small model and its data."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from ichigo_jax import configuration
from ichigo_jax.errors import InputError
from ichigo_jax.models.llama import LanguageModelConfig, LlamaConfig
from ichigo_jax.storage import write_json
from ichigo_jax.tasks import open_files, planned_task
from ichigo_jax.text import TextTokenizer, train_llama_tokenizer
from ichigo_jax.text.train_tokenizer import LLAMA_SPECIAL_TOKENS
from ichigo_jax.training.run_config import import_file, load
from ichigo_jax.vocab import RELEASED_TASK_TOKEN, compressed_sound_text, sound_text

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ["1b", "3b", "8b", "70b", "qwen0.5b", "qwen1.5b", "qwen7b", "qwen32b"]
STAGES = {
    "llama_pretrain": (SIZES, ["", ",compressed,column=compress_prompt", ",per_row=4,data=here,init=there"]),
    "llama_instruct": (SIZES, ["", ",answers,compressed,per_row=8", f",task_token={RELEASED_TASK_TOKEN}"]),
    "llama_enhance": (SIZES, ["", ",answers,compressed,per_row=8", f",task_token={RELEASED_TASK_TOKEN}"]),
    "text_to_sound": (["1b", "qwen0.5b", "qwen1.5b"], ["", ",released,everything", ",rows=500000,per_row=2"]),
}
ALL = [(stage, size + more) for stage, (sizes, variants) in STAGES.items() for size in sizes for more in variants]


@pytest.mark.parametrize(("stage", "argument"), ALL)
def test_every_argument_gives_a_run(stage, argument):
    config = load(f"{CONFIGS}/{stage}.py:{argument}", [])
    assert config.task == "language_model" and config.init_from
    task = planned_task(config)  # from the config alone: no folder is there
    assert task.model_config.llama.tie_word_embeddings == (argument.split(",")[0] in ("1b", "3b", "qwen0.5b", "qwen1.5b"))
    rows = (config.train.batch_size, config.data["length"])
    shapes = task.batch_shapes()
    assert ("source" in shapes) == (len(config.data["sources"]) > 1)
    assert {value.shape for name, value in shapes.items() if name != "source"} == {rows}
    assert task.tokens_per_step() == rows[0] * rows[1]
    assert config.train.batch_size % config.train.accumulation == 0
    assert config.data["packing"] == ("per_row" in argument)
    assert (config.data["sound_form"] == "compressed") == (
        "compressed" in argument or (stage, argument[:2]) == ("text_to_sound", "1b")
    )


def test_the_releases_numbers():
    found = {}
    for stage in ("llama_pretrain", "llama_instruct", "llama_enhance"):
        config = load(f"{CONFIGS}/{stage}.py", [])
        train, optimizer = config.train, config.optimizer
        found[stage] = (train.steps, train.batch_size, optimizer.learning_rate, optimizer.warmup_steps, config.data["length"])
        assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.999, 0.005, 1.0)
        assert config.objective["predict"] == "all"
    assert found == {
        "llama_pretrain": (8064, 480, 2e-4, 50, 512),
        "llama_instruct": (7400, 256, 7e-5, 73, 4096),
        "llama_enhance": (644, 256, 1.5e-5, 8, 4096),
    }


def test_packed_steps_hold_as_many_examples():
    config = load(f"{CONFIGS}/llama_instruct.py:8b,per_row=8", [])
    assert (config.train.batch_size, config.train.accumulation, config.train.steps) == (32, 1, 7400)
    assert load(f"{CONFIGS}/llama_instruct.py:8b,per_row=2", []).train.accumulation == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("llama_pretrain.py:9b", "size '9b' found, expected one of 1b, 3b, 8b"),
        ("llama_enhance.py:8b,per_row=7", "per_row=7 found, expected a divisor of the batch of 256"),
        ("text_to_sound.py:8b", "expected one of 1b, qwen0.5b, qwen1.5b"),
        ("text_to_sound.py:1b,rows=100", "which make 1 steps, expected more than the warm-up of 200"),
        ("llama_instruct.py:8b,length=3", "config argument 'length=3' found"),
    ],
)
def test_arguments_that_make_no_run(spec, message):
    with pytest.raises(InputError) as error:
        load(f"{CONFIGS}/{spec}", [])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_shared_part_is_found_from_anywhere(tmp_path):
    code = f"from ichigo_jax.training.run_config import load; print(load({str(CONFIGS / 'llama_enhance.py')!r}, []).train.steps)"
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "644", result.stderr
    with pytest.raises(InputError, match="expected a Python file"):
        import_file(tmp_path / "config.txt")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A speech tokenizer's provenance, a small model with sound tokens, as far as tasks read them, and a file of each kind."""
    root = tmp_path_factory.mktemp("root")
    (root / "speech").mkdir()
    write_json(root / "speech" / "provenance.json", {"fingerprint": "0123456789abcdef"})
    with pytest.MonkeyPatch.context() as patch:
        special = (*LLAMA_SPECIAL_TOKENS, RELEASED_TASK_TOKEN)
        patch.setattr("ichigo_jax.text.train_tokenizer.LLAMA_SPECIAL_TOKENS", special)
        train_llama_tokenizer(["on", "yes"] * 3, root / "model" / "tokenizer", 300, sound_codes=9, durations=True)
    tokenizer = TextTokenizer.from_folder(root / "model" / "tokenizer")
    llama = LlamaConfig("llama", tokenizer.size, 16, 32, 2, 2, 1, 8, 4096, 1e-5, 5e5, None, True, False, 0.02)
    config = LanguageModelConfig(llama, tokenizer.sound, tokenizer.eos_ids, tokenizer.size)
    write_json(root / "model" / "config.json", {"kind": "language_model", **configuration.to_dict(config)})

    codes = [3, 3, 3, 5]
    turns = [{"role": "user", "content": f"on {sound_text(codes)}"}, {"role": "assistant", "content": "yes"}]
    rows = {
        "llama_pretrain": {"text": sound_text(codes), "compress_prompt": compressed_sound_text(codes)},
        "llama_instruct": {"conversations": turns},
        "llama_enhance": {"conversations": [{"role": "system", "content": "on"}, *turns, *turns]},
        "text_to_sound": {"text": "on", "tokens": codes},
    }
    for stage, row in rows.items():
        (root / stage).mkdir()
        pq.write_table(pa.Table.from_pylist([row] * 12), root / stage / "train-00000-of-00002.parquet")
        (root / stage / "train-00001-of-00002.jsonl").write_text((json.dumps(row) + "\n") * 4 + '{"nothing": 1}\n')
    return root


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("more", ["", ",per_row=2"])
def test_each_stage_is_built_and_reads_its_data(root, tmp_path, capsys, stage, more):
    argument = f"1b,init={root / 'model'},data={root / stage},speech_tokenizer={root / 'speech'}{more}"
    config = load(f"{CONFIGS}/{stage}.py:{argument}", [])
    with pytest.raises(InputError, match="hidden_size 16"):
        open_files(config)
    config = dataclasses.replace(config, model=None, train=dataclasses.replace(config.train, batch_size=4, accumulation=2))
    files = open_files(config)
    task, data = files.task, files.open_data(tmp_path)
    model = nnx.eval_shape(lambda: task.make_model(nnx.Rngs(0)))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model))) > 5000
    batch = data.examples().batch(config.train.batch_size)[3]
    length = config.data["length"]
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
        ("tokens", "targets", "positions", "segment_ids"), (4, length)
    )
    assert batch["segment_ids"].max() > 1 if more else batch["segment_ids"].max() == 1
    assert (batch["targets"] >= 0).any(axis=1).all()
    sound = files.tokenizer.sound
    compressed = config.data["sound_form"] == "compressed"
    assert any(sound.is_duration(index) for index in batch["tokens"].ravel().tolist()) == compressed
    if stage == "text_to_sound":
        learned = set(batch["targets"][batch["targets"] >= 0].tolist())
        assert learned <= {*range(sound.first_id, sound.first_id + sound.size), *files.tokenizer.eos_ids}
    (rows,) = re.findall(r"16 examples in (\d+) rows", capsys.readouterr().err)
    (fault,) = map(json.loads, (tmp_path / "skipped_rows.jsonl").read_text().splitlines())
    assert fault["path"].endswith("train-00001-of-00002.jsonl: row 5") and data.sizes == [int(rows)]
