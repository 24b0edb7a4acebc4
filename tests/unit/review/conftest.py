"""An app, and the review list beside its results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery

from tasks.apps import app_at
from tasks.outbox import Outbox, outbox_of
from tasks.review import ReviewList
from worker.demo.stack import Broker


@pytest.fixture
def app(broker: Broker) -> Iterator[Celery]:
    yield app_at(broker.url, None)
    broker.connect(0).flushdb()
    broker.connect(1).flushdb()


@pytest.fixture
def reviews(app: Celery) -> ReviewList:
    return ReviewList(app)


@pytest.fixture
def outbox(app: Celery) -> Outbox:
    return outbox_of(app)
