"""The client over a broker in memory: the messages that it sends and the outcomes that it reads."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery import Celery, current_app, states
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError
from kombu.message import Message

from tasks import (
    BrokerRefused,
    BrokerUnavailable,
    Callback,
    Caption,
    Client,
    Complete,
    ConfigurationError,
    IdeficsError,
    Image,
    ImageBlocked,
    ImageTooLarge,
    Internal,
    InvalidRequest,
    JobCanceled,
    JobTimeout,
    NotFound,
    NotPermitted,
    QueueFull,
    Write,
    apps,
    capacity,
    result_wait,
)
from tasks.payloads import Job, parse
from tasks.protocol import DEFAULT_PRIORITY, QUEUE, SUBMITTED_AT
from tasks.testing import canned
from worker.demo import stack

SIGNED = "https://example.com/a.jpg?X-Amz-Signature=s3cr3t"
JOB = Caption(image=SIGNED, prompt="This is an image of", metadata={"row": 7})
RESULTS = "cache+memory://"


@pytest.fixture(autouse=True)
def _no_urls_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IDEFICS_BROKER_URL", raising=False)
    monkeypatch.delenv("IDEFICS_RESULT_BACKEND", raising=False)


@pytest.fixture
def client() -> Iterator[Client]:
    """Its queue is its own: the broker in memory is shared by the whole process."""
    client = Client("memory://", result_backend=RESULTS, queue=uuid.uuid4().hex)
    yield client
    client.app.close()


@pytest.fixture
def id() -> str:
    """Of a job that somebody else submitted."""
    return uuid.uuid4().hex


def received(client: Client, queue: str | None = None) -> list[Message]:
    """What waits in a queue, in order."""
    messages = []
    with client.app.connection_for_read() as connection:
        channel = connection.default_channel
        while message := channel.basic_get(queue or client.queue):
            message.accept = {"application/json"}
            message.ack()
            messages.append(message)
    return messages


def only(client: Client, queue: str | None = None) -> Message:
    (message,) = received(client, queue)
    return message


def end(client: Client, id: str, outcome: Any, state: str) -> None:
    """Store a job's outcome as its worker would."""
    client.app.backend.store_result(id, outcome, state)


# Messages


def test_a_job_is_its_tasks_name_and_its_arguments_as_json(client: Client) -> None:
    submitted = client.submit(JOB)
    message = only(client)
    args, kwargs, _ = message.decode()
    assert message.content_type == "application/json"
    assert (message.headers["task"], message.headers["id"]) == ("idefics.caption", submitted.id)
    assert args == []
    assert kwargs == {"image": SIGNED, "prompt": "This is an image of", "metadata": {"row": 7}}
    assert parse("idefics.caption", kwargs) == JOB


def test_a_job_goes_to_the_workers_queue_unless_told_otherwise(client: Client) -> None:
    client.submit(JOB, queue=f"{client.queue}.slow")
    assert received(client) == []
    assert only(client, f"{client.queue}.slow").headers["task"] == "idefics.caption"
    Client(app=client.app).submit(JOB)
    assert only(client, QUEUE).delivery_info["routing_key"] == QUEUE == "idefics"


@pytest.mark.parametrize(("options", "priority"), [({}, DEFAULT_PRIORITY), ({"priority": 0}, 0), ({"priority": 9}, 9)])
def test_a_job_has_a_priority(client: Client, options: dict[str, int], priority: int) -> None:
    client.submit(JOB, **options)
    assert only(client).properties["priority"] == priority


def test_a_job_carries_its_time_of_submission_beside_the_producers_headers(client: Client) -> None:
    before = time.time()
    client.submit(JOB, headers={"trace": "abc"})
    headers = only(client).headers
    assert before <= headers[SUBMITTED_AT] <= time.time()
    assert headers["trace"] == "abc"


