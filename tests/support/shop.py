"""A web backend's Celery app, as producers have one: it knows nothing of ours but the tasks' names.

Its worker reads the queue `shop`. What a callback gets, it keeps in a Redis list for the test to read.
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery

#: The Redis database with the lists.
NOTES = 2

app = Celery("shop", broker=os.environ.get("SHOP_BROKER"), backend=os.environ.get("SHOP_RESULTS"))
app.conf.update(task_default_queue="shop", worker_hijack_root_logger=False)


@app.task(name="shop.keep")
def keep(what: Any, under: str) -> Any:
    """Keep what a link, an errback or a chord hands over; answer with it."""
    port = app.connection().port
    with redis.Redis(port=port, db=NOTES) as notes:
        notes.rpush(under, json.dumps(what))
    return what


@app.task(name="shop.shout")
def shout(answer: dict[str, Any]) -> str:
    return str(answer["text"]).upper()


@app.task(name="shop.join")
def join(answers: list[dict[str, Any]]) -> str:
    return "+".join(answer["text"] for answer in answers)
