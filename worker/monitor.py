"""The app of Celery's own monitors, for the Redis user `monitor`: `celery -A worker.monitor flower`, or `events`.

Flower on the broker's URL alone reads the lists of stock Celery's four priorities, in `celery` and the queues that it
hears of. This app tells it our priorities, queues and certificates, so that it counts every job.

The user may not send commands to workers, and this app sends none: it asks for no events, since our workers send them
without being asked, and inspects no worker. So Flower shows tasks, their states and queues, but no worker's settings.
"""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from celery import Celery
from celery.app.control import Control
from celery.signals import import_modules
from kombu import Queue

from config.celery import configuration
from config.settings import Settings, load
from tasks.model_directory import read_models
from tasks.protocol import DEFAULT_PRIORITY


class SilentControl(Control):  # type: ignore[misc]
    """Sends no command, as if no worker answered."""

    def broadcast(self, *args: Any, reply: bool = False, **options: Any) -> list[dict[str, Any]] | None:
        return [] if reply else None


def monitor_app(settings: Settings) -> Celery:
    """An app that reads the broker and changes nothing."""
    app = Celery("idefics.monitor", control=SilentControl, set_as_current=False)
    app.conf.update(configuration(settings, settings.queue, DEFAULT_PRIORITY))
    app.conf.update(
        # A monitor may not read results.
        result_backend=None,
        task_default_queue=settings.queue,
        # Flower reads the certificates here only.
        broker_use_ssl=_certificates(settings.broker.url),
    )
    # Kombu would look for messages that workers lost.
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "ack_emulation": False}
    return app


def _certificates(url: str) -> dict[str, str] | None:
    parts = urlsplit(url)
    options = {name: value for name, value in parse_qsl(parts.query) if name.startswith("ssl_")}
    return options if parts.scheme == "rediss" else None


def known_queues(app: Celery, queue: str) -> list[Queue]:
    """The queues of all models that workers have registered, and `queue`."""
    return [Queue(name) for name in sorted({queue, *read_models(app).queues.values()})]


settings = load()
app = monitor_app(settings)


@import_modules.connect(sender=app, weak=False)  # type: ignore[untyped-decorator]
def _prepare(sender: Celery, **_: Any) -> None:
    sender.conf.task_queues = known_queues(sender, settings.queue)
    # It warns each time that no worker answers.
    logging.getLogger("flower.inspector").setLevel(logging.ERROR)
