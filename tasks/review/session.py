"""What the review page asks for, as JSON values, and what was decided on it since the command began."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from .guard import Refusal
from .review_list import ReviewList

#: Items that the page may ask for at once.
MAX_ITEMS = 1_000
_MAX_ID_CHARS = 1_000
_JPEG = b"\xff\xd8\xff"


class Session:
    """The decisions of one run of the command. Several threads may use it.

    The methods raise Refusal for what is not of the page's form, and IdeficsError, RedisError or kombu's
    OperationalError if Redis does not answer.
    """

    def __init__(self, reviews: ReviewList) -> None:
        self._reviews = reviews
        self._decided: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def items(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        """The oldest items, `limit` at most, and how many there are in all."""
        limit = _number(parameters.get("limit", ""), MAX_ITEMS)
        waiting = self._reviews.waiting(limit)
        return {"items": [asdict(item) for item in waiting], "left": self._reviews.count()}

    def picture(self, parameters: Mapping[str, str]) -> bytes:
        """The JPEG of an item's picture."""
        index = _number(parameters.get("index", ""), MAX_ITEMS)
        picture = self._reviews.picture(_id(parameters.get("id")), index)
        if picture is None or not picture.startswith(_JPEG):
            raise Refusal(HTTPStatus.NOT_FOUND, "The picture is not kept any more.")
        return picture

    def decide(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Save a decision: `answer` is a text, or None for "cannot tell"."""
        id, answer = _id(asked.get("id")), _answer(asked)
        is_saved = self._reviews.decide(id, answer)
        if is_saved:
            with self._lock:
                self._decided[id] = answer
        return {"saved": is_saved, "left": self._reviews.count()}

    def undo(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Take a decision back, unless it is too late."""
        id = _id(asked.get("id"))
        is_undone = self._reviews.undo(id)
        if is_undone:
            with self._lock:
                self._decided.pop(id, None)
        return {"undone": is_undone, "left": self._reviews.count()}

    def summary(self) -> str:
        """What was decided, in a sentence."""
        with self._lock:
            answers = list(self._decided.values())
        unknown = answers.count(None)
        told = "1 decision" if len(answers) == 1 else f"{len(answers):,} decisions"
        return f"{told}, {unknown:,} of them “cannot tell”." if unknown else f"{told}."


def _id(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_ID_CHARS or not _is_text(value):
        raise Refusal(HTTPStatus.BAD_REQUEST, "`id` must be an item's id.")
    return value


def _answer(asked: Mapping[str, Any]) -> str | None:
    answer = asked.get("answer", ...)
    if answer is None:
        return None
    if not isinstance(answer, str) or not _is_text(answer):
        raise Refusal(HTTPStatus.BAD_REQUEST, "`answer` must be a text, or null.")
    return answer


def _is_text(value: str) -> bool:
    """Without halves of surrogate pairs, which JSON can hold and Redis cannot."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _number(value: str, most: int) -> int:
    """A whole number from 0 to `most`."""
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise Refusal(HTTPStatus.BAD_REQUEST, "A parameter must be a whole number.")
    return min(int(value), most)
