"""A small world of spoken requests with text answers, for the quickstart and the tests.

Every fact is asked for in at least two wordings, so a request that was never heard in training can still be answered
from one that was. Texts are lower-case words, numbers spelled out.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

DIGITS = "zero one two three four five six seven eight nine".split()
ROOMS = "kitchen bedroom office garden".split()
DEVICES = "light fan heater radio camera".split()
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("happy", "sad"),
    ("open", "closed"),
]
DIGIT_STRINGS = {2: 50, 3: 100}  # length: how many of that length


@dataclasses.dataclass(frozen=True)
class Request:
    """What is said, what should be answered, and the kind of request; the same answer of a kind is the same fact."""

    text: str
    answer: str
    kind: str


def requests() -> list[Request]:
    """Every request there is, each text once, always in the same order.

    >>> [request.answer for request in requests() if request.text == "what is three plus four"]
    ['three plus four is seven']
    """
    return [*_devices(), *_sums(), *_digit_strings(), *_opposites()]


def _worded(kind: str, answer: str, *texts: str) -> list[Request]:
    return [Request(text, answer, kind) for text in texts]


def _devices() -> list[Request]:
    found = []
    for room, device, state in itertools.product(ROOMS, DEVICES, ("on", "off")):
        found += _worded(
            "device",
            f"okay the {room} {device} is {state}",
            f"turn {state} the {room} {device}",
            f"turn the {room} {device} {state}",
            f"switch {state} the {room} {device}",
            f"please switch the {room} {device} {state}",
        )
    return found


def _sums() -> list[Request]:
    """Sums whose result is a digit."""
    found = []
    for a, b in itertools.product(range(10), repeat=2):
        if a + b < 10:
            fact = f"{DIGITS[a]} plus {DIGITS[b]}"
            found += _worded(
                "sum",
                f"{fact} is {DIGITS[a + b]}",
                f"what is {fact}",
                f"how much is {fact}",
                f"tell me {fact}",
                f"add {DIGITS[a]} and {DIGITS[b]}",
            )
    return found


def _digit_strings() -> list[Request]:
    """Each of a fixed sample of digit strings to repeat, and to say backwards."""
    found = []
    for length, count in DIGIT_STRINGS.items():
        for digits in random.Random(0).sample(list(itertools.product(DIGITS, repeat=length)), count):
            string, backwards = " ".join(digits), " ".join(reversed(digits))
            found += _worded("repeat", string, f"repeat {string}", f"say {string}")
            found += _worded("backwards", backwards, f"say {string} backwards", f"reverse {string}")
    return found


def _opposites() -> list[Request]:
    found = []
    for pair in OPPOSITES:
        for word, opposite in (pair, pair[::-1]):
            found += _worded(
                "opposite",
                f"the opposite of {word} is {opposite}",
                f"what is the opposite of {word}",
                f"tell me the opposite of {word}",
                f"say the opposite of {word}",
                f"name the opposite of {word}",
            )
    return found
