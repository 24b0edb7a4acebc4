"""A broker and workers for the tests that need them: real ones, started once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from tasks import Client
from tests.support.web import Quiet, serving
from worker.demo import stack

PICTURES = stack.CHECKOUT / "worker" / "demo" / "pictures"
EXAMPLES = stack.CHECKOUT / "examples" / "pictures"


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


class _Files(Quiet, SimpleHTTPRequestHandler):
    pass


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pictures and those of the examples, `cat.png` among them."""
    folder = tmp_path_factory.mktemp("pictures")
    for source in (PICTURES, EXAMPLES):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def pictures_url(pictures_folder: Path) -> Iterator[str]:
    """A web server's address with the pictures of `pictures_folder`."""
    with serving(functools.partial(_Files, directory=str(pictures_folder))) as port:
        yield f"http://127.0.0.1:{port}"


#: What signs callbacks of the demo worker, under the id `main`.
SITE_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def callback_settings(port: int) -> dict[str, str]:
    """Of workers whose callbacks go to a server on this machine."""
    return {
        "CALLBACK_KEYS": f"main={SITE_SECRET}",
        "CALLBACK_ALLOW_HTTP": "true",
        "CALLBACK_ALLOW_NETWORKS": "127.0.0.0/8",
        "CALLBACK_PORTS": str(port),
    }


@pytest.fixture(scope="session")
def callback_port() -> int:
    """The only port that the demo worker's callbacks may go to."""
    return stack.free_port()


@pytest.fixture(scope="session")
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


@pytest.fixture
def demo_client(demo_broker: stack.Broker) -> Client:
    """Of the worker with the bundled model."""
    return Client(demo_broker.url)
