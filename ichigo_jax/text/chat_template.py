"""Chat templates that give the same text every day, on every machine.

A template is a small program that can ask for today's date (``strftime_now``, as Llama 3.2's does, or ``date_string``), and
jinja lets it draw at random. A model must see in answering what it saw in training, so here the date is a choice that is kept
with the model, month names are English whatever the locale, and drawing at random is refused. All else is as transformers
renders it.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import _compile_jinja_template

# The date of models that record none: the one that Llama's own templates name where they are given no clock.
UNRECORDED_DATE = "2024-07-26"

_DATE_NAMES = {"strftime_now", "date_string"}
_DATE_STRING = "%d %b %Y"  # the form of Llama's date_string

_MONTHS = "January February March April May June July August September October November December".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_DIRECTIVE = re.compile(r"%(?P<flag>[-_0^#]?)[EO]?(?P<letter>[a-zA-Z%])")


def asks_for_date(template: str) -> bool:
    """Whether what ``template`` writes may depend on the date; one that jinja cannot read writes nothing."""
    try:
        parsed = _environment().parse(template)
    except jinja2.TemplateSyntaxError:
        return False
    return not _DATE_NAMES.isdisjoint(jinja2.meta.find_undeclared_variables(parsed))


def render(template: str, date: str, variables: Mapping[str, Any]) -> str:
    """What a chat template writes.

    Args:
      template: in jinja.
      date: today's, as far as the template knows: year-month-day.
      variables: what the template sees: messages, special tokens, ``add_generation_prompt``.

    Raises:
      jinja2.TemplateError: whatever the template or jinja objects to.
    """
    return _compiled(template, date).render(**variables, date_string=strftime(date, _DATE_STRING))


def strftime(date: str, format: str) -> str:
    """``date`` (year-month-day) in ``format``: in English and at midnight UTC, whatever the locale and the time zone.

    ``strftime("2024-07-06", "%A, %-d %B %Y")`` -> ``"Saturday, 6 July 2024"``.
    """
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time(), datetime.UTC)
    month, weekday = _MONTHS[day.month - 1], _DAYS[day.weekday()]
    local = {  # what datetime would take from the locale, or (s) from the time zone
        "a": weekday[:3], "A": weekday, "b": month[:3], "h": month[:3], "B": month, "p": "AM", "P": "am", "r": "12:00:00 AM",
        "c": f"{weekday[:3]} {month[:3]} {day.day:2} 00:00:00 {day.year}",
        "x": f"{day.month:02}/{day.day:02}/{day.year % 100:02}", "X": "00:00:00", "s": f"{day.timestamp():.0f}",
    }  # fmt: skip

    def written(directive: re.Match) -> str:
        text = local.get(directive["letter"]) or day.strftime(f"%{directive['flag']}{directive['letter']}")
        return text.upper() if directive["flag"] == "^" else text

    return _DIRECTIVE.sub(written, format)


@functools.cache
def _environment() -> jinja2.Environment:
    """transformers' own environment, without its clock and without jinja's sources of randomness."""
    environment = _compile_jinja_template("").environment.overlay()
    known = {name: value for name, value in environment.globals.items() if name not in _DATE_NAMES}
    environment.globals = {**known, "lipsum": _refuse_to_draw}
    environment.filters = {**environment.filters, "random": _refuse_to_draw}
    return environment


def _refuse_to_draw(*args: Any, **kwargs: Any) -> None:
    raise jinja2.TemplateError("it draws at random; use one that gives the same text every time")


@functools.lru_cache(maxsize=64)
def _compiled(template: str, date: str) -> jinja2.Template:
    return _environment().from_string(template, globals={"strftime_now": functools.partial(strftime, date)})
