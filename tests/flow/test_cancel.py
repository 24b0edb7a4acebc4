"""A job ends before its time, by its limits or by its producer, and its neighbours do not notice."""

from __future__ import annotations

import time
import uuid

import pytest
from celery import states
from kombu.exceptions import OperationalError

from tasks import Client, Complete, JobCanceled, SubmittedJob
from tasks.protocol import CANCEL_TTL_S
from tasks.redis_keys import CANCELLATION
from tests.support.stand import SLOTS, Stand
from tests.support.waiting import PATIENCE_S, eventually

WORD = "abcdefghij"
#: Takes 10 s, unless somebody ends it.
ENDLESS = Complete(prompt=[WORD * 50], max_new_tokens=500)
SHORT = Complete(prompt=[WORD], max_new_tokens=10)

#: What a careful operator gives a producer: its queue, its results, its cancellations, and no word to the workers.
RIGHTS = (
    "resetkeys resetchannels ~idefics* ~_kombu.binding*.idefics ~celery-task-meta-* &celery-task-meta-* +@all -@admin"
)


@pytest.fixture(scope="module")
def client(held_up: Stand) -> Client:
    return Client(held_up.producer.server.url)


@pytest.fixture(scope="module")
def restricted(held_up: Stand) -> Client:
    """Of a producer that may not write to Celery's control mailbox."""
    server = held_up.producer.server
    server.connect().execute_command("ACL", "SETUSER", "shop", "on", ">secret", *RIGHTS.split())
    client = Client(f"redis://shop:secret@127.0.0.1:{server.port}/0")
    with pytest.raises(OperationalError, match="ermissions"):
        client.app.control.revoke("anything")
    return client


def begun(client: Client) -> SubmittedJob:
    """An endless job that has some text."""
    job = client.submit(ENDLESS)
    eventually(lambda: job.status == "processing")
    time.sleep(0.2)
    return job


def canceled(job: SubmittedJob) -> JobCanceled:
    with pytest.raises(JobCanceled) as caught:
        job.result(timeout=PATIENCE_S)
    assert job.status == "canceled"
    return caught.value


# Limits


@pytest.mark.parametrize(
    ("job", "options"),
    [(ENDLESS, {"soft_time_limit": 0.5}), (ENDLESS.model_copy(update={"deadline_s": 0.5}), {})],
    ids=["soft limit", "deadline_s"],
)
def test_a_limit_ends_one_job_with_its_text_and_spares_its_neighbours(
    held_up: Stand, client: Client, job: Complete, options: dict[str, float]
) -> None:
    process = held_up.producer.model_process()
    before, late, after = client.submit(SHORT), client.submit(job, **options), client.submit(SHORT)
    answer = late.result(timeout=PATIENCE_S)
    assert answer.finish_reason == "deadline"
    assert 0 < len(answer.text) < 500
    assert [neighbour.result(timeout=PATIENCE_S).text for neighbour in (before, after)] == [WORD, WORD]
    assert held_up.producer.model_process() == process


def test_a_limit_of_its_own_ends_one_job_and_no_other(held_up: Stand, client: Client) -> None:
    process = held_up.producer.model_process()
    neighbour = client.submit(ENDLESS.model_copy(update={"max_new_tokens": 100}))
    late = client.submit(ENDLESS, time_limit=1)
    with pytest.raises(Exception, match="limit of 1 s") as caught:
        late.result(timeout=PATIENCE_S)
    assert caught.value.args[0] == "deadline_exceeded"
    assert neighbour.result(timeout=PATIENCE_S).text == WORD * 10
    assert held_up.producer.model_process() == process


# Cancellation


@pytest.mark.parametrize("by", ["Client.cancel", "revoke(terminate=True)"])
def test_a_canceled_job_ends_at_its_next_step_and_its_text_so_far_is_kept(
    held_up: Stand, client: Client, by: str
) -> None:
    process = held_up.producer.model_process()
    job, neighbour = begun(client), client.submit(SHORT)
    if by == "Client.cancel":
        client.cancel(job.id)
    else:
        held_up.producer.app.AsyncResult(job.id).revoke(terminate=True)
    partial = canceled(job).partial
    assert partial is not None
    assert partial.finish_reason == "canceled"
    assert 0 < len(partial.text) < 500
    assert (WORD * 50).startswith(partial.text)
    assert neighbour.result(timeout=PATIENCE_S).text == WORD
    assert held_up.producer.model_process() == process


def test_a_plain_celery_producer_finds_the_text_so_far_in_the_revocation(held_up: Stand, client: Client) -> None:
    job = begun(client)
    client.cancel(job.id)
    outcome = held_up.producer.app.AsyncResult(job.id)
    error = outcome.get(timeout=PATIENCE_S, propagate=False)
    assert outcome.state == states.REVOKED
    assert type(error).__name__ == "TaskRevokedError"
    assert error.args[0] == "terminated"
    assert 0 < len(error.args[1]["text"]) < 500


def test_a_producer_without_a_right_to_the_mailbox_cancels_a_running_job(held_up: Stand, restricted: Client) -> None:
    job, results = begun(restricted), held_up.producer.server.connect(1)
    sent = time.monotonic()
    job.cancel()
    assert CANCEL_TTL_S - 60 < results.ttl(CANCELLATION.named(job.id)) <= CANCEL_TTL_S
    partial = canceled(job).partial
    assert time.monotonic() - sent < 4
    assert partial is not None
    assert 0 < len(partial.text) < 500
    assert not results.exists(CANCELLATION.named(job.id))


def test_a_producer_without_a_right_to_the_mailbox_cancels_a_job_that_waits_in_the_queue(
    held_up: Stand, restricted: Client
) -> None:
    held = [uuid.uuid4().hex for _ in range(SLOTS)]
    running = [held_up.producer.show(held_up.gallery.held(name)).apply_async() for name in held]
    held_up.gallery.await_requests(*held)
    shown = uuid.uuid4().hex
    queued = restricted.submit(Complete(prompt=[held_up.gallery.picture(shown)]))
    queued.cancel()
    held_up.gallery.release()
    assert canceled(queued).partial is None
    assert [job.get(timeout=PATIENCE_S)["text"] for job in running] == ["llo"] * SLOTS
    assert shown not in held_up.gallery.asked


def test_a_job_that_comes_after_its_cancellation_does_not_start(held_up: Stand, restricted: Client) -> None:
    id = uuid.uuid4().hex
    restricted.cancel(id)
    assert canceled(restricted.submit(ENDLESS, task_id=id)).partial is None


def test_a_job_that_loads_its_image_is_canceled_before_the_image_comes(held_up: Stand, restricted: Client) -> None:
    shown = uuid.uuid4().hex
    job = restricted.submit(Complete(prompt=[held_up.gallery.held(shown)]))
    held_up.gallery.await_requests(shown)
    job.cancel()
    assert canceled(job).partial is None
    held_up.gallery.release(shown)


def test_a_job_that_waits_for_its_retry_is_canceled(held_up: Stand, restricted: Client) -> None:
    shown = uuid.uuid4().hex
    job = restricted.submit(Complete(prompt=[held_up.gallery.broken(shown, times=99)]))
    eventually(lambda: job.async_result.state == states.RETRY)
    job.cancel()
    canceled(job)


def test_canceling_a_job_that_is_over_changes_nothing(held_up: Stand, restricted: Client) -> None:
    job = restricted.submit(SHORT)
    assert job.result(timeout=PATIENCE_S).text == WORD
    job.cancel()
    time.sleep(0.8)
    assert job.result(timeout=1).text == WORD
