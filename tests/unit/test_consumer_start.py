"""What can happen to Celery's consumer while it starts, beside messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.utils.objects import Bunch
from celery.worker.consumer.mingle import Mingle
from kombu.exceptions import OperationalError

from config.settings import load
from worker.queue.consumer import Consumer


def _consumer(sync: Callable[[Any], None]) -> tuple[Consumer, Mingle]:
    app = Celery("mingles", broker="redis://nowhere:1/0", backend="cache+memory://", set_as_current=False)
    app.settings = load()
    controller = Bunch(use_eventloop=False, semaphore=None)
    consumer = Consumer(lambda request: None, app=app, hostname="here", controller=controller)
    mingle = next(step for step in consumer.steps if isinstance(step, Mingle))
    mingle.send_hello = sync
    return consumer, mingle


def _raise(error: Exception) -> Callable[[Any], None]:
    def sync(consumer: Any) -> None:
        raise error

    return sync


def test_a_connection_that_drops_during_mingling_is_made_again() -> None:
    # What a worker ended of: kombu names it so where it has published in vain.
    consumer, mingle = _consumer(_raise(OperationalError("Connection closed by server.")))
    with pytest.raises(OperationalError) as raised:
        mingle.start(consumer)
    assert isinstance(raised.value, consumer.connection_errors)


def test_the_worker_starts_although_mingling_fails() -> None:
    consumer, mingle = _consumer(_raise(TypeError("half an answer")))
    mingle.start(consumer)
