import numpy as np
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


VOCABULARY = SoundVocabulary(100, 8, durations=True)


def random_codes(seed):
    """Runs of every length up to some beyond the longest that has a token."""
    generator = np.random.default_rng(seed)
    runs = generator.integers(1, generator.choice([3, 60, 160]), size=generator.integers(0, 12))
    return np.repeat(generator.integers(0, 8, len(runs)), runs).tolist()


@pytest.mark.parametrize("seed", range(200))
def test_every_form_is_exact_and_canonical(seed):
    codes = random_codes(seed)
    for text in (sound_text(codes), compressed_sound_text(codes)):
        assert parse_sound_text(text) == codes
        assert split_sound_text(f"on {text}") == ["on ", codes]
    for compressed in (False, True):
        assert VOCABULARY.codes_of(VOCABULARY.ids(codes, compressed)) == codes
    assert VOCABULARY.ids(parse_sound_text(compressed_sound_text(codes)), True) == VOCABULARY.ids(codes, True)
    assert len(VOCABULARY.ids(codes, True)) <= len(VOCABULARY.ids(codes))


def test_ids_are_those_of_the_spelling():
    names = sound_vocabulary(8, durations=True)
    for codes in ([3, 3, 5], [7] * 120, []):
        for text, compressed in ((sound_text(codes), False), (compressed_sound_text(codes), True)):
            spelled = [100 + names.index(f"<|{name}|>") for name in text[2:-2].split("|><|")]
            assert VOCABULARY.ids(codes, compressed) == spelled
    assert VOCABULARY.ids([3, 3, 5], compressed=True) == [100, 110, 105, 107, 101]
    assert VOCABULARY.size == len(names) and SoundVocabulary(0, 8, False).size == 10


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "from its start to its end"),
        ([105], "from its start to its end"),
        ([100, 105], "from its start to its end"),
        ([100, 99, 101], "id 99 found"),
        ([100, 110, 110, 105, 101], "id 110 found"),
        ([100, 110, 101], "<|duration_02|> found at the end"),
        ([100, 158, 101], "id 158 found"),
    ],
)
def test_ids_that_are_no_sound_are_refused(ids, message):
    with pytest.raises(InputError) as error:
        VOCABULARY.codes_of(ids)
    assert message in str(error.value)


def test_compressing_needs_duration_tokens():
    with pytest.raises(InputError, match="no duration tokens"):
        SoundVocabulary(100, 8, durations=False).ids([3, 3], compressed=True)


@pytest.mark.parametrize("text", ["<|sound_start|>", "on<|sound_end|>", "<|sound_end|>on<|sound_start|>", "<|sound_start|>" * 2])
def test_half_a_span_inside_text_is_refused(text):
    with pytest.raises(InputError, match="half of a sound span"):
        split_sound_text(text)


@pytest.mark.parametrize("duration", ["00", "01", "50"])
def test_durations_without_a_token_are_refused(duration):
    with pytest.raises(InputError, match="expected a duration of 2 to 49"):
        parse_sound_text(f"<|sound_start|><|duration_{duration}|><|sound_0001|><|sound_end|>")


def test_compression_writes_runs_and_splits_those_longer_than_49():
    assert compressed_sound_text([7, 7, 7, 1]) == ("<|sound_start|><|duration_03|><|sound_0007|><|sound_0001|><|sound_end|>")
    assert compressed_sound_text([7] * 50) == "<|sound_start|><|duration_49|><|sound_0007|><|sound_0007|><|sound_end|>"


@pytest.mark.parametrize("text", ["", "hello", "<|sound_start|>hello<|sound_end|>", "<|sound_start|><|sound_0001|>"])
def test_other_text_is_refused(text):
    with pytest.raises(InputError):
        parse_sound_text(text)


def test_spans_inside_text_are_cut_out():
    assert split_sound_text("Hi " + sound_text([1, 2]) + "!") == ["Hi ", [1, 2], "!"]
