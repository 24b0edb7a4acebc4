"""A client, and the list of failed jobs beside its results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery

from tasks import Client
from tasks.failed import FailedJobs
from tests.unit.failed.kept import WIDE, _run
from worker.demo.stack import Broker
from worker.queue.dead_letters import keep_failures


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    client = Client(broker.url)
    yield client
    broker.connect(0).flushdb()
    broker.connect(1).flushdb()


@pytest.fixture
def jobs(client: Client) -> FailedJobs:
    return FailedJobs(client.app)


@pytest.fixture
def app(client: Client) -> Celery:
    """An app with a task, whose failures are kept."""
    app = client.app
    app.task(name="idefics.caption", shared=False)(_run)
    keep_failures(app, WIDE)
    return app
