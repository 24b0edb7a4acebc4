"""Doubtful answers, and the list that keeps them."""

from __future__ import annotations

import time
from typing import Any

from tasks.review import RankedAnswer, ReviewBounds, ReviewItem, ReviewList

WIDE = ReviewBounds(items=100, bytes=1_000_000, ttl_s=86_400)
HOOK = ("https://shop.test/hook", "main")


def item(id: str = "a", age_s: float = 0.0, **fields: Any) -> ReviewItem:
    known: dict[str, Any] = {
        "task": "idefics.classify",
        "asked": "Which one?",
        "answers": (RankedAnswer("cat", 0.6), RankedAnswer("dog", 0.4)),
        "confidence": 0.6,
        "min_confidence": 0.8,
        "pictures": 0,
        "metadata": {"row": 7},
        "answer": "cat",
        "model": "demo",
    }
    return ReviewItem(**{"id": id, "created": time.time() - age_s, **known, **fields})


def put(reviews: ReviewList, *items: ReviewItem, bounds: ReviewBounds = WIDE, **stored: Any) -> None:
    for one in items:
        assert reviews.put(one, [b"jpeg"] * one.pictures, bounds, **stored)


def ids(reviews: ReviewList) -> list[str]:
    return [item.id for item in reviews.waiting()]
