"""What several tests of producers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery

from tasks.apps import app_at
from worker.demo.stack import Broker


@pytest.fixture
def server(broker: Broker) -> Iterator[Broker]:
    """A Redis server without a worker, whose queues' database is empty."""
    broker.connect().flushdb()
    yield broker
    broker.connect().flushdb()


@pytest.fixture
def app(server: Broker) -> Celery:
    """A producer's Celery app on it."""
    return app_at(server.url, None)
