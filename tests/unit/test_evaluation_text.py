"""Scores of texts: what counts as a difference, and Whisper's own normalisers beside the originals."""

import json
import random
import unicodedata
from types import SimpleNamespace

import jiwer
import numpy as np
import pytest
import soundfile

from ichigo_jax import evaluate
from ichigo_jax.errors import InputError
from ichigo_jax.evaluation import normalizers
from ichigo_jax.evaluation.normalizers import NORMALIZERS, english_spellings, find_normalizer, plain, plain_words
from ichigo_jax.evaluation.text import error_rates, exact_fraction

whisper_normalizers = pytest.importorskip("whisper.normalizers")

# Of each pair one was said and the other is another text.
DIFFERENT = [
    ("की", "का"),  # Hindi vowel signs
    ("কি", "কা"),  # Bengali
    ("கோ", "கா"),  # Tamil
    ("กี", "กา"),  # Thai
    ("ကို", "ကာ"),  # Burmese
    ("שָׁלוֹם", "שלום"),  # Hebrew points
    ("hòa", "hoa"),  # Vietnamese tones
    ("o\u0302\u0323", "o"),
    ("Maße", "Masse"),
    ("-5", "5"),
    ("−5", "5"),
    ("–5", "5"),
    ("it is (-5)", "it is 5"),
    ("-$5", "$5"),
    ("$-5", "$5"),
    ("-.5", ".5"),
    ("5 - 3", "5 + 3"),
    ("3.5", "3 5"),
    ("3.5", "35"),
    ("0.5", "05"),
    (".5", "5"),
    ("10²", "102"),
    ("5½", "51/2"),
    ("1/2", "12"),
    ("5 %", "5"),
    ("$5", "€5"),
    ("5°", "5"),
    ("3 + 4", "3 4"),
    ("3 < 4", "3 > 4"),
    ("we're", "were"),
    ("it's", "its"),
    ("five", "six"),
    ("你好", "你们"),
]

# Of each pair both say the same.
SAME = [
    ("café", "cafe\u0301"),
    ("가", "\u1100\u1161"),
    ("Việt", unicodedata.normalize("NFD", "Việt")),
    ("don’t", "don't"),
    ("don‘t", "don't"),
    ("donʼt", "don't"),
    ("don´t", "don't"),
    ("don＇t", "don't"),
    ("О’Коннор", "О'Коннор"),
    ("‘quoted’", "quoted"),
    ("'quoted'", "quoted"),
    ("ﬁne eﬀort", "fine effort"),
    ("ＡＢＣ　１２３", "abc 123"),
    ("ｶﾞ", "ガ"),
    ("カ゛", "ガ"),
    ("soft\u00adhyphen", "softhyphen"),
    ("zero\u200bwidth", "zerowidth"),
    ("\ufeffmark", "mark"),
    ("a\u2060b", "ab"),
    ("\u200fשלום\u200e", "שלום"),
    ("no\u00a0break", "no break"),
    ("−5", "-5"),
    ("‐5", "-5"),
    ("well-known", "well known"),
    ("well‑known", "well known"),
    ("pages 3-5", "pages 3–5"),
    ("covid-19", "covid 19"),
    ("(555)-1234", "555 1234"),
    ("wait…", "wait"),
    ("wait...5", "wait 5"),
    ("½", "1/2"),
    ("٣٫٥", "3.5"),
    ("५", "5"),
    ("5%", "5 %"),
    ("İSTANBUL", "istanbul"),
    ("ΟΔΟΣ", "οδος"),
    ("a_b", "a b"),
    ("3\ufe0f\u20e3", "3"),
    ("ok 👍🏽", "ok"),
    ("你好，世界。", "你好世界"),
    ("これは テスト", "これはテスト"),
    ("สวัสดี ครับ", "สวัสดีครับ"),
    ("กำ", "ก\u0e4dา"),
    (" Turn ON,\n please. ", "turn on please"),
]


