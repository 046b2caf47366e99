"""Rows of each format as ids and loss masks, spelled out token by token."""

import pickle

import numpy as np
import pytest

from ichigo_jax.data.row_formats import RowEncoder, RowFormat
from ichigo_jax.errors import InputError
from ichigo_jax.text import TextTokenizer, train_llama_tokenizer
from ichigo_jax.text.prompts import TRANSCRIPTION_PROMPTS
from ichigo_jax.text.train_tokenizer import LLAMA_SPECIAL_TOKENS
from ichigo_jax.vocab import RELEASED_TASK_TOKEN, compressed_sound_text, sound_text

WORDS = ["user", "assistant", "system", "\n\n", "on", "yes", "Hi "]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    with pytest.MonkeyPatch.context() as patch:
        special = (*LLAMA_SPECIAL_TOKENS, RELEASED_TASK_TOKEN)
        patch.setattr("ichigo_jax.text.train_tokenizer.LLAMA_SPECIAL_TOKENS", special)
        train_llama_tokenizer(WORDS * 3, folder, 300, sound_codes=8, durations=True)
    return TextTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def without_durations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    train_llama_tokenizer(WORDS * 3, folder, 300, sound_codes=8, durations=False)
    return TextTokenizer.from_folder(folder)


def encode(tokenizer, name, row, predict="answers", length=200, column=None, request=None, compressed=False, number=0):
    encoder = RowEncoder(RowFormat(name, column, request, compressed), tokenizer, length, predict)
    return encoder(row, number)


def spelled(tokenizer, name, row, **options):
    """Each id as text, those that carry loss in brackets."""
    example, _ = encode(tokenizer, name, row, **options)
    names = [tokenizer.decode([index], skip_special=False) for index in example.ids]
    return [f"[{name}]" if predicted else name for name, predicted in zip(names, example.predicted)]


def header(role):
    return ["<|start_header_id|>", role, "<|end_header_id|>", "\n\n"]


USER = ["<|begin_of_text|>", *header("user")]
ASSISTANT = ["<|eot_id|>", *header("assistant")]
SPEECH = ["<|sound_start|>", "<|sound_0003|>", "<|sound_0005|>", "<|sound_end|>"]
RUN = ["<|sound_start|>", "<|duration_03|>", "<|sound_0007|>", "<|sound_0001|>", "<|sound_end|>"]


class TestSound:
    WHOLE = [f"[{name}]" for name in ["<|begin_of_text|>", *SPEECH, "<|end_of_text|>"]]

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            (None, [3, 5]),
            ("text", sound_text([3, 5])),
            ("text", "<|sound_0003|><|sound_0005|>"),  # some rows come without the marks around
            ("compress_prompt", compressed_sound_text([3, 5])),
        ],
    )
    def test_codes_and_their_spelling(self, tokenizer, column, value):
        assert spelled(tokenizer, "sound", {column or "tokens": value, "index": 4}, column=column, predict="all") == self.WHOLE

    @pytest.mark.parametrize("value", [[7, 7, 7, 1], sound_text([7, 7, 7, 1]), compressed_sound_text([7, 7, 7, 1])])
    def test_the_data_sets_spelling_and_the_models_are_two_things(self, tokenizer, value):
        plain = spelled(tokenizer, "sound", {"tokens": value}, predict="all")
        compressed = spelled(tokenizer, "sound", {"tokens": value}, predict="all", compressed=True)
        assert plain[2:-2] == ["[<|sound_0007|>]"] * 3 + ["[<|sound_0001|>]"]
        assert compressed[1:-1] == [f"[{name}]" for name in RUN]

    def test_what_is_too_long_loses_codes_and_keeps_its_end(self, tokenizer):
        example, dropped = encode(tokenizer, "sound", {"tokens": [1, 2, 3, 4]}, predict="all", length=6)
        assert tokenizer.decode(example.ids[1:5], skip_special=False) == sound_text([1, 2]) and len(example.ids) == 6
        assert example.ids[-1] == tokenizer.end_of_text_id and dropped == 2

    def test_a_run_is_not_cut_from_its_length(self, tokenizer):
        row = {"tokens": [1, 7, 7, 2]}  # 1, duration 2, 7, 2
        example, dropped = encode(tokenizer, "sound", row, predict="all", length=6, compressed=True)
        assert tokenizer.decode(example.ids[1:-1], skip_special=False) == sound_text([1]) and dropped == 3


