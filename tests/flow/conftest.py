"""What the flow tests share: a plain producer, its backend's worker, and a worker whose jobs the test holds up."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.support.gallery import Gallery
from tests.support.stand import Producer, Stand, plain_stand
from tests.support.waiting import PATIENCE_S
from worker.demo import stack


@pytest.fixture(scope="session")
def producer(fake_broker: stack.Broker) -> Producer:
    """Of the worker with the fake model."""
    return Producer(fake_broker)


@pytest.fixture(scope="session")
def backend(fake_broker: stack.Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The worker of the web backend's own tasks."""
    log = tmp_path_factory.mktemp("shop") / "log"
    command = [sys.executable, "-m", "celery", "-A", "tests.support.shop", "worker", "--queues", "shop"]
    command += ["--pool", "solo"]
    command += ["--hostname", "shop@%h", "--without-mingle", "--without-gossip", "--loglevel", "INFO"]
    environment = {**os.environ, "SHOP_BROKER": fake_broker.url, "SHOP_RESULTS": fake_broker.results}
    with stack.started(command, log=log, environment=environment) as process:
        stack.await_line(process, log, " ready.", PATIENCE_S)
        yield


@pytest.fixture
def server() -> Iterator[stack.Broker]:
    """A Redis server of the test's own. Modules that share one have a fixture of this name."""
    with stack.broker() as server:
        yield server


@pytest.fixture
def gallery() -> Iterator[Gallery]:
    """An image server of the test's own."""
    with Gallery().open() as gallery:
        yield gallery


@pytest.fixture(scope="module")
def held_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A worker of its own, started without a flag, whose jobs the test holds up."""
    log = tmp_path_factory.mktemp("held") / "log"
    with Gallery().open() as gallery, stack.broker() as server, plain_stand(server, gallery, log) as stood:
        yield stood
