"""Where an answer ends: what a model's files say, what its chat template writes, and what training and exports make of both."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax.traverse_util import unflatten_dict
from test_converters_llama import SIZES, run
from test_extend_vocabulary import qwen_folder

from converters import language_model
from ichigo_jax import Assistant, LanguageModel
from ichigo_jax.models.llama import LanguageModelConfig, LlamaConfig
from ichigo_jax.storage import read_json, write_json
from ichigo_jax.storage.model_folder import load_config, save_model
from ichigo_jax.text.tokenizer import TextTokenizer
from ichigo_jax.text.train_tokenizer import train_llama_tokenizer
from ichigo_jax.train import train
from ichigo_jax.training import run_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

END_OF_TEXT, EOM, EOT = 257, 261, 262  # of the Llama tokenizer below
ENDOFTEXT, IM_END = 270, 272  # of the Qwen tokenizer
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "on"}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    train_llama_tokenizer(["turn on the kitchen light", "yes"], root / "llama", 256, sound_codes=8, durations=False)
    qwen_folder(root / "qwen")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (root / "qwen" / name).unlink()
    write_json(
        root / "qwen" / "tokenizer_config.json", read_json(root / "qwen" / "tokenizer_config.json") | {"chat_template": CHATML}
    )
    return root


# The tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "turn_end", "ends"), [("llama", EOT, (END_OF_TEXT, EOM, EOT)), ("qwen", IM_END, (ENDOFTEXT, IM_END))]
)
def test_the_end_of_a_turn_is_what_the_chat_template_writes_after_an_answer(tokenizers, name, turn_end, ends):
    tokenizer = TextTokenizer.from_folder(tokenizers / name)
    assert tokenizer.turn_end_id == turn_end and tokenizer.eos_ids == ends


@pytest.mark.parametrize(
    ("template", "turn_end"),
    [
        ("<|start_header_id|>{{ m['content'] }}<|python_tag|>\n<|eot_id|>", "<|python_tag|>"),
        ("{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}", "<|eot_id|>"),
        ("{{ m['content'] }}{% if not loop.last %}<|eot_id|>{% endif %}", None),
        ("{{ raise_exception('only tools') }}", None),
        ("{{ messages[0]['content'] }}<|eot_id|>", None),
    ],
)
def test_other_chat_templates(tokenizers, tmp_path, template, turn_end):
    folder = shutil.copytree(tokenizers / "llama", tmp_path / "t")
    (folder / "chat_template.jinja").write_text(f"{{% for m in messages %}}{template}{{% endfor %}}")
    tokenizer = TextTokenizer.from_folder(folder)
    assert tokenizer.turn_end_id == (None if turn_end is None else tokenizer.special_id(turn_end))
    assert turn_end is None or tokenizer.turn_end_id in tokenizer.eos_ids


def test_without_a_chat_template_no_turn_ends(tokenizers, tmp_path):
    folder = shutil.copytree(tokenizers / "llama", tmp_path / "t")
    (folder / "chat_template.jinja").unlink()
    tokenizer = TextTokenizer.from_folder(folder)
    assert tokenizer.turn_end_id is None and not tokenizer.chat_ids and tokenizer.eos_ids == (END_OF_TEXT, EOM, EOT)


# Import --------------------------------------------------------------------------------------------------------------


def hf_folder(tokenizers, folder, name, config_eos, generation_eos):
    torch.manual_seed(0)
    classes = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen": ("Qwen2Config", "Qwen2ForCausalLM")}[name]
    config_class, model_class = (getattr(transformers, each) for each in classes)
    sizes = SIZES | {"vocab_size": 290, "eos_token_id": config_eos, "num_hidden_layers": 1}
    model_class(config_class(**sizes)).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation_eos is not None:
        write_json(folder / "generation_config.json", {"eos_token_id": generation_eos, "temperature": 0.6})
    shutil.copytree(tokenizers / name, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("name", "config_eos", "generation_eos", "eos", "said", "turn_end"),
    [
        ("llama", 257, 257, (257,), "answers end at 257 <|end_of_text|>\n", "262 <|eot_id|>"),
        ("llama", 257, [257, 261, 262], (257, 261, 262), "262 <|eot_id|> (generation_config.json; config.json has 257", None),
        ("llama", [257, 262], None, (257, 262), "answers end at 257 <|end_of_text|>, 262 <|eot_id|>\n", None),
        ("qwen", 270, 270, (270,), "answers end at 270 <|endoftext|>\n", "272 <|im_end|>"),
        ("qwen", 272, [272, 270], (272, 270), "answers end at 272 <|im_end|>, 270 <|endoftext|> (gen", None),
        ("llama", None, None, (), "answers end at no token\n", "262 <|eot_id|>"),
        ("llama", 2, None, (2,), "2 #: no special token, so answers stop wherever one is written; is eos_token_id in", "262"),
    ],
)  # fmt: skip
def test_an_import_says_where_answers_end(tokenizers, tmp_path, capsys, name, config_eos, generation_eos, eos, said, turn_end):
    folder = hf_folder(tokenizers, tmp_path / "hf", name, config_eos, generation_eos)
    assert run("import", folder, tmp_path / "model") == 0
    out = capsys.readouterr().out
    assert said in out and ("the chat template ends a turn" in out) == (turn_end is not None)
    assert turn_end is None or f"ends a turn with {turn_end}" in out
    assert load_config(tmp_path / "model", "language_model", LanguageModelConfig).eos_token_ids == eos
    for source in (folder, tmp_path / "model"):
        assert run("inspect", source) == 0
        assert f"answers end at: {eos[0] if eos else 'no token'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("generation_eos", "message"),
    [
        ("<|eot_id|>", "generation_config.json: eos_token_id ['<|eot_id|>'] found, expected whole numbers; write the ids"),
        ([128001, 128009], "expected ids below vocab_size 290; correct config.json or generation_config.json"),
        ([True], "expected whole numbers"),
    ],
)
def test_ends_that_are_no_ids_are_refused(tokenizers, tmp_path, capsys, generation_eos, message):
    folder = hf_folder(tokenizers, tmp_path / "hf", "llama", 257, generation_eos)
    capsys.readouterr()
    assert run("import", folder, tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert message in error and str(folder) in error and error.count("\n") == 1


# Answers -------------------------------------------------------------------------------------------------------------


def model_that_says(tokenizers, folder, name, token, eos):
    """Whatever is asked, its next token is ``token``."""
    tokenizer = TextTokenizer.from_folder(tokenizers / name)
    architecture = "qwen2" if name == "qwen" else "llama"
    network = LlamaConfig(architecture, 290, 16, 16, 1, 2, 1, 8, 256, 1e-5, 1e4, None, False, name == "qwen", 0.1)
    config = LanguageModelConfig(network, tokenizer.sound, eos, 290)
    state = {path: np.zeros(shape, np.float32) for path, shape in language_model.target_shapes(config).items()}
    state["embedding",][:] = state["norm", "scale"][:] = 1
    state["lm_head",][:, token] = 1
    save_model(folder, "language_model", config, unflatten_dict(state), {}, tokenizers / name)
    return LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "turn_end", "eos"), [("llama", EOT, (END_OF_TEXT,)), ("qwen", IM_END, (ENDOFTEXT,)), ("llama", EOT, ())]
)
def test_answers_of_a_base_model_stop_where_the_template_ends_a_turn(tokenizers, tmp_path, name, turn_end, eos):
    model = model_that_says(tokenizers, tmp_path / "model", name, turn_end, eos)
    assert model.config.eos_token_ids == eos and model.chat_stop_ids() == (*eos, turn_end)
    assert model.generate([[1, 2]], 5) == [[turn_end] * 5], "a text goes on"
    prompts = []
    original = model.generate
    model.generate = lambda *arguments, **options: prompts.append(original(*arguments, **options)) or prompts[-1]
    assert model.answer([QUESTION], 5) == [""] and prompts == [[[turn_end]]]
    assert model.answer([QUESTION], 5, stop_ids=[1]) == [""] and len(prompts[-1][0]) == 5, "unless the caller says otherwise"
    assistant = Assistant(model, None)
    assert list(assistant.stream(messages=QUESTION, max_new_tokens=5)) == [] and assistant.reply(messages=QUESTION) == ""


def test_the_end_of_a_turn_is_never_part_of_the_answer(tokenizers, tmp_path):
    """Some tokenizers have it as an added token that is not special, and then it is text for them."""
    changed = tmp_path / "tokenizers" / "qwen"
    shutil.copytree(tokenizers / "qwen", changed)
    description = read_json(changed / "tokenizer.json")
    for token in description["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_end|>"
    write_json(changed / "tokenizer.json", description)
    settings = read_json(changed / "tokenizer_config.json")
    del settings["additional_special_tokens"], settings["added_tokens_decoder"]
    write_json(changed / "tokenizer_config.json", settings | {"eos_token": "<|endoftext|>"})
    model = model_that_says(changed.parent, tmp_path / "model", "qwen", IM_END, (ENDOFTEXT,))
    assert model.tokenizer.decode([IM_END]) == "<|im_end|>"
    assert model.answer([QUESTION], 5) == [""] and Assistant(model, None).reply(messages=QUESTION) == ""


# Training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tokenizers, tmp_path_factory):
    """What ``configs/nano_llama.py:instruct`` reads; its first stage ends texts only, as base models do."""
    root = tmp_path_factory.mktemp("root")
    write_json(root / "speech_tokenizer" / "model" / "provenance.json", {"fingerprint": "0123456789abcdef"})
    (root / "tokens").mkdir()
    rows = [{"tokens": [number % 8, 5], "answer": "yes", "text": "on"} for number in range(16)]
    for name in ("train", "heldout"):
        pq.write_table(pa.Table.from_pylist(rows), root / "tokens" / f"{name}.parquet")
    tokenizer = TextTokenizer.from_folder(tokenizers / "llama")
    network = LlamaConfig("llama", tokenizer.size, 32, 48, 1, 4, 2, 8, 256, 1e-5, 1e4, None, False, False, 0.1)
    config = LanguageModelConfig(network, tokenizer.sound, (END_OF_TEXT,), -(-tokenizer.size // 8) * 8)
    rng = np.random.default_rng(0)
    shapes = language_model.target_shapes(config)
    state = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
    save_model(root / "pretrain" / "model", "language_model", config, unflatten_dict(state), {}, tokenizers / "llama")
    return root


@pytest.mark.parametrize("adapter", ["", ",lora"])
def test_a_base_model_that_is_trained_on_chats_ends_answers_where_they_do(root, tmp_path, adapter):
    config = run_config.load(
        f"configs/nano_llama.py:instruct,root={root}{adapter}",
        [
            "--config.train.steps=2",
            "--config.train.batch_size=8",
            "--config.optimizer.warmup_steps=1",
            "--config.data.length=96",
        ],
    )
    if adapter:
        config.model["base_dtype"] = "float32"
    assert train(config, tmp_path / "run") == 0
    model = tmp_path / "run" / "model"
    ends = [END_OF_TEXT, EOM, EOT]
    assert list(load_config(model, "language_model", LanguageModelConfig).eos_token_ids) == ends
    assert run("export", model, tmp_path / "hf") == 0
    for name in ("config.json", "generation_config.json"):
        assert read_json(tmp_path / "hf" / name)["eos_token_id"] == ends
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == ends
    language_model.import_hf(tmp_path / "hf", tmp_path / "again", None)
    assert list(load_config(tmp_path / "again", "language_model", LanguageModelConfig).eos_token_ids) == ends