def test_what_monitors_see_has_no_prompt_and_no_signed_url(client: Client) -> None:
    client.submit(JOB)
    message = only(client)
    assert (message.headers["argsrepr"], message.headers["kwargsrepr"]) == ("()", "{...}")
    assert "s3cr3t" not in repr(message.headers) + repr(message.properties)


def test_celerys_own_options_go_along(client: Client) -> None:
    client.submit(JOB, task_id="row-7", expires=60)
    headers = only(client).headers
    assert headers["id"] == "row-7"
    assert headers["expires"]


def test_many_jobs_arrive_in_order(client: Client) -> None:
    jobs: list[Job] = [parse("idefics.complete", {"prompt": [str(number)]}) for number in range(20)]
    submitted = client.submit_many(iter(jobs), priority=3)
    messages = received(client)
    assert [message.headers["id"] for message in messages] == [job.id for job in submitted]
    assert [parse("idefics.complete", message.decode()[1]) for message in messages] == jobs
    assert {message.properties["priority"] for message in messages} == {3}


def test_jobs_of_many_kinds_go_together(client: Client) -> None:
    client.submit_many([JOB, parse("idefics.chat", {"messages": [{"role": "user", "content": "Hello"}]})])
    assert [message.headers["task"] for message in received(client)] == ["idefics.caption", "idefics.chat"]


# Outcomes


def test_an_unknown_id_is_starting(client: Client) -> None:
    assert client.job("nobody").status == "starting"


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (states.RECEIVED, "starting"),
        (states.STARTED, "processing"),
        (states.RETRY, "processing"),
        ("DECODING", "processing"),
        (states.SUCCESS, "succeeded"),
    ],
)
def test_celerys_states_have_replicates_names(client: Client, id: str, state: str, status: str) -> None:
    end(client, id, None, state)
    assert client.job(id).status == status


def test_a_stored_result_is_read_as_a_result(client: Client) -> None:
    expected = canned("the Eiffel Tower", JOB)
    submitted = client.submit(JOB)
    end(client, submitted.id, expected.model_dump(mode="json"), states.SUCCESS)
    assert submitted.result(timeout=1) == expected
    assert client.result(submitted.id, timeout=1) == expected


def test_a_failed_job_raises_our_error(client: Client, id: str) -> None:
    end(client, id, ImageBlocked("Use another."), states.FAILURE)
    with pytest.raises(ImageBlocked, match=r"Use another\."):
        client.result(id, timeout=1)
    assert client.job(id).status == "failed"


def test_a_job_that_failed_with_a_foreign_error_is_internal(client: Client, id: str) -> None:
    end(client, id, ValueError("boom"), states.FAILURE)
    with pytest.raises(Internal, match="ValueError"):
        client.result(id, timeout=1)


def test_a_canceled_job_says_so(client: Client, id: str) -> None:
    client.app.backend.mark_as_revoked(id, "terminated")
    assert client.job(id).status == "canceled"
    with pytest.raises(JobCanceled) as canceled:
        client.result(id, timeout=1)
    assert canceled.value.partial is None


def test_a_canceled_job_has_its_text_so_far(client: Client, id: str) -> None:
    partial = canned("the Eiffel", JOB)
    end(client, id, TaskRevokedError("terminated", partial.model_dump(mode="json")), states.REVOKED)
    with pytest.raises(JobCanceled) as canceled:
        client.result(id, timeout=1)
    assert canceled.value.partial == partial


