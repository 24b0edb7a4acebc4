"""The callback of a decision, as its receiver reads it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest
from standardwebhooks import Webhook

from tasks.review.decision_callback import delivery_of
from tasks.review.items import Decision, Entry
from tasks.webhooks import MAX_BODY_BYTES, Event, Review, verify
from tests.support.receiver import SECRET
from tests.unit.review.listed import HOOK, item


def received(entry: Entry, decision: Decision) -> Event:
    delivery = delivery_of(entry, decision)
    assert delivery is not None
    assert len(delivery.body) <= MAX_BODY_BYTES
    now = datetime.now(UTC)
    signature = Webhook(SECRET).sign(delivery.id, now, delivery.body)
    sent = {"webhook-id": delivery.id, "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signature}
    return verify(SECRET, sent, delivery.body)


@pytest.mark.parametrize("answer", ["dog", None])
def test_a_receiver_reads_the_decision(answer: str | None) -> None:
    event = received(Entry(item("a"), callback=HOOK), Decision("a", answer, 1_700_000_000.5))
    (one,) = event.events
    assert (one.type, one.timestamp.timestamp()) == ("job.reviewed", 1_700_000_000.5)
    assert one.data == Review(
        id="a", task="idefics.classify", answer=answer, model_answer="cat", confidence=0.6, metadata={"row": 7}
    )


def test_a_receiver_that_looks_for_a_result_finds_none() -> None:
    event = received(Entry(item("a"), callback=HOOK), Decision("a", "dog", time.time()))
    data: Any = event.data
    assert (data.result, data.error) == (None, None)


def test_long_texts_fit_into_a_callback() -> None:
    long = item("a", answer="\u20ac" * 20_000, metadata={"text": "x" * 16_000})
    event = received(Entry(long, callback=HOOK), Decision("a", "\u20ac" * 20_000, time.time()))
    assert isinstance(event.data, Review)
    assert event.data.truncated == ["answer", "model_answer", "metadata"]
    assert event.data.answer == event.data.model_answer
    assert long.answer.startswith(event.data.model_answer)


def test_a_job_without_a_callback_sends_none() -> None:
    assert delivery_of(Entry(item("a")), Decision("a", "dog", time.time())) is None
