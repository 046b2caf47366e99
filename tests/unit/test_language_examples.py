"""Rows of each format as ids and loss masks, spelled out token by token."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ichigo_jax.data.language import LanguageExamples, Rows, read_rows
from ichigo_jax.errors import InputError
from ichigo_jax.text import TRANSCRIBE_TOKEN, TextTokenizer, train_llama_tokenizer
from ichigo_jax.text.prompts import TRANSCRIPTION_PROMPTS
from ichigo_jax.vocab import sound_text

WORDS = ["user", "assistant", "\n\n", "on", "yes", "Hi "]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    train_llama_tokenizer(WORDS * 3, folder, 300, sound_codes=8, durations=False)
    return TextTokenizer.from_folder(folder)


def spelled(tokenizer, example):
    """Each id as text, those that carry loss in brackets."""
    names = [tokenizer.decode([index], skip_special=False) for index in example.ids]
    return [f"[{name}]" if predicted else name for name, predicted in zip(names, example.predicted)]


def examples(tokenizer, rows, format, predict="answers", length=100):
    return LanguageExamples(rows, format, tokenizer, length, predict)


USER = ["<|begin_of_text|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"]
ASSISTANT = ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]
SPEECH = ["<|sound_start|>", "<|sound_0003|>", "<|sound_0005|>", "<|sound_end|>"]


def test_sound(tokenizer):
    found = examples(tokenizer, [{"tokens": [3, 5]}], "sound", predict="all")[0]
    assert spelled(tokenizer, found) == [f"[{name}]" for name in ["<|begin_of_text|>", *SPEECH, "<|end_of_text|>"]]


def test_instruction(tokenizer):
    found = examples(tokenizer, [{"tokens": [3, 5], "answer": "yes"}], "instruction")[0]
    assert spelled(tokenizer, found) == [*USER, *SPEECH, *ASSISTANT, "[yes]", "[<|eot_id|>]"]


def test_transcription_asks_in_one_of_the_wordings(tokenizer):
    rows = [{"tokens": [3, 5], "text": "on"}] * 40
    texts = {tokenizer.decode(examples(tokenizer, rows, "transcription")[index].ids) for index in range(40)}
    asked = {text.split("\n\n")[1].removesuffix("assistant").strip() for text in texts}
    assert asked == {prompt.strip() for prompt in TRANSCRIPTION_PROMPTS["en"]}
    assert TRANSCRIBE_TOKEN not in "".join(texts)


def test_conversations_hold_sound_inside_their_contents(tokenizer):
    turns = [{"role": "user", "content": "Hi " + sound_text([3, 5])}, {"role": "assistant", "content": "yes"}]
    found = spelled(tokenizer, examples(tokenizer, [{"conversations": turns}], "conversations")[0])
    assert found == [*USER, *found[5:-11], *SPEECH, *ASSISTANT, "[yes]", "[<|eot_id|>]"]
    assert "".join(found[5:-11]) == "Hi "


def test_texts_that_spell_special_tokens_stay_texts(tokenizer):
    found = examples(tokenizer, [{"tokens": [3], "answer": "<|eot_id|><|sound_0001|>"}], "instruction")[0]
    eot, sound = tokenizer.special_id("<|eot_id|>"), tokenizer.special_id("<|sound_0001|>")
    assert list(found.ids).count(eot) == 2 and sound not in found.ids
    assert tokenizer.decode(found.ids[found.predicted]) == "<|eot_id|><|sound_0001|>"


def test_what_does_not_fit_is_cut_before_the_sound_and_counted(tokenizer):
    rows = [{"tokens": [3, 5], "answer": "yes"}, {"tokens": [3], "answer": "yes"}]
    cut = examples(tokenizer, rows, "instruction", length=8)
    assert spelled(tokenizer, cut[0]) == USER  # the span would have ended at the ninth id
    assert spelled(tokenizer, cut[1]) == [*USER, "<|sound_start|>", "<|sound_0003|>", "<|sound_end|>"]
    lengths, dropped = cut.lengths()
    assert lengths.tolist() == [5, 8] and (dropped.examples, dropped.ids) == (2, 11 + 7)


def test_codes_that_the_vocabulary_lacks_are_refused(tokenizer):
    with pytest.raises(InputError, match="sound code 8 found, expected 0 to 7"):
        examples(tokenizer, [{"tokens": [8]}], "sound")[0]


def test_rows_of_a_batch_are_whole_examples(tokenizer):
    source = examples(tokenizer, [{"tokens": [code]} for code in range(3)], "sound", predict="all")
    row = Rows(source, [np.array([2, 0])], 12, tokenizer.pad_id)[0]
    assert row["tokens"][:10].tolist() == [*source[2].ids, *source[0].ids]
    assert row["segment_ids"].tolist() == [1] * 5 + [2] * 5 + [0] * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no such file"),
        ("text", "expected a parquet file"),
        ([], "at least one row"),
        ([{"tokens": [1]}], "found columns tokens"),
    ],
)
def test_files_that_are_not_what_the_format_needs(tmp_path, rows, message):
    path = tmp_path / "rows.parquet"
    if rows == "text":
        path.write_text("hello")
    elif rows is not None:
        schema = None if rows else pa.schema({"tokens": pa.list_(pa.int64()), "answer": pa.string()})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    with pytest.raises(InputError, match=message):
        read_rows(str(path), "instruction")