def test_a_cancellation_that_reached_nobody_raises(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OperationalError("no permissions")

    monkeypatch.setattr(client.app.control, "revoke", refuse)
    with pytest.raises(OperationalError):
        client.cancel("row-7")


def test_a_job_without_an_answer_in_time_raises_the_builtin_timeout(client: Client) -> None:
    with pytest.raises(TimeoutError, match="worker"):
        client.submit(JOB).result(timeout=0.01)


def away(client: Client, times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results' Redis is, when it is asked so often."""
    backend, asked = client.app.backend, itertools.count(1)
    stock = backend.get_task_meta

    def ask(id: str) -> Any:
        if next(asked) <= times:
            raise redis.ConnectionError("away")
        return stock(id)

    monkeypatch.setattr(backend, "get_task_meta", ask)


def test_a_wait_outlasts_a_restart_of_redis(client: Client, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    end(client, id, canned("an answer", JOB).model_dump(mode="json"), states.SUCCESS)
    away(client, 3, monkeypatch)
    assert client.result(id, timeout=5).text == "an answer"


def test_a_redis_that_stays_away_ends_a_wait(client: Client, id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_wait, "AWAY_S", 0.05)
    away(client, math.inf, monkeypatch)
    with pytest.raises(redis.ConnectionError):
        client.result(id)


def test_many_wait_in_asyncio_without_a_thread_each(client: Client) -> None:
    async def story() -> list[BaseException | Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        jobs = [client.job(uuid.uuid4().hex) for _ in range(20)]
        return await asyncio.gather(*(job.aresult(timeout=0.3) for job in jobs), return_exceptions=True)

    began = time.monotonic()
    assert {type(outcome) for outcome in asyncio.run(story())} == {JobTimeout}
    assert time.monotonic() - began < 3


def test_canceling_tells_every_worker_to_end_the_job(client: Client) -> None:
    mailbox = client.app.control.mailbox
    with client.app.connection_for_write() as connection:
        inbox = mailbox.get_queue("worker")(connection.default_channel)
        inbox.declare()
        client.cancel("row-7")
        message = inbox.get(accept=["json"])
    assert message is not None
    assert message.payload["method"] == "revoke"
    assert message.payload["arguments"]["task_id"] == "row-7"
    assert message.payload["arguments"]["terminate"] is True


def test_asyncio_submits_and_waits(client: Client) -> None:
    expected = canned("an answer", JOB)

    async def story() -> None:
        one = await client.asubmit(JOB, priority=1)
        two, three = await client.asubmit_many(iter([JOB, JOB]))
        for job in (one, two, three):
            end(client, job.id, expected.model_dump(mode="json"), states.SUCCESS)
        assert await one.aresult(timeout=1) == expected
        assert await client.aresult(three.id, timeout=1) == expected

    asyncio.run(story())
    assert [message.properties["priority"] for message in received(client)] == [1, 5, 5]


# Apps and URLs


def test_an_app_of_yours_serves_as_it_is() -> None:
    app = Celery("backend", broker="memory://", backend=RESULTS, set_as_current=False)
    client = Client(app=app, queue=uuid.uuid4().hex)
    assert client.app is app
    submitted = client.submit(JOB)
    assert only(client).headers["id"] == submitted.id


def test_an_app_of_yours_that_pickles_sends_its_jobs_as_json_all_the_same() -> None:
    app = Celery("backend", broker="memory://", backend=RESULTS, set_as_current=False)
    app.conf.task_serializer = "pickle"
    client = Client(app=app, queue=uuid.uuid4().hex)
    client.submit(JOB)
    assert only(client).content_type == "application/json"


@pytest.mark.parametrize("urls", [{"broker_url": "memory://"}, {"result_backend": RESULTS}])
def test_an_app_and_a_url_are_refused_together(urls: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="not both"):
        Client(app=Celery(set_as_current=False), **urls)


def test_without_a_url_the_worker_is_on_this_machine() -> None:
    conf = Client().app.conf
    assert (conf.broker_url, conf.result_backend) == ("redis://localhost:6379/0", "redis://localhost:6379/1")


def test_the_environment_names_the_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEFICS_BROKER_URL", "redis://queue/4")
    assert Client().app.conf.broker_url == "redis://queue/4"
    assert Client().app.conf.result_backend == "redis://queue/5"
    monkeypatch.setenv("IDEFICS_RESULT_BACKEND", "redis://results/0")
    assert Client().app.conf.result_backend == "redis://results/0"


def test_the_variables_of_a_sites_own_celery_lead_the_client_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.setenv(name, "redis://elsewhere/7")
    app = Client("redis://queue/4").app
    assert {app.connection_for_write().hostname, app.connection_for_read().hostname} == {"queue"}
    assert app.backend.connparams["host"] == "queue"


def test_a_url_that_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEFICS_BROKER_URL", "redis://queue/4")
    monkeypatch.setenv("IDEFICS_RESULT_BACKEND", "redis://results/0")
    conf = Client("redis://other/2").app.conf
    assert (conf.broker_url, conf.result_backend) == ("redis://other/2", "redis://other/3")


@pytest.mark.parametrize("url", ["memory://", "amqp://host//", "sentinel://host:26379/0?master_name=m"])
def test_another_broker_needs_a_result_backend(url: str) -> None:
    with pytest.raises(ValueError, match="result_backend"):
        Client(url)


@pytest.mark.parametrize("url", ["redis://a/0;redis://:s3cret@b/0", "redis://:s3/cret@host/0"])
def test_a_url_without_the_number_of_a_database_needs_one_and_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"result_backend|cannot be read") as refused:
        Client(url)
    assert "cret" not in str(refused.value)


def test_the_clients_own_app_gives_a_frozen_server_up() -> None:
    conf = Client("redis://host/0").app.conf
    assert conf.broker_transport_options["socket_timeout"] == conf.redis_socket_timeout == 10
    assert conf.broker_transport_options["socket_connect_timeout"] == conf.redis_socket_connect_timeout == 5


def test_the_clients_own_app_speaks_json_and_the_workers_priorities() -> None:
    conf = Client("redis://host/0").app.conf
    assert (conf.task_serializer, conf.result_serializer, conf.accept_content) == ("json", "json", ["json"])
    assert conf.broker_transport_options["priority_steps"] == list(range(10))


def test_a_client_does_not_become_the_current_app_of_its_process() -> None:
    def main() -> str:
        Celery("yours", broker="memory://")
        Client("redis://host/0")
        return str(current_app.main)

    # The current app is its thread's own: this one leaves with its thread.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(main).result() == "yours"


def test_a_payload_that_breaks_the_contract_is_not_sent(client: Client) -> None:
    with pytest.raises(ImageBlocked):
        client.submit(Caption(image="file:///etc/passwd"))
    with pytest.raises(ValueError, match="prompt"):
        client.submit(Complete(prompt=[]))


# One base of all errors

NOWHERE = "redis://127.0.0.1:1/0"


def of_urls(broker: str, results: str) -> Client:
    return Client(broker, result_backend=results, max_queued=None, max_memory=None)


def of_an_app(broker: str, results: str) -> Client:
    app = Celery("backend", broker=broker, backend=results, set_as_current=False)
    return Client(app=app, max_queued=None, max_memory=None)


both_ways = pytest.mark.parametrize("make", [of_urls, of_an_app])


@both_ways
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.ping(),
        lambda client: client.submit(JOB),
        lambda client: client.submit(JOB.model_copy(update={"idempotency_key": "k"})),
        lambda client: client.submit_many([JOB]),
        lambda client: client.queued(),
        lambda client: client.outcomes(["a"]),
        lambda client: client.forget(["a"]),
        lambda client: list(client.failed()),
        lambda client: client.retry("a"),
        lambda client: client.cancel("a"),
        lambda client: client.status("a"),
        lambda client: client.result("a"),
        lambda client: asyncio.run(client.aresult("a")),
        lambda client: asyncio.run(client.astatus("a")),
        lambda client: asyncio.run(client.acancel("a")),
        lambda client: asyncio.run(client.aoutcomes(["a"])),
        lambda client: asyncio.run(client.aforget(["a"])),
        lambda client: asyncio.run(client.aqueued()),
        lambda client: asyncio.run(client.aping()),
        lambda client: asyncio.run(client.afailed()),
        lambda client: asyncio.run(client.aretry("a")),
    ],
)
def test_a_broker_that_is_away_is_one_of_our_errors(make: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_wait, "AWAY_S", 0.0)
    monkeypatch.setitem(apps.RETRIES, "max_retries", 0)
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable) as away:
        call(make(NOWHERE, NOWHERE))
    assert time.monotonic() - began < 1
    assert (away.value.code, away.value.retryable, away.value.http_status) == ("broker_unavailable", True, 503)
    assert isinstance(away.value, ConnectionError)
    assert isinstance(away.value, OperationalError)
    assert isinstance(away.value, redis.ConnectionError)