class TestPlain:
    @pytest.mark.parametrize(("one", "other"), DIFFERENT)
    def test_what_is_spoken_differently_counts(self, one, other):
        assert plain(one) != plain(other)
        assert plain_words(one) != plain_words(other)
        assert exact_fraction([one], [other]) == 0
        assert error_rates([one], [other])["wer"] > 0 and error_rates([one], [other])["cer"] > 0

    @pytest.mark.parametrize(("one", "other"), SAME)
    def test_what_is_only_typed_differently_does_not_count(self, one, other):
        assert plain(one) == plain(other) != ""
        assert exact_fraction([one], [other]) == 1
        assert error_rates([one], [other]) == {"wer": 0, "cer": 0}

    @pytest.mark.parametrize(
        ("text", "form"),
        [
            (" Turn ON, please. ", "turn on please"),
            ("It’s −5 %!", "it's -5 %"),
            ("rock 'n' roll", "rock n roll"),
            ("x = -$5.50", "x = - $ 5.50"),
            ("2026-11-27, 10:30", "2026 11 27 10 30"),
            ("AT&T", "at & t"),
            ("...", ""),
            ("\u0301", ""),
        ],
    )
    def test_literal_forms(self, text, form):
        assert plain(text) == form

    def test_composed_and_decomposed_characters_are_equal_everywhere(self):
        for start in range(0, 0x30000, 0x40):
            block = " ".join(f"a{chr(code)}b" for code in range(start, start + 0x40) if not 0xD800 <= code < 0xE000)
            assert plain(unicodedata.normalize("NFD", block)) == plain(unicodedata.normalize("NFC", block)), hex(start)

    def test_letters_are_words_where_words_have_no_spaces(self):
        assert plain_words("你好, JAX!") == "你 好 jax"
        assert plain_words("これは3つ") == "こ れ は 3 つ"
        assert plain_words("ที่นี่") == "ที่ นี่"
        assert plain_words("turn on 한국어") == "turn on 한국어"
        rates = error_rates(["你好，世界。"], ["你们世界"])
        assert rates == {"wer": 0.25, "cer": 0.25}
        assert error_rates(["你好 world peace"], ["你好 world piece"])["wer"] == 0.25

    def test_nothing_expected(self):
        assert error_rates(["…"], [""]) == {"wer": 0, "cer": 0}
        assert error_rates(["…", "one two"], ["", "one"])["wer"] == 0.5


WORDS = """
the colour of organised programmes isn't twenty-one it's won't o'clock Mr. Dr. St. St John's $20 £3.50 €5 ten million
dollars one hundred and five point two three 1,000,000 first 2nd 1960s nineteen sixty double seven oh five half past
[noise] (laughs) <unk> naïve café Ærøskøbing Straße don’t let’s gonna I'd've cannot 50% 50 percent cents ¢5 -5 +7 3.14
e-mail A.I. uh um hmm mhm mm analyse catalogue grey jewellery 你好 世界 かな สวัสดี की का Việt Nam привет… «да» — – ½ ² ﬁne
ＡＢＣ soft\u00adhyphen
""".split()


def strings(count=400):
    draw = random.Random(0)
    made = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]
    return ["", " ", "...", *WORDS, *made, *(text.upper() for text in made[:50]), *(f" {text}, {text}.\n" for text in made[:50])]


