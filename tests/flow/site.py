"""A web site's Celery app in Django's manner: settings with a prefix, shared tasks, no word about queues of its own.

It knows our tasks by their names only. What a task gets, it keeps in a Redis list for the test to read.
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery, shared_task

from tests.flow.site_settings import NOTES, RoutedSettings, Settings

app = Celery("site", set_as_current=False)
app.config_from_object(RoutedSettings if os.environ.get("SITE_ROUTES") else Settings, namespace="CELERY")
app.set_default()


def _note(what: Any, under: str) -> None:
    with redis.Redis(port=app.connection().port, db=NOTES) as notes:
        notes.rpush(under, json.dumps(what))


@shared_task(name="site.save")
def save(what: Any, under: str) -> Any:
    _note(what, under)
    return what


@shared_task(name="site.report")
def report(what: Any, under: str) -> Any:
    """Read from a queue of its own, `reports`."""
    _note(what, under)
    return what


@shared_task(name="site.mourn")
def mourn(id: str, under: str) -> None:
    _note(id, under)


@shared_task(name="site.join")
def join(answers: list[Any], under: str) -> str:
    texts = [answer["text"] if isinstance(answer, dict) else str(answer) for answer in answers]
    _note(texts, under)
    return "+".join(texts)


@shared_task(name="site.number")
def number(value: int) -> int:
    return value