@both_ways
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.submit(JOB),
        lambda client: client.submit_many([JOB]),
        lambda client: client.cancel("a"),
        lambda client: client.queued(),
        lambda client: client.result("a", 1),
    ],
)
def test_a_redis_that_dies_is_given_up_in_time(make: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(apps.RETRIES, "max_retries", 1)
    with stack.broker() as server:
        client = make(server.url, server.results)
        # Connections that break then, which kombu would try to mend without an end.
        client.submit(JOB)
        client.cancel("b")
        server.process.kill()
        server.process.wait()
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            call(client)
        assert time.monotonic() - began < 2


@both_ways
def test_a_job_is_queued_although_the_results_redis_is_away(broker: stack.Broker, make: Any) -> None:
    began = time.monotonic()
    assert make(broker.url, NOWHERE).submit(JOB, queue=uuid.uuid4().hex).id
    assert time.monotonic() - began < 2


def test_a_server_that_says_nothing_is_not_asked_again(broker: stack.Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "SOCKET_TIMEOUT_S", 1.0)
    client = of_an_app(broker.url, broker.results)
    client.submit(JOB, queue="never")
    with broker.connect() as server:
        server.execute_command("CLIENT", "PAUSE", 4_000, "WRITE")
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            client.submit(JOB, queue="never")
        assert time.monotonic() - began < 2
        server.execute_command("CLIENT", "UNPAUSE")


def test_what_is_waited_for_in_vain_since_redis_is_away_is_no_timeout() -> None:
    with pytest.raises(BrokerUnavailable):
        of_urls(NOWHERE, NOWHERE).result("a", timeout=0.1)


def test_every_call_gives_a_redis_that_is_away_up_in_seconds() -> None:
    began = time.monotonic()
    for call in (Client.ping, lambda client: client.submit(JOB), lambda client: client.cancel("a")):
        with pytest.raises(BrokerUnavailable):
            call(of_an_app(NOWHERE, NOWHERE))
    assert 3 < time.monotonic() - began < 12


def test_threads_that_wait_for_a_look_at_a_broker_that_is_away_share_it() -> None:
    client = Client(NOWHERE)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        ends = [threads.submit(client.submit, JOB) for _ in range(4)]
    assert {type(end.exception()) for end in ends} == {BrokerUnavailable}
    assert time.monotonic() - began < 4


def test_an_app_of_yours_keeps_its_settings_and_its_connections() -> None:
    app = Celery("backend", broker=NOWHERE, backend=NOWHERE, set_as_current=False)
    app.conf.broker_transport_options = {"socket_timeout": 99, "visibility_timeout": 7}
    before = dict(app.conf)
    client = Client(app=app)
    # It may be configured until it is needed.
    app.conf.task_compression = "gzip"
    own = client._app.conf
    assert own.broker_transport_options["socket_timeout"] == 99
    assert own.broker_transport_options["socket_connect_timeout"] == apps.CONNECT_TIMEOUT_S
    assert own.broker_transport_options["visibility_timeout"] == 7
    assert (own.broker_url, own.result_backend, own.task_compression) == (NOWHERE, NOWHERE, "gzip")
    assert own.redis_socket_timeout == apps.SOCKET_TIMEOUT_S
    assert {**before, "task_compression": "gzip"} == dict(app.conf)


def test_what_redis_refuses_is_one_of_our_errors(broker: stack.Broker) -> None:
    with broker.connect() as server:
        server.execute_command("ACL", "SETUSER", "nobody", "on", ">pw", "~*", "&*", "+@all", "-mget", "-zrange")
    client = Client(broker.url.replace("//", "//nobody:pw@"))
    with pytest.raises(NotPermitted) as refused:
        client.outcomes(["a"])
    assert isinstance(refused.value, redis.exceptions.NoPermissionError)
    with pytest.raises(BrokerRefused):
        list(client.failed())


def test_a_job_that_is_no_failed_one_is_not_found(broker: stack.Broker) -> None:
    with pytest.raises(NotFound) as unknown:
        Client(broker.url).retry("a")
    assert isinstance(unknown.value, LookupError)


@pytest.mark.parametrize("url", ["memory://", "redis://a/x", "redis://host/0?db=1", "rediss://[/0"])
def test_a_url_that_cannot_be_used_is_one_of_our_errors(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Client(url)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("localhost:7102", "Write redis://localhost:7102/0."),
        ("localhost", "Write redis://localhost/0."),
        ("redis.example.com:6379/3", "Write redis://redis.example.com:6379/3."),
        ("http://localhost:7101/0", "http:// is no Redis URL: write redis://host:6379/0."),
        ("https://user:pw@host", "https:// is no Redis URL: write redis://host:6379/0."),
    ],
)
def test_a_url_that_is_meant_as_redis_is_told_how_it_is_written(url: str, cure: str) -> None:
    for urls in ({"broker_url": url}, {"broker_url": "redis://host/0", "result_backend": url}):
        with pytest.raises(ConfigurationError) as refused:
            Client(**urls)
        assert str(refused.value) == cure
    assert Client("memory://", result_backend="cache+memory://")
    assert Client("memory://", result_backend="rpc")


