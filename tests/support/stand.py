"""A worker, who sends it jobs, and an image server that holds them up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from celery.canvas import Signature

from tests.support import shop
from tests.support.gallery import Gallery
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

#: Jobs that the held-up worker has at once; the others stay in the queue.
SLOTS = 4


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


@contextmanager
def stand(server: stack.Broker, gallery: Gallery, log: Path, *arguments: str, **settings: str) -> Iterator[Stand]:
    """A worker that may read the gallery, with few slots, and a model of 20 ms a token.

    It does not wait a second for other workers' answers at its start.
    """
    with plain_stand(server, gallery, log, "--without-mingle", *arguments, **settings) as stood:
        yield stood


@contextmanager
def plain_stand(server: stack.Broker, gallery: Gallery, log: Path, *arguments: str, **settings: str) -> Iterator[Stand]:
    """A `stand` whose worker is started with these arguments alone."""
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


def callbacks_worker(
    server: stack.Broker, log: Path, settings: dict[str, str]
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return stack.worker(server, settings=settings, log=log, app="worker.callbacks")


def command(server: stack.Broker, *words: str) -> str:
    environment = {**os.environ, "IDEFICS_BROKER_URL": server.url, "IDEFICS_RESULT_BACKEND": server.results}
    program = [sys.executable, "-m", *words]
    done = subprocess.run(
        program, cwd=stack.CHECKOUT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
