"""A broker and workers for the tests that need them: real ones, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tasks import Client
from worker.demo import stack

PICTURES = stack.CHECKOUT / "worker" / "demo" / "pictures"


@pytest.fixture(scope="session")
def broker() -> Iterator[stack.Broker]:
    """A Redis server without a worker."""
    with stack.broker() as server:
        yield server


@pytest.fixture(scope="session")
def fake_broker() -> Iterator[stack.Broker]:
    """A Redis server with a worker whose model answers with its prompt's last characters."""
    with stack.broker() as server, stack.worker(server, settings={"MODEL": "fake", "RETRY_BACKOFF_S": "0.2"}):
        yield server


@pytest.fixture(scope="session")
def demo_broker() -> Iterator[stack.Broker]:
    """A Redis server with a worker that serves the bundled model and its pictures."""
    settings = {"MODEL": "demo", "IMAGE_ROOT": str(PICTURES), "RETRY_BACKOFF_S": "0.2"}
    with stack.broker() as server, stack.worker(server, settings=settings):
        yield server


@pytest.fixture
def client(fake_broker: stack.Broker) -> Client:
    """Of the worker with the fake model."""
    return Client(fake_broker.url)


@pytest.fixture
def demo_client(demo_broker: stack.Broker) -> Client:
    """Of the worker with the bundled model."""
    return Client(demo_broker.url)
