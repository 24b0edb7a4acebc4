"""When an answer is right: labels and texts compared with the truths that a row accepts. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What the evaluation of VQA v2 removes, and the typographic forms of quotes.
_PUNCTUATION = str.maketrans(dict.fromkeys(';/[]"{}()=+\\_-><@`,?!“”«»', " "))
_APOSTROPHES = str.maketrans(dict.fromkeys("'\u2018\u2019", ""))
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PERIOD_OF_TEXT = re.compile(r"\.(?!\d)|(?<!\d)\.")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Match:
    """How an answer compares with the truths of its row; a label's two comparisons are the same."""

    is_answered: bool
    is_exact: bool
    is_normalised: bool


NO_ANSWER = Match(False, False, False)


def normalised(text: str) -> str:
    """The text by the rules of VQA v2's evaluation.

    Lower case; without punctuation, apostrophes and the articles a, an and the; number words up to ten as digits; words
    parted by single spaces. A point between digits stays (2.5), a comma between digits goes (1,000 is 1000).
    """
    plain = _COMMA_IN_NUMBER.sub("", text.lower()).translate(_APOSTROPHES).translate(_PUNCTUATION)
    words = _PERIOD_OF_TEXT.sub("", plain).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def accepted(value: Any, separator: str | None = None) -> tuple[str, ...]:
    """The truths that a cell accepts, in order: a list, JSON of a list, parts between separators, or one text.

    Empty ones are left out, so an empty cell accepts nothing.
    """
    if isinstance(value, str) and separator is not None:
        parts: Sequence[Any] = value.split(separator)
    elif isinstance(value, str):
        parts = _json_list(value) or [value]
    else:
        parts = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text for text in map(as_text, parts) if text)


def as_text(value: Any) -> str:
    """A cell's value as the text that answers are compared with; an empty one for no value."""
    if isinstance(value, str):
        return value.strip()
    if value is None or value != value:  # the second: NaN, as typed tables have for no value
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def match_label(answer: str | None, truths: Sequence[str]) -> Match:
    """Labels are right if they are one of the truths, letter for letter."""
    if answer is None:
        return NO_ANSWER
    is_right = answer in truths
    return Match(True, is_right, is_right)


def match_text(answer: str | None, truths: Sequence[str]) -> Match:
    """Texts are right exactly, or after both sides were `normalised`."""
    if answer is None:
        return NO_ANSWER
    is_exact = answer in truths
    return Match(True, is_exact, is_exact or normalised(answer) in map(normalised, truths))


def _json_list(text: str) -> list[Any] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None
