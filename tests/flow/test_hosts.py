"""Two workers and a slow image host: they share its slots, and its jobs wait without being sent again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.hosts import Host
from tasks import Caption, Client, Complete
from tests.support.waiting import PATIENCE_S
from worker.demo import stack

#: Downloads from the host at once, by both workers; seconds of each; and jobs that a worker takes.
SLOTS, DOWNLOAD_S, PLACES = 2, 0.2, 4


@pytest.fixture(scope="module")
def host() -> Host:
    return Host(DOWNLOAD_S)


@pytest.fixture(scope="module")
def server(host: Host) -> Iterator[tuple[stack.Broker, int]]:
    with contextlib.ExitStack() as opened:
        port = opened.enter_context(host.open())
        server = opened.enter_context(stack.broker())
        settings = {
            "MODEL": "fake",
            "PREFETCH": str(PLACES),
            "IMAGE_JOBS": str(PLACES),
            "IMAGE_HOST_CONCURRENCY": str(SLOTS),
            "IMAGE_HOST_SHARED": str(SLOTS),
            "IMAGE_ALLOW_NETWORKS": "127.0.0.0/8",
            "IMAGE_PORTS": str(port),
        }
        for name in ("one", "other"):
            opened.enter_context(stack.worker(server, "-n", f"{name}@here", "--without-mingle", settings=settings))
        yield server, port


def test_pictures_wait_for_their_host_without_being_sent_again_and_other_jobs_pass_them(
    server: tuple[stack.Broker, int], host: Host
) -> None:
    broker, port = server
    client = Client(broker.url)

    def published() -> int:
        stats: Any = broker.connect().info("commandstats")
        return int(stats.get("cmdstat_lpush", {}).get("calls", 0))

    before = published()
    pictures = [Caption(image=f"http://127.0.0.1:{port}/{number}.png", max_new_tokens=2) for number in range(50)]
    jobs = list(client.submit_many(pictures))
    # More jobs wait than both workers have places for.
    assert client.submit(Complete(prompt=["hello"], max_new_tokens=2)).result(PATIENCE_S).text
    assert sum(is_ended(broker, job.id) for job in jobs) < len(jobs) - PLACES
    for job in jobs:
        assert job.result(PATIENCE_S).text
    assert host.most_at_once == SLOTS
    assert published() - before == len(jobs) + 1


def is_ended(broker: stack.Broker, id: str) -> bool:
    stored: Any = broker.connect(1).get(f"celery-task-meta-{id}")
    return stored is not None and b'"status": "SUCCESS"' in stored[:40]
