"""Forms of a text in which two texts are compared, so that scores count what was said and not how it was typed.

``plain`` is this project's own, for every language. The others are those of OpenAI's Whisper, for figures that stand beside
published word error rates: ``whisper-english`` for English, ``whisper-basic`` for other languages, and ``whisper-letters`` for
the languages that the Whisper paper splits into letters (Chinese, Japanese, Thai, Lao, Burmese).
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import regex

from ichigo_jax.errors import InputError
from ichigo_jax.storage import read_json

PLAIN = "plain"
NORMALIZERS = (PLAIN, "whisper-english", "whisper-basic", "whisper-letters")

# Scripts whose words have no spaces between them.
_UNSPACED = r"[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{Thai}\p{Lao}\p{Khmr}\p{Mymr}--\p{N}]"
_WORD = r"\p{L}\p{M}\p{N}"  # inside a character class

_APOSTROPHES = str.maketrans(dict.fromkeys("’‘‛ʼʻʹ′＇`´׳", "'"))
_BEFORE_NFKC = _APOSTROPHES | str.maketrans("゛゜٫٬", "\u3099\u309a.,")  # NFKC would cut the voicing mark off its letter
_AFTER_LOWER = {"i\u0307": "i", "⁄": "/"}  # İ is i in lower case, not i and a dot; ½ is 1/2
# Soft hyphens, zero-width and bidirectional marks, variation selectors, the box of a keycap.
_INVISIBLE = regex.compile(r"[\p{DI}\p{Cf}\u20e3]+")
_RAISED_AFTER_DIGIT = regex.compile(r"(?<=\p{Nd})(?=[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u215f\u2189])")
_BARE_MARKS = regex.compile(rf"(?<![{_WORD}])\p{{M}}+")
_DIGITS = regex.compile(r"[^\P{Nd}0-9]")
_DASH = r"[-\u2010\u2012\u2013\u2212]"
_NOT_OF_WORDS = regex.compile(
    rf"""
      (?P<sign>      (?<! [{_WORD})\]%°] ) {_DASH} (?= \p{{Sc}}? \.? \p{{Nd}} ) )
    | (?P<operator>  (?<= \p{{Nd}}\s ) {_DASH} (?= \s\p{{Nd}} ) )
    | (?P<of_number> (?<= \p{{Nd}} ) [.,/] (?= \p{{Nd}} ) | (?<! [{_WORD}.] ) \. (?= \p{{Nd}} ) )
    | (?P<of_word>   (?<= [{_WORD}] ) ' (?= [\p{{L}}\p{{N}}] ) )
    | (?P<symbol>    [[\p{{Sc}}\p{{Sm}}%‰&@°]--[|~\u2212]] )
    | (?P<other>     [^{_WORD}] )
    """,
    regex.VERBOSE | regex.VERSION1,
)
_SPACE_BESIDE_UNSPACED = regex.compile(rf"(?<={_UNSPACED})\s+|\s+(?={_UNSPACED})", regex.VERSION1)
_UNSPACED_LETTER = regex.compile(rf"({_UNSPACED}\p{{M}}*)", regex.VERSION1)


class Normalizer(NamedTuple):
    """How texts are compared.

    Attributes:
      text: a text to its form for ``cer`` and for equality.
      words: a text to the same form with a space between any two words, for ``wer``.
    """

    text: Callable[[str], str]
    words: Callable[[str], str]


def plain(text: str) -> str:
    """Lower case, without punctuation: ``' Turn ON, please. '`` -> ``'turn on please'``.

    What is only typing makes no difference: composed or decomposed characters, ligatures, full-width forms, the digits of a
    script, the kind of an apostrophe or dash, invisible characters, and spaces beside letters of a script that has none between
    its words. What is spoken stays: letters, their marks (vowel signs, tones, accents), apostrophes inside words, the sign and
    the decimal point of a number, and symbols such as ``%``, ``$`` and ``+``, each a word of its own.

    ``"It’s −5 %!"`` -> ``"it's -5 %"``; ``"你好，世界。"`` -> ``"你好世界"``.
    """
    text = _RAISED_AFTER_DIGIT.sub(" ", _INVISIBLE.sub("", text))  # else 10² would become 102
    text = unicodedata.normalize("NFKC", text.translate(_BEFORE_NFKC)).lower()
    for typed, meant in _AFTER_LOWER.items():
        text = text.replace(typed, meant)
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    text = _DIGITS.sub(lambda digit: str(unicodedata.decimal(digit[0], digit[0])), text)
    text = _NOT_OF_WORDS.sub(_kept, text)
    text = _BARE_MARKS.sub("", text)
    return _SPACE_BESIDE_UNSPACED.sub("", " ".join(text.split()))


def _kept(match: regex.Match) -> str:
    kind, found = match.lastgroup, match[0]
    return {"sign": " -", "operator": " - ", "of_number": found, "of_word": found, "symbol": f" {found} "}.get(kind, " ")


def plain_words(text: str) -> str:
    """As ``plain``, and in scripts without spaces every letter with its marks is a word: ``"你好 JAX"`` -> ``"你 好 jax"``."""
    return " ".join(_UNSPACED_LETTER.sub(r" \1 ", plain(text)).split())


def english_spellings() -> dict[str, str]:
    """British spellings and their American ones, as Whisper's English normaliser replaces them.

    The table is OpenAI's and comes with their package, which need not be importable: ``pip install --no-deps openai-whisper``.

    Raises:
      InputError: the package is not installed.
    """
    package = importlib.util.find_spec("whisper")
    file = Path(package.origin).parent / "normalizers" / "english.json" if package and package.origin else None
    if file is None or not file.is_file():
        raise InputError(
            "normaliser 'whisper-english' found without OpenAI's table of spellings, expected their package; "
            "run: pip install --no-deps openai-whisper"
        )
    return read_json(file)


@functools.cache
def find_normalizer(name: str) -> Normalizer:
    """The normaliser of that name, one of ``NORMALIZERS``.

    Raises:
      InputError: no such normaliser, or one that needs what is not installed.
    """
    if name not in NORMALIZERS:
        raise InputError(f"normaliser {name!r} found, expected one of {', '.join(NORMALIZERS)}")
    return Normalizer(plain, plain_words) if name == PLAIN else _whisper(name)


def _whisper(name: str) -> Normalizer:
    from transformers.models.whisper import english_normalizer as originals  # here: transformers takes seconds to import

    if name == "whisper-english":
        normalize = split = originals.EnglishTextNormalizer(english_spellings())
    else:
        normalize = originals.BasicTextNormalizer()
        split = originals.BasicTextNormalizer(split_letters=True) if name == "whisper-letters" else normalize
    return Normalizer(lambda text: normalize(text).strip(), lambda text: split(text).strip())
