"""Failed jobs on a real worker: each is kept, wherever it failed, and goes on where it was when it is sent again."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import chain
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from tasks import Client
from tests.support.gallery import PNG, Gallery
from tests.support.stand import Stand, command, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's image root, empty at first."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def stood(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    log = tmp_path_factory.mktemp("failed") / "log"
    settings = {"MAX_RETRIES": "1", "IMAGE_ROOT": str(root)}
    with Gallery().open() as gallery, stack.broker() as server, stand(server, gallery, log, **settings) as stood:
        yield stood


@pytest.fixture
def client(stood: Stand) -> Iterator[Client]:
    client = Client(stood.producer.server.url)
    yield client
    stood.producer.server.connect(1).flushdb()


def codes(client: Client) -> dict[str, str]:
    return {job.id: job.code for job in client.failed()}


def fails(job: AsyncResult) -> str:
    return str(job.get(timeout=PATIENCE_S, propagate=False).args[0])


def test_a_job_whose_cause_was_repaired_goes_on_under_its_id_with_its_link_and_chain(
    stood: Stand, client: Client, root: Path
) -> None:
    producer, server, link = stood.producer, stood.producer.server, str(uuid.uuid4())
    first = producer.app.signature(
        "idefics.complete",
        kwargs={"prompt": [{"image": {"path": "cat.png"}}, "Hello"], "max_new_tokens": 3},
        queue="idefics",
        link=producer.complete("linked", immutable=True, task_id=link),
    )
    last = chain(first, producer.complete("chained", immutable=True)).apply_async()
    job = last.parent
    assert fails(job) == "image_invalid"
    eventually(lambda: codes(client) == {job.id: "image_invalid"})
    assert job.id in command(server, "celery", "-A", "worker.app", "failed", "ls")
    shown = json.loads(command(server, "tasks", "failed", "show", job.id))
    assert shown["signature"]["options"]["link"][0]["options"]["task_id"] == link

    (root / "cat.png").write_bytes(PNG)
    assert command(server, "celery", "-A", "worker.app", "failed", "retry", job.id) == "1 jobs sent again\n"

    # As another process reads them: this one's handle remembers the failure.
    assert client.result(job.id, PATIENCE_S).text == "llo"
    assert client.result(link, PATIENCE_S).text == "ked"
    assert client.result(last.id, PATIENCE_S).text == "ned"
    assert codes(client) == {}


def test_a_job_that_used_up_its_retries_is_kept_with_their_number(stood: Stand, client: Client) -> None:
    name = uuid.uuid4().hex
    job = stood.producer.show(stood.gallery.broken(name, times=2)).apply_async()
    assert fails(job) == "image_unreachable"
    eventually(lambda: codes(client))
    (kept,) = client.failed()
    assert (kept.id, kept.code, kept.attempts) == (job.id, "image_unreachable", 2)
    # The third answer is a picture.
    assert client.retry(job.id).result(PATIENCE_S).text == "llo"


def test_a_lost_job_is_kept_by_the_parent_with_its_link(stood: Stand, client: Client) -> None:
    producer, name, link = stood.producer, uuid.uuid4().hex, str(uuid.uuid4())
    follow = producer.complete("linked", immutable=True, task_id=link)
    job = producer.show(stood.gallery.held(name), link=follow).apply_async()
    for deaths in range(1, 3):
        eventually(lambda times=deaths: stood.gallery.asked.count(name) == times)
        os.kill(producer.model_process(), signal.SIGKILL)
    assert fails(job) == "worker_lost"
    eventually(lambda: codes(client) == {job.id: "worker_lost"})
    stood.gallery.release(name)
    assert client.retry(job.id).result(PATIENCE_S).text == "llo"
    assert client.result(link, PATIENCE_S).text == "ked"


def test_a_job_over_its_hard_limit_is_kept_with_its_link(stood: Stand, client: Client) -> None:
    producer, name, link = stood.producer, uuid.uuid4().hex, str(uuid.uuid4())
    follow = producer.complete("linked", immutable=True, task_id=link)
    job = producer.show(stood.gallery.held(name), link=follow, time_limit=3.0, soft_time_limit=2.9).apply_async()
    assert fails(job) == "deadline_exceeded"
    eventually(lambda: codes(client) == {job.id: "deadline_exceeded"})
    stood.gallery.release(name)
    assert client.retry(job.id).result(PATIENCE_S).text == "llo"
    assert client.result(link, PATIENCE_S).text == "ked"


def test_a_job_that_succeeds_or_is_canceled_is_not_kept(stood: Stand, client: Client) -> None:
    fine = stood.producer.complete().apply_async()
    taken = stood.producer.complete(tokens=500).apply_async()
    eventually(lambda: taken.state == "STARTED")
    client.cancel(taken.id)
    with pytest.raises(TaskRevokedError):
        taken.get(timeout=PATIENCE_S)
    fine.get(timeout=PATIENCE_S)
    bad = stood.producer.complete(tokens=-1).apply_async()
    assert fails(bad) == "invalid_request"
    eventually(lambda: codes(client) == {bad.id: "invalid_request"})