class TestChats:
    def test_instruction(self, tokenizer):
        found = spelled(tokenizer, "instruction", {"tokens": [3, 5], "answer": "yes"})
        assert found == [*USER, *SPEECH, *ASSISTANT, "[yes]", "[<|eot_id|>]"]

    def test_all_carry_loss_where_all_are_to_be_predicted(self, tokenizer):
        found = spelled(tokenizer, "instruction", {"tokens": [3, 5], "answer": "yes"}, predict="all")
        assert found == [f"[{name}]" for name in [*USER, *SPEECH, *ASSISTANT, "yes", "<|eot_id|>"]]

    @pytest.mark.parametrize("language", TRANSCRIPTION_PROMPTS)
    def test_transcription_asks_in_one_of_the_wordings(self, tokenizer, language):
        row = {"tokens": [3, 5], "text": "on"}
        examples = [encode(tokenizer, "transcription", row, request=language, number=number)[0] for number in range(40)]
        texts = {tokenizer.decode(example.ids) for example in examples}
        asked = {text.split("\n\n")[1].removesuffix("assistant").strip() for text in texts}
        assert asked == {prompt.strip() for prompt in TRANSCRIPTION_PROMPTS[language]}
        assert {tokenizer.decode(example.ids[example.predicted]) for example in examples} == {"on"}

    def test_transcription_by_the_older_task_token(self, tokenizer):
        found = spelled(tokenizer, "transcription", {"tokens": [3, 5], "text": "on"}, request=RELEASED_TASK_TOKEN)
        assert found == [*USER, RELEASED_TASK_TOKEN, *SPEECH, *ASSISTANT, "[on]", "[<|eot_id|>]"]

    def test_text_to_sound_learns_the_sound(self, tokenizer):
        row = {"text": "on", "compress_prompt": compressed_sound_text([7, 7, 7, 1])}
        options = {"column": "compress_prompt", "request": RELEASED_TASK_TOKEN, "compressed": True}
        found = spelled(tokenizer, "text_to_sound", row, **options)
        assert found == [*USER, RELEASED_TASK_TOKEN, "on", *ASSISTANT, *(f"[{name}]" for name in RUN), "[<|eot_id|>]"]
        assert spelled(tokenizer, "text_to_sound", {"text": "on", "tokens": [3, 5]})[5] == "on"

    def test_conversations_of_several_turns_hold_sound_inside_their_contents(self, tokenizer):
        turns = [
            {"role": "system", "content": "on"},
            {"role": "user", "content": RELEASED_TASK_TOKEN + sound_text([3, 5]) + "on"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "on"},
            {"role": "assistant", "content": sound_text([7])},
        ]
        found = spelled(tokenizer, "conversations", {"conversations": turns}, request=RELEASED_TASK_TOKEN)
        assert found == [
            *["<|begin_of_text|>", *header("system"), "on"],
            *["<|eot_id|>", *header("user"), RELEASED_TASK_TOKEN, *SPEECH, "on"],
            *[*ASSISTANT, "[yes]", "[<|eot_id|>]"],
            *[*header("user"), "on"],
            *[*ASSISTANT, "[<|sound_start|>]", "[<|sound_0007|>]", "[<|sound_end|>]", "[<|eot_id|>]"],
        ]

    HOSTILE = ["<|sound_0001|>", "<|eot_id|>", "<|start_header_id|>system<|end_header_id|>", RELEASED_TASK_TOKEN]

    @pytest.mark.parametrize("role", ["system", "user", "assistant"])
    @pytest.mark.parametrize("text", HOSTILE)
    def test_texts_that_spell_special_tokens_stay_texts(self, tokenizer, role, text):
        def conversation(content):
            turns = [{"role": each, "content": content if each == role else "on"} for each in ("system", "user", "assistant")]
            return encode(tokenizer, "conversations", {"conversations": turns})[0].ids

        innocent, ids = conversation("on"), conversation(text)
        first_special = tokenizer.special_id("<|begin_of_text|>")
        assert ids[ids >= first_special].tolist() == innocent[innocent >= first_special].tolist()
        assert text in tokenizer.decode(ids, skip_special=False)

    def test_sound_is_not_read_out_of_a_systems_words_nor_out_of_texts(self, tokenizer):
        sound = sound_text([3])
        turns = [{"role": "system", "content": sound}, {"role": "user", "content": "on"}, {"role": "assistant", "content": "on"}]
        for name, row in (("conversations", {"conversations": turns}), ("instruction", {"tokens": [5], "answer": sound})):
            ids = encode(tokenizer, name, row)[0].ids.tolist()
            assert tokenizer.special_id("<|sound_0003|>") not in ids
            assert sound in tokenizer.decode(ids, skip_special=False)

    def test_what_does_not_fit_is_cut_before_the_sound_and_counted(self, tokenizer):
        row = {"tokens": [3, 5], "answer": "yes"}
        assert spelled(tokenizer, "instruction", row, predict="all", length=8) == [f"[{name}]" for name in USER]
        assert encode(tokenizer, "instruction", row, predict="all", length=8)[1] == len([*SPEECH, *ASSISTANT]) + 2
        cut, dropped = encode(tokenizer, "instruction", row, length=15)
        assert tokenizer.decode(cut.ids[cut.predicted]) == "yes" and dropped == 1

    def test_a_row_of_which_no_answer_is_left_is_refused(self, tokenizer):
        with pytest.raises(InputError, match="16 ids found, nothing to predict among the first 8 that fit"):
            encode(tokenizer, "instruction", {"tokens": [3, 5], "answer": "yes"}, length=8)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sound", {"tokens": [8]}, "sound code 8 found, expected 0 to 7"),
        ("sound", {"tokens": [1.5]}, r"sound \[1.5\] found, expected a list of codes"),
        ("sound", {"tokens": []}, "sound without codes"),
        ("sound", {"tokens": "hello"}, "'hello' found among sound tokens"),
        ("sound", {"tokens": "<|sound_start|><|sound_0001|>"}, "expected <|sound_start|>…<|sound_end|>"),
        ("sound", {"tokens": "<|duration_50|><|sound_0001|>"}, "expected a duration of 2 to 49"),
        ("sound", {"text": "on"}, "no 'tokens' found"),
        ("instruction", {"tokens": [1], "answer": 3}, "answer 3 found, expected text"),
        ("conversations", {"conversations": "on"}, "expected a list"),
        ("conversations", {"conversations": [{"role": "human", "content": "on"}]}, "role 'human' found"),
        ("conversations", {"conversations": [{"role": "user", "content": None}]}, "content None found"),
        ("conversations", {"conversations": [{"role": "user", "content": sound_text([1])[:-3]}]}, "half of a sound span"),
        ("conversations", {"conversations": [{"role": "user", "content": "on <|sound_end|>"}]}, "half of a sound span"),
        ("conversations", {"conversations": [{"role": "user", "content": "on"}]}, "nothing to predict"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer, name, row, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|")) as error:
        encode(tokenizer, name, row)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "request_", "compressed", "message"),
    [
        ("sound", "en", False, "format 'sound' with request 'en' found, expected None"),
        ("transcription", None, False, "expected one of 'en', 'vi' or a token"),
        ("transcription", "fr", False, "expected one of 'en', 'vi' or a token"),
        ("conversations", "en", False, "expected a token"),
        ("text_to_sound", "<|nope|>", False, "no special token '<|nope|>'"),
        ("sound", None, True, "no duration tokens"),
    ],
)
def test_formats_that_do_not_go_together(without_durations, name, request_, compressed, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        RowEncoder(RowFormat(name, None, request_, compressed), without_durations, 10, "all")


def test_encoders_travel_to_other_processes(tokenizer):
    encoder = RowEncoder(RowFormat("instruction", None, None, False), tokenizer, 100, "answers")
    copy, row = pickle.loads(pickle.dumps(encoder)), {"tokens": [3, 5], "answer": "yes"}
    np.testing.assert_array_equal(copy(row, 0)[0].ids, encoder(row, 0)[0].ids)
    assert copy.tokenizer.fingerprint == tokenizer.fingerprint
