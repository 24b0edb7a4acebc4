"""A queue that is full, and a broker that is."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis
from celery import Celery

from tasks import Callback, Caption, Client, Complete, Image, ImageTooLarge, InvalidRequest, QueueFull, Write, capacity
from tests.unit.client.messages import JOB, RESULTS, only, received
from worker.demo import stack


def test_more_jobs_than_may_wait_are_refused_with_the_cure(client: Client) -> None:
    client = Client(app=client.app, queue=uuid.uuid4().hex, max_queued=2)
    client.submit(JOB)
    client.submit(JOB)
    with pytest.raises(QueueFull, match=r"2 jobs wait.*add workers") as refused:
        client.submit(JOB)
    assert refused.value.code == "queue_full"
    assert len(received(client)) == 2


def test_what_many_jobs_had_queued_before_the_refusal_is_known(client: Client) -> None:
    client = Client(app=client.app, queue=uuid.uuid4().hex, max_queued=2)
    with pytest.raises(QueueFull) as refused:
        client.submit_many([JOB] * 5)
    assert [job.id for job in refused.value.submitted] == [m.headers["id"] for m in received(client)]


def test_what_many_jobs_had_queued_before_one_that_is_refused_is_known(client: Client) -> None:
    client = Client(app=client.app, queue=uuid.uuid4().hex, max_job_bytes=1_000)
    with pytest.raises(InvalidRequest) as refused:
        client.submit_many([JOB, JOB, JOB.model_copy(update={"prompt": "x" * 2_000}), JOB])
    submitted = refused.value.submitted  # type: ignore[attr-defined]
    assert [job.id for job in submitted] == [message.headers["id"] for message in received(client)]


def test_jobs_are_accepted_again_once_the_queue_is_shorter(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "MEASURE_INTERVAL_S", 0.0)
    client = Client(app=client.app, queue=uuid.uuid4().hex, max_queued=1)
    client.submit(JOB)
    with pytest.raises(QueueFull):
        client.submit(JOB)
    received(client)
    client.submit(JOB)


def test_waiting_jobs_of_every_priority_and_producer_count(broker: stack.Broker) -> None:
    queue = uuid.uuid4().hex
    for priority in (0, 4, 9):
        Client(broker.url, queue=queue).submit(JOB, priority=priority)
    stranger = Celery("backend", broker=broker.url, backend=broker.results, set_as_current=False)
    with pytest.raises(QueueFull, match="3 jobs wait"):
        Client(app=stranger, queue=queue, max_queued=3).submit(JOB)


def test_the_brokers_memory_is_checked_once_a_second(broker: stack.Broker) -> None:
    client = Client(broker.url, queue=uuid.uuid4().hex)
    with broker.connect() as server:
        client.submit(JOB)
        before = server.info("commandstats")["cmdstat_info"]["calls"]
        client.submit_many([JOB] * 20)
        # Our own two looks.
        assert server.info("commandstats")["cmdstat_info"]["calls"] - before <= 2


def test_a_broker_above_its_share_of_memory_refuses_with_the_cure(broker: stack.Broker) -> None:
    with broker.connect() as server, _memory(server, share=0.9):
        with pytest.raises(QueueFull, match=r"9\d% of its memory.*maxmemory"):
            Client(broker.url).submit(JOB)
        Client(broker.url, queue=uuid.uuid4().hex, max_memory=None).submit(JOB)


def test_a_producer_that_may_not_ask_for_memory_is_held_to_the_length_alone(broker: stack.Broker) -> None:
    with broker.connect() as server, _memory(server, share=0.9):
        server.execute_command("ACL", "SETUSER", "producer", "on", ">pw", "~*", "&*", "+@all", "-info")
        url = broker.url.replace("//", "//producer:pw@")
        client = Client(url, queue=uuid.uuid4().hex, max_queued=1)
        client.submit(JOB)
        with pytest.raises(QueueFull, match="1 jobs wait"):
            client.submit(JOB)


def test_a_broker_that_is_full_refuses_with_the_cure(broker: stack.Broker) -> None:
    with broker.connect() as server, _memory(server, share=100.0):
        client = Client(broker.url, max_memory=None)
        with pytest.raises(QueueFull, match=r"full and refused.*more memory or disk"):
            client.submit(JOB)


@contextmanager
def _memory(server: redis.Redis, share: float) -> Iterator[None]:
    """The server has used this share of its maxmemory."""
    server.config_set("maxmemory", max(1, int(server.info("memory")["used_memory"] / share)))
    try:
        yield
    finally:
        server.config_set("maxmemory", 0)


def test_a_callback_to_a_private_address_is_not_sent(client: Client) -> None:
    job = Complete(prompt=["Hello"], callback=Callback(url="https://10.0.0.8/hook", key_id="main"))
    with pytest.raises(InvalidRequest, match="not public"):
        client.submit(job)
    assert received(client) == []


def test_a_client_may_leave_callbacks_to_the_workers() -> None:
    client = Client("memory://", result_backend=RESULTS, queue=uuid.uuid4().hex, check_callbacks=False)
    client.submit(Complete(prompt=["Hello"], callback=Callback(url="http://10.0.0.8:81/hook", key_id="main")))
    assert only(client).payload[1]["callback"] == {"url": "http://10.0.0.8:81/hook", "key_id": "main"}
    client.app.close()


def test_a_job_beyond_the_limit_in_bytes_is_refused_before_it_is_sent(broker: stack.Broker) -> None:
    client = Client(broker.url, max_job_bytes=1_000, queue="never")
    with pytest.raises(InvalidRequest, match=r"bytes") as refused:
        client.submit(Complete(prompt=["a" * 1_000]))
    assert refused.value.response()[0] == 413
    assert broker.connect().llen("never") == 0


def test_a_picture_that_is_too_large_for_a_job_is_told_its_own_size() -> None:
    client = Client("redis://localhost:1/0", max_job_bytes=1_000)
    picture = Image.from_bytes(b"\xff\xd8\xff" + bytes(1_497))
    with pytest.raises(ImageTooLarge, match=r"The picture has 1,5\d\d bytes and may have 7\d\d in a job") as refused:
        client.submit(Caption(image=picture))
    status, body = refused.value.response()
    assert (status, body["error"]["message"]) == (413, str(refused.value))
    with pytest.raises(ImageTooLarge, match=r"The 2 pictures have 3,0\d\d bytes and may have 7\d\d in a job"):
        client.submit(Write(images=[picture, picture]))
