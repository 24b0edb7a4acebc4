"""What the flow tests share: a plain producer, its backend's worker, and a worker whose jobs the test holds up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.canvas import Signature

from tests.flow import shop
from tests.flow.gallery import Gallery
from worker.demo import stack

#: Jobs that the held-up worker has at once; the others stay in the queue.
SLOTS = 4
#: Seconds for whatever a test waits for.
PATIENCE_S = 30.0


class Producer:
    """A Celery app as anybody has one, and short words for our jobs."""

    def __init__(self, server: stack.Broker) -> None:
        self.server = server
        self.app = Celery("producer", broker=server.url, backend=server.results)

    def complete(self, text: str = "Hello", tokens: int = 3, **options: Any) -> Signature:
        """A job that answers with the text's last characters."""
        return self._job({"prompt": [text], "max_new_tokens": tokens}, options)

    def show(self, url: str, tokens: int = 3, **options: Any) -> Signature:
        """A job that shows an image."""
        return self._job({"prompt": [{"image": url}, "Hello"], "max_new_tokens": tokens}, options)

    def _job(self, arguments: dict[str, Any], options: dict[str, Any]) -> Signature:
        return self.app.signature("idefics.complete", kwargs=arguments, queue="idefics", **options)

    def shop(self, task: str, *arguments: Any, immutable: bool = False) -> Signature:
        """A task of the web backend's own worker."""
        return self.app.signature(f"shop.{task}", args=arguments, queue="shop", immutable=immutable)

    def kept(self, under: str) -> str:
        """What `shop.keep` kept, as JSON; waits for it."""
        with self.server.connect(shop.NOTES) as notes:
            kept = notes.blpop([under], timeout=int(PATIENCE_S))
        assert kept, f"nothing was kept under {under}"
        return str(kept[1].decode())

    def queued(self) -> int:
        """Jobs that wait in the queue, in no worker."""
        with self.app.connection() as connection:
            connection.transport_options = {"priority_steps": list(range(10))}
            return int(connection.default_channel.queue_declare("idefics").message_count)

    def model_process(self) -> int:
        """The one worker's model process; 0 while there is none."""
        return next(iter(self.stats()["pool"]["processes"]), 0)

    def stats(self) -> dict[str, Any]:
        """What the one worker of ours says of itself."""
        found: list[dict[str, Any]] = []

        def ask() -> bool:
            answers = (self.app.control.inspect(timeout=0.5).stats() or {}).values()
            found.extend(answer for answer in answers if "Inference" in answer["pool"]["implementation"])
            return bool(found)

        eventually(ask)
        return found[0]


@dataclass(frozen=True)
class Stand:
    """A worker, its gallery, and who sends it jobs."""

    producer: Producer
    gallery: Gallery
    process: subprocess.Popen[bytes]
    log: Path


def eventually(holds: Callable[[], Any], timeout: float = PATIENCE_S) -> None:
    """Wait until it holds."""
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@contextmanager
def stand(server: stack.Broker, gallery: Gallery, log: Path, *arguments: str, **settings: str) -> Iterator[Stand]:
    """A worker that may read the gallery, with few slots, and a model of 20 ms a token."""
    chosen: Mapping[str, str] = {
        "MODEL": "fake:0.02",
        "PREFETCH": str(SLOTS),
        "RETRY_BACKOFF_S": "0.1",
        "IMAGE_ALLOW_NETWORKS": "127.0.0.0/8",
        "IMAGE_PORTS": str(gallery.port),
        "IMAGE_TIMEOUT_S": "60",
        "IMAGE_JOBS": settings.get("PREFETCH", str(SLOTS)),
        **settings,
    }
    with stack.worker(server, *arguments, settings=chosen, log=log) as process:
        yield Stand(Producer(server), gallery, process, log)


@pytest.fixture(scope="session")
def producer(fake_broker: stack.Broker) -> Producer:
    """Of the worker with the fake model."""
    return Producer(fake_broker)


@pytest.fixture(scope="session")
def backend(fake_broker: stack.Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The worker of the web backend's own tasks."""
    log = tmp_path_factory.mktemp("shop") / "log"
    command = [sys.executable, "-m", "celery", "-A", "tests.flow.shop", "worker", "--pool", "solo", "--queues", "shop"]
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
    with Gallery().open() as gallery, stack.broker() as server, stand(server, gallery, log) as stood:
        yield stood
