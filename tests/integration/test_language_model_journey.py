"""A text model learns to listen: extend-vocab, import, train, export, and transformers writes what it writes here."""

import json

import numpy as np
import pytest

from ichigo_jax.inference.language_model import LanguageModel
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.text import SoundCodes, train_tokenizer
from ichigo_jax.vocab import sound_text
from tests.integration.conftest import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ANSWERS = {(7, 7, 500): "the light is on", (9, 31): "the door is shut", (100, 101, 102): "seven", (511,): "it rains"}


def text_model(folder):
    """A tiny Llama 3.1 that knows no sound: rotary scaling, its special tokens, its chat template."""
    backend = train_tokenizer._train_bpe(ANSWERS.values(), 300)
    train_tokenizer._add_special(backend, train_tokenizer.LLAMA_SPECIAL_TOKENS)
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    train_tokenizer.save_tokenizer(backend, folder, **tokens, chat_template=train_tokenizer.LLAMA_CHAT_TEMPLATE)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5e5, **scaling, "original_max_position_embeddings": 64},
        tie_word_embeddings=False,
        bos_token_id=backend.token_to_id("<|begin_of_text|>"),
        eos_token_id=backend.token_to_id("<|eot_id|>"),
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def command(*arguments):
    code, out, err = run(*arguments)
    assert code == 0, err
    return out


def test_extended_trained_exported_and_answered_by_transformers(tmp_path):
    text_model(tmp_path / "text")
    command("converters", "extend-vocab", tmp_path / "text", tmp_path / "extended", "--sound-codes", 512)
    command("converters", "import", tmp_path / "extended", tmp_path / "start")

    write_json(tmp_path / "speech" / "provenance.json", {"fingerprint": "0123456789abcdef"})
    turns = [
        [{"role": "user", "content": sound_text(codes)}, {"role": "assistant", "content": answer}]
        for codes, answer in ANSWERS.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
    argument = f"1b,init={tmp_path / 'start'},data={tmp_path / 'rows.jsonl'},speech_tokenizer={tmp_path / 'speech'},answers"
    overrides = {
        "model": "null",  # not Llama 3.2's numbers
        "data.length": 48,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 5,
        "train.steps": 60,
        "train.batch_size": 8,
        "train.accumulation": 2,
        "train.compute_dtype": "float32",
        "train.attention": "xla",
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    command("ichigo_jax.train", "--config", f"configs/llama_instruct.py:{argument}", "--workdir", tmp_path / "run", *flags)
    command("converters", "export", tmp_path / "run" / "model", tmp_path / "exported")
    provenance = read_json(tmp_path / "exported" / "provenance.json")
    assert provenance["export_max_abs_logit_diff"] < 1e-4
    assert provenance["speech_tokenizer_fingerprint"] == "0123456789abcdef"

    ours = LanguageModel.from_pretrained(tmp_path / "run" / "model")
    requests = [[{"role": "user", "content": [SoundCodes(codes)]}] for codes in ANSWERS]
    answers = ours.answer(requests, 16)
    assert answers == list(ANSWERS.values())  # it has learned to listen

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    for codes, answer in zip(ANSWERS, answers):
        spelled = [{"role": "user", "content": sound_text(codes)}]
        ids = tokenizer.apply_chat_template(spelled, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            written = theirs.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == answer
    assert np.isfinite([row["loss"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())]).all()