def test_an_app_without_results_says_so() -> None:
    client = Client(app=Celery("backend", broker="memory://", set_as_current=False), queue=uuid.uuid4().hex)
    job = client.submit(JOB)
    for call in (lambda: job.status, lambda: job.result(1), lambda: client.outcomes([job.id]), client.failed):
        with pytest.raises(ConfigurationError, match="result"):
            call()


def test_another_tasks_result_is_an_error_of_ours(client: Client, id: str) -> None:
    end(client, id, "a text", states.SUCCESS)
    with pytest.raises(IdeficsError, match="check the id") as foreign:
        client.result(id, timeout=1)
    assert foreign.value.detail == "foreign_result"


def test_asyncio_has_the_rest_too(client: Client) -> None:
    async def story() -> None:
        job = await client.asubmit(JOB)
        assert await job.astatus() == await client.astatus(job.id) == "starting"
        end(client, job.id, canned("an answer", JOB).model_dump(mode="json"), states.SUCCESS)
        assert (await client.aoutcomes(iter([job.id])))[job.id] == await job.aresult()
        await client.aforget(iter([job.id]))
        assert await client.astatus(job.id) == "starting"
        await job.acancel()
        await client.acancel(job.id)
        await client.aping()
        assert await client.aqueued() == 1

    asyncio.run(story())


# A broker without room


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
    monkeypatch.setattr(capacity, "LOOK_S", 0.0)
    client = Client(app=client.app, queue=uuid.uuid4().hex, max_queued=1)
    client.submit(JOB)
    with pytest.raises(QueueFull):
        client.submit(JOB)
    received(client)
    client.submit(JOB)


def test_waiting_jobs_count_at_every_priority_and_whoever_sent_them(broker: stack.Broker) -> None:
    queue = uuid.uuid4().hex
    for priority in (0, 4, 9):
        Client(broker.url, queue=queue).submit(JOB, priority=priority)
    stranger = Celery("backend", broker=broker.url, backend=broker.results, set_as_current=False)
    with pytest.raises(QueueFull, match="3 jobs wait"):
        Client(app=stranger, queue=queue, max_queued=3).submit(JOB)


def test_the_broker_is_looked_at_once_a_second(broker: stack.Broker) -> None:
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