class TestWhisper:
    @pytest.mark.parametrize(
        ("name", "original"),
        [
            ("whisper-english", whisper_normalizers.EnglishTextNormalizer()),
            ("whisper-basic", whisper_normalizers.BasicTextNormalizer()),
        ],
    )
    def test_equals_openais(self, name, original):
        assert len(strings()) > 500
        for text in strings():
            assert find_normalizer(name).text(text) == find_normalizer(name).words(text) == original(text).strip(), repr(text)

    def test_letters_equal_openais(self):
        normalizer = find_normalizer("whisper-letters")
        split, whole = whisper_normalizers.BasicTextNormalizer(split_letters=True), whisper_normalizers.BasicTextNormalizer()
        for text in strings():
            assert normalizer.words(text) == split(text).strip() and normalizer.text(text) == whole(text).strip()

    def test_spellings_are_openais_and_asked_for_where_their_package_is_missing(self, monkeypatch):
        assert english_spellings()["colour"] == "color" and len(english_spellings()) > 1000
        monkeypatch.setattr(normalizers.importlib.util, "find_spec", lambda name: None)
        find_normalizer.cache_clear()
        with pytest.raises(InputError, match="OpenAI's table of spellings, .*pip install --no-deps openai-whisper"):
            find_normalizer("whisper-english")

    def test_what_has_no_form_is_compared_as_it_is(self):
        for name in NORMALIZERS:
            assert exact_fraction(["\U0001f44d", "\U0001f44d ", "..."], ["\U0001f44e", "\U0001f44d", "!"], name) == 1 / 3

    def test_error_rates_are_those_of_the_originals_texts(self):
        expected, found = strings()[60:160], strings()[61:161]
        original = whisper_normalizers.EnglishTextNormalizer()
        wer = jiwer.wer([original(text) for text in expected], [original(text) for text in found])
        assert error_rates(expected, found, "whisper-english")["wer"] == wer > 0

    def test_numbers_and_spellings_are_forgiven_only_by_the_english_one(self):
        said, found = ["it is twenty-one colours"], ["it's 21 colors"]
        assert exact_fraction(said, found, "whisper-english") == 1
        assert exact_fraction(said, found, "whisper-basic") == exact_fraction(said, found) == 0


@pytest.mark.parametrize("name", ["", "basic", "Plain"])
def test_unknown_normalizers_are_refused(name):
    with pytest.raises(InputError, match=f"normaliser {name!r} found, expected one of {', '.join(NORMALIZERS)}"):
        error_rates(["a"], ["a"], name)


class TestEvaluateCommand:
    @pytest.mark.parametrize(
        ("arguments", "name", "wrong"),
        [
            ([], "plain", True),
            (["--normalizer", "whisper-english"], "whisper-english", False),
            (["--normalizer", "plain"], "plain", True),
        ],
    )
    def test_the_normalizer_is_chosen_and_recorded(self, monkeypatch, tmp_path, arguments, name, wrong):
        class Heard:
            config = SimpleNamespace(quantizer=SimpleNamespace(codes=4, mask_code=None))

            @classmethod
            def from_pretrained(cls, folder):
                return cls()

            def transcribe(self, paths):
                return ["It's 21 colors."] * len(paths)

            def encode(self, paths):
                return [np.array([1, 2], np.int32)] * len(paths)

        monkeypatch.setattr(evaluate, "SpeechTokenizer", Heard)
        soundfile.write(tmp_path / "a.wav", np.zeros(160), 16000)
        (tmp_path / "rows.jsonl").write_text(json.dumps({"path": "a.wav", "text": "it is twenty-one colours"}) + "\n")
        output = tmp_path / "result.json"
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"kind": "speech_tokenizer"}')
        model = str(tmp_path / "model")
        words = ["speech-tokenizer", "--model", model, "--output", str(output), str(tmp_path / "rows.jsonl"), *arguments]
        with pytest.raises(SystemExit) as end:
            evaluate.main(words)
        assert end.value.code == 0
        result = json.loads(output.read_text())
        assert result["normalizer"] == name and (result["metrics"]["wer"] > 0) == wrong

    def test_an_unknown_one_is_refused(self, capsys):
        with pytest.raises(SystemExit) as end:
            evaluate.main(["speech-tokenizer", "--model", "m", "--output", "o", "rows.jsonl", "--normalizer", "nfc"])
        assert end.value.code == 2 and "invalid choice: 'nfc'" in capsys.readouterr().err
