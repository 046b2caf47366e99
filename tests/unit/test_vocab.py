import pytest

from ichigo_jax.errors import InputError
from ichigo_jax.vocab import (
    SoundVocabulary,
    compressed_sound_text,
    parse_sound_text,
    sound_text,
    sound_vocabulary,
    split_sound_text,
)


def test_released_families_have_the_released_number_of_rows():
    assert 128_256 + len(sound_vocabulary(513, durations=False)) == 128_771
    assert 128_256 + len(sound_vocabulary(2561, durations=True)) == 130_867


def test_order_of_the_added_tokens():
    tokens = sound_vocabulary(2, durations=True)
    assert tokens[:5] == ["<|sound_start|>", "<|sound_end|>", "<|sound_0000|>", "<|sound_0001|>", "<|duration_02|>"]
    assert tokens[-1] == "<|duration_49|>"


def test_ids_wrap_codes_in_start_and_end():
    assert SoundVocabulary(100, 8, False).ids([3, 3, 5]) == [100, 105, 105, 107, 101]


@pytest.mark.parametrize("code", [-1, 8])
def test_codes_out_of_range_are_refused_not_clipped(code):
    with pytest.raises(InputError, match=f"sound code {code} found, expected 0 to 7"):
        SoundVocabulary(100, 8, False).ids([0, code])


@pytest.mark.parametrize("codes", [[], [12], [7, 7, 7, 1], [5] * 120 + [6]])
def test_plain_and_compressed_text_both_parse_back(codes):
    assert parse_sound_text(sound_text(codes)) == codes
    assert parse_sound_text(compressed_sound_text(codes)) == codes


def test_compression_writes_runs_and_splits_those_longer_than_49():
    assert compressed_sound_text([7, 7, 7, 1]) == ("<|sound_start|><|duration_03|><|sound_0007|><|sound_0001|><|sound_end|>")
    assert compressed_sound_text([7] * 50) == "<|sound_start|><|duration_49|><|sound_0007|><|sound_0007|><|sound_end|>"


@pytest.mark.parametrize("text", ["", "hello", "<|sound_start|>hello<|sound_end|>", "<|sound_start|><|sound_0001|>"])
def test_other_text_is_refused(text):
    with pytest.raises(InputError):
        parse_sound_text(text)


def test_spans_inside_text_are_cut_out():
    assert split_sound_text("Hi " + sound_text([1, 2]) + "!") == ["Hi ", [1, 2], "!"]
