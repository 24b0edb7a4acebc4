"""Idempotency keys on a real server: what they stand for, and who may have them."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery

from tasks import Caption, Client, Complete, InvalidRequest, JobCanceled
from tasks.errors import ImageUnreachable
from tasks.idempotency import ABANDONED_S, Claim, IdempotencyKeys, digest
from tasks.payloads import Job, parse
from tasks.redis_keys import IDEMPOTENCY
from tasks.testing import FakeClient, canned
from worker.demo import stack
from worker.jobs.deduplication import MAX_COUNTDOWN_S, MIN_COUNTDOWN_S, FirstStillRuns, first_answer
from worker.jobs.runs import CancellationError

Make = Callable[..., Job]


@pytest.fixture
def make() -> Make:
    """A job with this test's key."""
    key = uuid.uuid4().hex

    def job(text: str = "a", **fields: Any) -> Job:
        return parse("idefics.complete", {"prompt": [text], "idempotency_key": key, **fields})

    return job


@pytest.fixture
def keys(broker: stack.Broker) -> IdempotencyKeys:
    return IdempotencyKeys(broker.connect(1), 60)


@pytest.fixture
def client(broker: stack.Broker) -> Iterator[Client]:
    client = Client(broker.url, queue=uuid.uuid4().hex)
    yield client
    client.app.close()


def queued(client: Client, broker: stack.Broker) -> list[str]:
    """Ids of the jobs in the client's own queue."""
    return [
        json.loads(message)["headers"]["id"] for message in broker.connect().lrange(f"{client.queue}\x06\x165", 0, -1)
    ]


def record(job: Job, queue: str = "idefics") -> str:
    return IDEMPOTENCY.named(hashlib.sha256(json.dumps([queue, job.idempotency_key]).encode()).hexdigest())


def make_old(broker: stack.Broker, job: Job, queue: str = "idefics") -> None:
    """As if the claim had been made some time ago."""
    results = broker.connect(1)
    name = record(job, queue)
    kept = json.loads(results.get(name) or b"")
    results.set(name, json.dumps({**kept, "claimed_at": kept["claimed_at"] - ABANDONED_S - 1}), keepttl=True)


# What a payload is


def test_the_digest_covers_what_changes_the_answer(make: Make) -> None:
    assert digest(make()) == digest(make())
    assert digest(make()) == digest(make(temperature=0, stop=[]))
    assert digest(make()) == digest(make(metadata={"attempt": 2}))
    assert digest(make()) == digest(parse("idefics.complete", {"prompt": ["a"]}))
    assert digest(make()) != digest(make("b"))
    assert digest(make()) != digest(make(seed=1))
    assert digest(Caption(image="http://a/b")) != digest(Complete(prompt=["http://a/b"]))


# Claims


def test_the_first_has_the_key_and_the_second_is_told_whose_it_is(make: Make, keys: IdempotencyKeys) -> None:
    first = keys.claim(make(), "first", is_sent=True)
    assert first.id == "first"
    assert keys.claim(make(), "second", is_sent=True) == first


def test_another_payload_under_the_same_key_is_refused_with_the_cure(make: Make, keys: IdempotencyKeys) -> None:
    keys.claim(make(), "first", is_sent=True)
    with pytest.raises(
        InvalidRequest, match=r"has this key and another payload\. Give each payload its own key"
    ) as refused:
        keys.claim(make("b"), "second", is_sent=True)
    assert "first" not in str(refused.value).removesuffix("repeat the first one unchanged."), "an id is a right"


def test_of_many_claims_at_once_one_is_the_first(make: Make, broker: stack.Broker) -> None:
    keys = IdempotencyKeys(broker.connect(1), 60)
    with ThreadPoolExecutor(16) as pool:
        claims = list(pool.map(lambda n: keys.claim(make(), f"job {n}", is_sent=True), range(32)))
    assert len({claim.id for claim in claims}) == 1


def test_a_record_expires_and_does_not_show_its_key(make: Make, keys: IdempotencyKeys, broker: stack.Broker) -> None:
    job = make()
    claim = keys.claim(job, "first", is_sent=False)
    keys.confirm(job, claim)
    assert 0 < broker.connect(1).ttl(record(job)) <= 60
    assert str(job.idempotency_key) not in record(job) + str(broker.connect(1).get(record(job)))
    IdempotencyKeys(broker.connect(1), 10).start(job, claim)
    assert 0 < broker.connect(1).ttl(record(job)) <= 10


def test_a_claim_without_a_record_of_its_job_is_abandoned_if_it_was_never_sent_or_was_begun() -> None:
    claimed = {"id": "first", "digest": "d", "claimed_at": 100.0}
    assert not Claim(**claimed, is_sent=False).is_abandoned(100.0 + ABANDONED_S)
    assert Claim(**claimed, is_sent=False).is_abandoned(101.0 + ABANDONED_S)
    assert not Claim(**claimed, is_sent=True).is_abandoned(101.0 + ABANDONED_S)
    assert Claim(**claimed, is_sent=True, is_started=True).is_abandoned(100.0)


