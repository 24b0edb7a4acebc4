"""The callback that tells a job's producer what a person decided."""

from __future__ import annotations

from datetime import UTC, datetime

from .. import webhooks
from ..outbox import Delivery, delivery_id
from .items import Decision, Entry

#: Seconds before the first attempt: until then a decision can be undone.
WAIT_S = 10.0
EVENT: webhooks.JobEvent = "job.reviewed"


def delivery_of(entry: Entry, decision: Decision) -> Delivery | None:
    """The delivery of a decision, the same at each call; None if the job has no callback for it."""
    if entry.callback is None:
        return None
    url, key_id = entry.callback
    moment = datetime.fromtimestamp(decision.decided, UTC).isoformat()
    item = entry.item
    whole = {"answer": decision.answer, "model_answer": item.answer}
    short = {name: text and webhooks.shortened(text) for name, text in whole.items()}
    body = webhooks.body(
        EVENT,
        moment,
        {
            "id": item.id,
            "task": item.task,
            "result": None,
            "error": None,
            **short,
            "confidence": item.confidence,
            "metadata": item.metadata,
            "truncated": [name for name in whole if short[name] != whole[name]],
        },
    )
    return Delivery(delivery_id(item.id, EVENT, moment), item.id, EVENT, url, key_id, body)
