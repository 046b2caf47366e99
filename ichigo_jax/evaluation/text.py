"""How close recognised or answered text is to what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import jiwer

from ichigo_jax.evaluation.normalizers import PLAIN, find_normalizer


def error_rates(expected: Sequence[str], found: Sequence[str], normalizer: str = PLAIN) -> dict[str, float]:
    """Word and character error rate over a whole set: edits divided by the words, or characters, that were expected.

    In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) the word error rate counts each
    letter as a word, so it is near the character error rate; a mixed text counts letters there and words elsewhere.

    Args:
      expected: what should have been found.
      found: as many texts.
      normalizer: the form in which they are compared, see ``normalizers``.

    Raises:
      InputError: an unknown normaliser.
    """
    text, words = find_normalizer(normalizer)
    wer = jiwer.wer([words(each) for each in expected], [words(each) for each in found])
    cer = jiwer.cer([text(each) for each in expected], [text(each) for each in found])
    return {"wer": wer, "cer": cer}


def exact_fraction(expected: Sequence[str], found: Sequence[str], normalizer: str = PLAIN) -> float:
    """Share of texts that are equal in the form in which ``error_rates`` compares them, or as they are where that is empty."""
    text = find_normalizer(normalizer).text
    forms = lambda each: text(each) or each.strip()  # noqa: E731  # of emoji alone no form is left
    return sum(forms(a) == forms(b) for a, b in zip(expected, found, strict=True)) / max(len(expected), 1)
