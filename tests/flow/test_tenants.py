"""Two tenants share a worker and its caches: nothing that one of them sends shows in what the other one gets."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest

from tasks import Caption, Classify, Client, Complete, Job, JobError, SubmittedJob
from tasks.redis_keys import ANSWER
from tests.support.events import Events
from tests.support.gallery import Gallery
from tests.support.pictures import data_uri, png
from tests.support.stand import Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

#: Jobs of each kind and tenant.
ROUNDS = 6


@pytest.fixture(scope="module")
def stood(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A worker with room for many jobs at once, and with all caches on."""
    log = tmp_path_factory.mktemp("tenants") / "log"
    caches = {"ANSWER_CACHE_TTL_S": "60", "IMAGE_CACHE_BYTES": "1000000"}
    with (
        Gallery().open() as gallery,
        stack.broker() as server,
        stand(server, gallery, log, "-E", MODEL="fake:0.002", PREFETCH="64", MAX_RETRIES="0", **caches) as stood,
    ):
        yield stood


def picture(red: int) -> str:
    return data_uri(png((red, 90, 90)))


def broken(marker: str) -> str:
    """A picture by its first bytes only."""
    return data_uri(b"\x89PNG\r\n\x1a\n" + marker.encode())


def jobs(marker: str, number: int, gallery: Gallery) -> list[tuple[str, Job]]:
    """Jobs with the marker wherever a job has a text; with each, what it answers or the code of its error."""
    own = {"metadata": {"of": marker, marker: [marker]}}
    said = {"max_new_tokens": len(marker)}
    shared = gallery.picture(f"shared-{number}")
    return [
        (marker, Complete(prompt=[marker], **said, **own)),
        (marker, Complete(prompt=[picture(number), marker], **said, **own)),
        (marker, Complete(prompt=[shared, marker], **said, **own)),
        # The same for both tenants, so that one gets the other's answer from the cache.
        ("same", Complete(prompt=[shared, f"{number} the same"], max_new_tokens=4, **own)),
        (marker, Caption(image=picture(number), prompt=marker, **said, **own)),
        (marker, Classify(image=shared, labels=[marker, "other"], **own)),
        (marker, Complete(prompt=[f"once {marker}"], idempotency_key=f"key of {marker}", **said, **own)),
        ("", Complete(prompt=[marker], stop=[marker], **said, **own)),
        ("image_blocked", Complete(prompt=[f"http://10.0.0.1/{marker}"], **own)),
        ("image_unreachable", Complete(prompt=[gallery.broken(f"broken-{marker}", 9)], **own)),
        ("image_invalid", Complete(prompt=[broken(marker)])),
        ("prompt_too_long", Complete(prompt=[f"{marker} " * 500], **own)),
        ("deadline_exceeded", Complete(prompt=[marker], deadline_s=0.000_001, **own)),
    ]


def test_each_tenant_gets_its_own_answers_errors_metadata_and_events_only(stood: Stand) -> None:
    events = Events(stood.producer.app)
    clients = [Client(stood.producer.server.url) for _ in range(2)]
    # Neither is a part of another one.
    asked = [
        (client, marker, expected, job)
        for tenant, client in zip(("apple", "birch"), clients, strict=True)
        for number in range(ROUNDS)
        for marker in [f"{tenant}-{number}-x"]
        for expected, job in jobs(marker, number, stood.gallery)
    ]
    random.Random(3).shuffle(asked)
    sent = [(client, marker, expected, client.submit(job)) for client, marker, expected, job in asked]
    heard = {"task-succeeded", "task-failed"}
    eventually(lambda: all(heard & events.of(job.id) for *_, job in sent))
    markers = {marker for _, marker, _, _ in sent}
    for client, marker, expected, job in sent:
        shown = [answer(client.job(job.id), expected, marker)]
        shown.append((stood.producer.server.connect(1).get(f"celery-task-meta-{job.id}") or b"").decode())
        shown += [json.dumps(event) for event in events.seen if event.get("uuid") == job.id]
        assert {other for other in markers for text in shown if other in text} <= {marker}, (expected, marker)
    # The cache had its part in it.
    assert stood.producer.server.connect(1).keys(ANSWER.named("*"))
    assert stood.producer.stats()["pool"]["in-flight"] == 0


def answer(job: SubmittedJob, expected: str, marker: str) -> str:
    try:
        result = job.result(timeout=PATIENCE_S)
    except JobError as error:
        code, said = error.code, repr(error)
    else:
        assert result.metadata == {"of": marker, marker: [marker]}
        code, said = result.text.strip(), result.model_dump_json()
    assert code == expected, said
    return said
