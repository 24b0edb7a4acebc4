"""What the flow tests share: workers with the fake and with the bundled model, a plain producer, its backend's worker,
and a worker whose jobs the test holds up.

A worker without jobs takes a tenth of a core, so none lives longer than the tests that use it.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from tasks import Client
from tests.conftest import EXAMPLES, PICTURES, callback_settings
from tests.support.gallery import Gallery
from tests.support.stand import Producer, Stand, plain_stand
from tests.support.waiting import PATIENCE_S
from tests.support.web import Quiet, serving
from worker.demo import stack


@pytest.fixture(scope="module")
def fake_broker() -> Iterator[stack.Broker]:
    """A Redis server with a worker whose model answers with its prompt's last characters."""
    with stack.broker() as server, stack.worker(server, settings={"MODEL": "fake", "RETRY_BACKOFF_S": "0.2"}):
        yield server


class _Files(Quiet, SimpleHTTPRequestHandler):
    pass


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pictures and those of the examples, `cat.png` among them."""
    folder = tmp_path_factory.mktemp("pictures")
    for source in (PICTURES, EXAMPLES):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def pictures_url(pictures_folder: Path) -> Iterator[str]:
    """A web server's address with the pictures of `pictures_folder`."""
    with serving(functools.partial(_Files, directory=str(pictures_folder))) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def callback_port() -> int:
    """The only port that the demo worker's callbacks may go to."""
    return stack.free_port()


@pytest.fixture(scope="module")
def demo_broker(pictures_folder: Path, pictures_url: str, callback_port: int) -> Iterator[stack.Broker]:
    """A Redis server with a worker that serves the bundled model, its pictures and those of `pictures_url`."""
    settings = {
        "MODEL": "demo",
        "IMAGE_ROOT": str(pictures_folder),
        "IMAGE_ALLOW_NETWORKS": "127.0.0.0/8",
        "IMAGE_PORTS": pictures_url.rpartition(":")[2],
        "RETRY_BACKOFF_S": "0.2",
        **callback_settings(callback_port),
    }
    with stack.broker() as server, stack.worker(server, settings=settings):
        yield server


@pytest.fixture
def client(fake_broker: stack.Broker) -> Client:
    """Of the worker with the fake model."""
    return Client(fake_broker.url)


@pytest.fixture(scope="module")
def producer(fake_broker: stack.Broker) -> Producer:
    """Of the worker with the fake model."""
    return Producer(fake_broker)


@pytest.fixture(scope="module")
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