def test_one_of_many_takes_over_an_abandoned_claim(make: Make, keys: IdempotencyKeys) -> None:
    claim = keys.claim(make(), "dead", is_sent=False)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda n: keys.take_over(make(), claim, f"job {n}"), range(8))) == 1
    assert keys.claim(make(), "last", is_sent=True).id.startswith("job ")


@pytest.fixture
def backend(broker: stack.Broker) -> Iterator[Any]:
    app = Celery("keyed", backend=f"worker.queue.result_backend:ResultBackend+{broker.results}", set_as_current=False)
    yield app.backend
    app.close()


# The client


def test_the_client_queues_a_key_once(make: Make, client: Client, broker: stack.Broker) -> None:
    first = client.submit(make(metadata={"attempt": 1}))
    second = client.submit(make(metadata={"attempt": 2}))
    assert second.id == first.id
    assert queued(client, broker) == [first.id]


def test_the_client_refuses_another_payload_at_submission(make: Make, client: Client, broker: stack.Broker) -> None:
    first = client.submit(make())
    with pytest.raises(InvalidRequest, match="another payload"):
        client.submit(make("b"))
    assert queued(client, broker) == [first.id]


def test_jobs_without_a_key_or_with_keys_of_their_own_are_all_queued(client: Client, broker: stack.Broker) -> None:
    jobs = [
        parse("idefics.complete", {"prompt": ["a"], "idempotency_key": key}) for key in (None, None, uuid.uuid4().hex)
    ]
    submitted = client.submit_many(jobs)
    assert sorted(queued(client, broker)) == sorted(job.id for job in submitted)
    assert len(submitted) == 3


def test_a_task_id_of_the_producers_own_is_kept(make: Make, client: Client, broker: stack.Broker) -> None:
    name = uuid.uuid4().hex
    assert client.submit(make(), task_id=name).id == name
    assert client.submit(make(), task_id="another").id == name
    assert queued(client, broker) == [name]


def test_a_producer_that_dies_before_it_sends_does_not_block_its_key(
    make: Make, client: Client, broker: stack.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any, **options: Any) -> None:
        raise Killed(options["task_id"])

    with monkeypatch.context() as patch:
        patch.setattr(client.app, "send_task", die)
        with pytest.raises(Killed) as killed:
            client.submit(make())
    submitted = client.submit(make())
    assert queued(client, broker) == [submitted.id] == list(killed.value.args)
    assert client.submit(make()).id == submitted.id
    assert len(queued(client, broker)) == 1


def test_a_job_whose_answer_was_forgotten_is_sent_again(
    make: Make, client: Client, backend: Any, broker: stack.Broker
) -> None:
    keys = IdempotencyKeys(broker.connect(1), 60, client.queue)
    id = client.submit(make()).id
    for times in (1, 2):
        assert first_answer(make(), id, keys, backend) is None
        backend.store_result(id, canned("a cat", make()).model_dump(mode="json"), "SUCCESS")
        assert client.submit(make()).id == id
        assert queued(client, broker) == [id] * times
        client.forget([id])
        assert client.submit(make()).id == client.submit(make()).id == id
        assert queued(client, broker) == [id] * (times + 1)


def test_a_worker_that_begins_a_job_before_its_producer_confirms_it_is_not_overruled(
    make: Make, keys: IdempotencyKeys
) -> None:
    claim = keys.claim(make(), "first", is_sent=False)
    keys.start(make(), claim)
    keys.confirm(make(), claim)
    assert keys.claim(make(), "second", is_sent=True).is_started


def test_without_redis_for_results_the_workers_hold_to_the_key_alone(make: Make) -> None:
    client = Client("memory://", result_backend="cache+memory://", queue=uuid.uuid4().hex)
    assert client.submit(make()).id != client.submit(make()).id
    client.app.close()


def test_the_fake_client_honours_idempotency_keys(make: Make) -> None:
    client = FakeClient()
    assert client.submit(make()) is client.submit(make())
    assert len(client.submitted) == 1
    with pytest.raises(InvalidRequest):
        client.submit(make("b"))


# The worker: a second job, under an id of its own


@pytest.fixture
def first(make: Make, keys: IdempotencyKeys, backend: Any) -> str:
    """The id of the key's first job, which runs."""
    id = uuid.uuid4().hex
    assert first_answer(make(), id, keys, backend) is None
    return id


def test_the_first_runs_however_often_it_is_delivered(
    make: Make, keys: IdempotencyKeys, backend: Any, first: str
) -> None:
    assert first_answer(make(), first, keys, backend) is None


