"""Prefixes of the keys in the two databases, as an app's options have them.

Kombu and Celery put them before their own keys, and we before ours, so that two deployments in one database stay apart.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

#: Kombu's own, before a priority's number in the name of a queue's list.
SEPARATOR = "\x06\x16"
#: What Celery's guide of priorities on Redis recommends.
GUIDES_SEPARATOR = ":"
#: Kombu's own: each number is a list, which has the priorities up to the next one.
STEPS = (0, 3, 6, 9)
#: The workers' and the client's: each priority has a list.
OUR_STEPS = tuple(range(10))


def results_prefix(app: Celery) -> str:
    """Before all keys in the results' Redis."""
    prefix = str((app.conf.result_backend_transport_options or {}).get("global_keyprefix") or "")
    # As Celery's backends do.
    return prefix if not prefix or prefix[-1] in ":_-." else f"{prefix}_"


def broker_prefix(app: Celery) -> str:
    """Before all keys in the queues' Redis."""
    return str(_broker(app).get("global_keyprefix") or "")


def separator(app: Celery) -> str:
    """Before a priority's number in the names of the lists that an app sends to."""
    return str(_broker(app).get("sep") or SEPARATOR)


def steps(app: Celery) -> tuple[int, ...]:
    """The priorities that an app has lists for."""
    return tuple(_broker(app).get("priority_steps") or STEPS)


def list_name(queue: str, step: int, sep: str) -> str:
    """A queue's list for a priority, as kombu calls it."""
    return f"{queue}{sep}{step}" if step else queue


def _broker(app: Celery) -> dict[str, Any]:
    return dict(app.conf.broker_transport_options or {})