def test_the_second_gets_the_firsts_answer_with_its_own_metadata(
    make: Make, keys: IdempotencyKeys, backend: Any, first: str
) -> None:
    backend.store_result(first, canned("a cat", make(metadata={"row": 1})).model_dump(mode="json"), "SUCCESS")
    answer = first_answer(make(metadata={"row": 2}), "second", keys, backend)
    assert answer is not None
    assert (answer.text, answer.metadata) == ("a cat", {"row": 2})


def test_the_second_fails_as_the_first_did(make: Make, keys: IdempotencyKeys, backend: Any, first: str) -> None:
    backend.store_result(first, ImageUnreachable("gone"), "FAILURE")
    with pytest.raises(ImageUnreachable, match="gone"):
        first_answer(make(), "second", keys, backend)


def test_the_second_is_canceled_as_the_first_was(make: Make, keys: IdempotencyKeys, backend: Any, first: str) -> None:
    backend.store_result(first, JobCanceled("terminated"), "REVOKED")
    with pytest.raises(CancellationError):
        first_answer(make(), "second", keys, backend)


def test_the_second_is_refused_with_another_payload(
    make: Make, keys: IdempotencyKeys, backend: Any, first: str
) -> None:
    with pytest.raises(InvalidRequest, match="another payload"):
        first_answer(make("b"), "second", keys, backend)


def test_the_second_runs_where_the_firsts_answer_was_forgotten(
    make: Make, keys: IdempotencyKeys, backend: Any, first: str
) -> None:
    assert first_answer(make(), "second", keys, backend) is None
    assert keys.claim(make(), "third", is_sent=True).id == "second"


@pytest.mark.parametrize("state", [None, "STARTED", "RETRY"])
def test_the_second_waits_for_a_first_that_has_not_ended(
    make: Make, keys: IdempotencyKeys, backend: Any, state: str | None, broker: stack.Broker
) -> None:
    first = keys.claim(make(), uuid.uuid4().hex, is_sent=True).id
    if state:
        assert first_answer(make(), first, keys, backend) is None
        backend.store_result(first, None, state)
    with pytest.raises(FirstStillRuns) as wait:
        first_answer(make(), "second", keys, backend)
    assert wait.value.countdown == MIN_COUNTDOWN_S
    make_old(broker, make())
    with pytest.raises(FirstStillRuns) as wait:
        first_answer(make(), "second", keys, backend)
    assert MIN_COUNTDOWN_S < wait.value.countdown <= MAX_COUNTDOWN_S


def test_the_second_runs_when_the_first_was_never_sent(
    make: Make, keys: IdempotencyKeys, backend: Any, broker: stack.Broker
) -> None:
    keys.claim(make(), "never", is_sent=False)
    with pytest.raises(FirstStillRuns):
        first_answer(make(), "second", keys, backend)
    make_old(broker, make())
    assert first_answer(make(), "second", keys, backend) is None
    assert keys.claim(make(), "third", is_sent=True).id == "second"


def test_a_key_in_another_queue_is_another_key(make: Make, keys: IdempotencyKeys, broker: stack.Broker) -> None:
    other = IdempotencyKeys(broker.connect(1), 60, "idefics-big")
    assert keys.claim(make(), "first", is_sent=True).id == "first"
    assert other.claim(make("b"), "second", is_sent=True).id == "second"
    client = Client(broker.url, queue="idefics-big")
    assert client.submit(make("b")).id == "second"
    assert Client(broker.url).submit(make("b"), queue="idefics-big").id == "second"
    client.app.close()


@pytest.mark.parametrize(
    ("model", "is_answered"),
    [({}, True), ({"dtype": "float16"}, True), ({"id": "b"}, False), ({"revision": "2"}, False)],
)
def test_the_second_runs_where_the_first_was_answered_by_another_model(
    make: Make, keys: IdempotencyKeys, backend: Any, first: str, model: dict[str, str], is_answered: bool
) -> None:
    answer = canned("a cat", make())
    backend.store_result(first, answer.model_dump(mode="json"), "SUCCESS")
    mine = answer.model.model_copy(update=model)
    assert (first_answer(make(), "second", keys, backend, mine) is not None) == is_answered
    assert keys.claim(make(), "third", is_sent=True).id == (first if is_answered else "second")


def test_a_record_shows_no_id_to_one_who_does_not_know_the_payload(
    make: Make, keys: IdempotencyKeys, broker: stack.Broker
) -> None:
    job, id = make("a secret"), str(uuid.uuid4())
    keys.claim(job, id, is_sent=True)
    first = broker.connect(1).get(record(job)) or b""
    keys.take_over(job, keys.claim(job, "other", is_sent=True), id)
    second = broker.connect(1).get(record(job)) or b""
    for shown in (first, second):
        assert id not in shown.decode()
        assert id.encode().hex() not in shown.decode()
        assert digest(job) not in shown.decode()
    # One stream is not used twice: what two records have in common would be seen.
    assert json.loads(first)["id"] != json.loads(second)["id"]
    assert keys.claim(job, "other", is_sent=True).id == id
