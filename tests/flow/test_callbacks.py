"""Callbacks from a job's end to a real receiver, by a real worker and a real callbacks worker."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery.exceptions import TaskRevokedError
from celery.states import READY_STATES

from tasks import Callback, Client, Complete, InvalidRequest, Job, OutOfMemory
from tasks.outbox import STATES, Delivery, Outbox, connect, delivery_id
from tasks.webhooks import body
from tests.flow import killer
from tests.support.receiver import NEW_SECRET, SECRET, Call, Receiver
from tests.support.redis_servers import let_the_visibility_timeout_pass
from tests.support.stand import callbacks_worker
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

#: Seconds before each attempt: the real schedule, scaled.
SCHEDULE = (0, 0.3, 0.3, 0.4, 0.5, 0.5, 1, 1, 1, 1)
TIMEOUT_S = 1.0


class Shop:
    """A producer with callbacks."""

    def __init__(self, server: stack.Broker, receiver: Receiver) -> None:
        self.client = Client(server.url, check_callbacks=False)
        self.outbox = Outbox(connect(self.client.app))
        self.receiver = receiver

    def submit(self, text: str = "Hello", tokens: int = 3, **fields: Any) -> str:
        options = fields.pop("options", {})
        return self.client.submit(self.job(text, tokens, **fields), **options).id

    def job(self, text: str = "Hello", tokens: int = 3, url: str = "", key_id: str = "main", **fields: Any) -> Job:
        callback = Callback(url=url or self.receiver.url, key_id=key_id)
        return Complete(prompt=[text], max_new_tokens=tokens, callback=callback, **fields)

    def record(self, url: str = "") -> str:
        """A job's end, as the workers record it; its id."""
        data = {"id": "recorded", "task": "idefics.complete", "result": None, "error": None}
        text = body("job.canceled", "2026-01-02T03:04:05+00:00", data)
        id = delivery_id("recorded", "job.canceled")
        assert self.outbox.add(Delivery(id, "recorded", "job.canceled", url or self.receiver.url, "main", text))
        return "recorded"

    def calls_of(self, *jobs: str) -> list[Call]:
        found = [call for call in self.receiver.calls if json.loads(call.body)["data"].get("id") in jobs]
        return sorted(found, key=lambda call: jobs.index(json.loads(call.body)["data"]["id"]))

    def state_of(self, job: str, event: str = "job.succeeded") -> str:
        found = self.delivery_of(job, event)
        return found.state if found else "none"

    def delivery_of(self, job: str, event: str) -> Delivery | None:
        """The one delivery of a job's event."""
        every = [delivery for state in STATES for delivery in self.outbox.listed(state, 1_000)]
        # One may pass from state to state meanwhile.
        found = {each.id: each for each in every if (each.job, each.event) == (job, event)}
        assert len(found) <= 1, found
        return next(iter(found.values()), None)


@pytest.fixture(scope="module")
def server() -> Iterator[stack.Broker]:
    with stack.broker() as server:
        yield server


@pytest.fixture(scope="module")
def _listening() -> Iterator[Receiver]:
    with Receiver().open() as receiver:
        yield receiver


@pytest.fixture
def receiver(_listening: Receiver) -> Receiver:
    _listening.calls.clear()
    return _listening


@pytest.fixture(scope="module")
def settings(_listening: Receiver) -> dict[str, str]:
    return {
        "MODEL": "fake:0.02",
        "TIME_LIMIT_S": "4",
        "SOFT_TIME_LIMIT_S": "3.9",
        "CALLBACK_KEYS": f"main={SECRET},rotating={NEW_SECRET},rotating={SECRET}",
        "CALLBACK_ALLOW_HTTP": "true",
        "CALLBACK_ALLOW_NETWORKS": "127.0.0.0/8",
        "CALLBACK_PORTS": str(_listening.port),
        "CALLBACK_SCHEDULE_S": ",".join(map(str, SCHEDULE)),
        "CALLBACK_TIMEOUT_S": str(TIMEOUT_S),
    }


@pytest.fixture(scope="module")
def worker(server: stack.Broker, settings: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with stack.worker(server, settings=settings) as process:
        yield process


@pytest.fixture(scope="module")
def callbacks_process(
    server: stack.Broker, settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[bytes]]:
    with callbacks_worker(server, tmp_path_factory.mktemp("callbacks") / "log", settings) as process:
        yield process


@pytest.fixture
def shop(server: stack.Broker, receiver: Receiver) -> Shop:
    return Shop(server, receiver)


# A job's end


@pytest.mark.usefixtures("worker", "callbacks_process")
def test_a_failure_outside_of_the_task_is_delivered(shop: Shop, server: stack.Broker) -> None:
    # Celery sends the link between the task's return and the result, and what should be a list is none.
    server.connect().set("broken", "no list")
    link = {"task": "shop.next", "args": [], "kwargs": {}, "options": {"queue": "broken"}, "immutable": False}
    job = shop.submit("Hello", options={"link": {**link, "subtask_type": None}})
    eventually(lambda: shop.state_of(job, "job.failed") == "delivered")


@pytest.mark.usefixtures("worker", "callbacks_process")
def test_each_terminal_state_is_delivered_once_and_verifies(shop: Shop) -> None:
    succeeded = shop.submit("Hello", metadata={"row": 7})
    failed = shop.submit("Hello", tokens=9_999)
    running = shop.submit("Hello", tokens=150)
    eventually(lambda: shop.client.job(running).status == "processing")
    shop.client.cancel(running)
    unread = shop.submit("Bye", options={"ignore_result": True})
    expired = shop.submit("Hello", options={"expires": -1})
    jobs = succeeded, failed, running, unread, expired
    eventually(lambda: len(shop.calls_of(*jobs)) == 5)
    time.sleep(0.5)
    calls = shop.calls_of(*jobs)
    bodies = [call.verified() for call in calls]
    assert [body["type"] for body in bodies] == [
        "job.succeeded",
        "job.failed",
        "job.canceled",
        "job.succeeded",
        "job.canceled",
    ]
    assert len({call.id for call in calls}) == 5
    assert bodies[0]["data"]["result"] == shop.client.result(succeeded).model_dump(mode="json")
    assert (bodies[0]["data"]["metadata"], bodies[0]["data"]["truncated"]) == ({"row": 7}, [])
    assert bodies[1]["data"]["error"]["code"] == "invalid_request"
    assert bodies[3]["data"]["result"]["text"] == "Bye"


@pytest.mark.usefixtures("worker", "callbacks_process")
def test_a_job_that_the_pool_ends_is_delivered(shop: Shop) -> None:
    """Over its time limit: the model process is killed with it, and Celery's parent stores the failure."""
    job = shop.submit("x" * 400, tokens=400, options={"time_limit": 0.5, "soft_time_limit": 90})
    eventually(lambda: shop.calls_of(job))
    (call,) = shop.calls_of(job)
    assert call.verified()["data"]["error"]["code"] == "deadline_exceeded"
    assert shop.client.job(job).status == "failed"


@pytest.mark.parametrize(
    ("state", "end", "event"),
    [
        ("SUCCESS", {"text": "stored"}, "job.succeeded"),
        ("FAILURE", OutOfMemory("stored"), "job.failed"),
        ("REVOKED", TaskRevokedError("stored"), "job.canceled"),
    ],
)
@pytest.mark.usefixtures("worker", "callbacks_process")
def test_a_state_stored_before_a_kill_is_delivered_when_the_message_is_redelivered(
    shop: Shop, server: stack.Broker, state: str, end: Any, event: str
) -> None:
    """As it stands when a worker is killed between storing the end and recording the delivery."""
    id = f"killed-{state}"
    shop.client.app.backend.store_result(id, end, state)
    with server.connect() as client:
        client.lpush("idefics", _redelivered(shop, id, client))
    eventually(lambda: shop.calls_of(id))
    eventually(lambda: not server.connect().hlen("unacked"))
    (call,) = shop.calls_of(id)
    assert call.verified()["type"] == event
    data = call.verified()["data"]
    assert (data["result"] == {"text": "stored"}, data["error"] is not None) == (event[4] == "s", event[4] == "f")


@pytest.mark.usefixtures("worker", "callbacks_process")
def test_a_rotating_key_signs_with_both_secrets(shop: Shop) -> None:
    job = shop.submit(key_id="rotating")
    eventually(lambda: shop.calls_of(job))
    (call,) = shop.calls_of(job)
    assert call.verified(SECRET) == call.verified(NEW_SECRET)


# Refusals


@pytest.mark.parametrize("url", ["http://10.0.0.8/", "http://127.0.0.1:1/", "http://169.254.169.254/latest"])
@pytest.mark.usefixtures("worker")
def test_a_forbidden_address_is_refused_when_the_job_is_submitted(shop: Shop, server: stack.Broker, url: str) -> None:
    with pytest.raises(InvalidRequest):
        Client(server.url).submit(shop.job(url=url))
    job = shop.submit(url=url)
    with pytest.raises(InvalidRequest, match=r"callback\.url"):
        shop.client.result(job, PATIENCE_S)
    assert shop.state_of(job, "job.failed") == "none"


NO_JOBS: dict[str, dict[str, Any]] = {
    "an unknown task": {"name": "idefics.captions"},
    "an unknown argument": {"kwargs": {"imag": "x"}},
    "positional arguments": {"args": ["x"]},
    "a wrong header": {"headers": {"idefics_submitted_at": 1.8e12}},
    "a link of Celery's own": {"link": {"task": "celery.map", "args": [], "kwargs": {}, "options": {}}},
    "a wrong expiry": {"expires": datetime(3001, 1, 1, tzinfo=UTC)},
}


@pytest.mark.parametrize("what", NO_JOBS)
@pytest.mark.usefixtures("worker", "callbacks_process")
def test_the_callback_of_a_refused_message_is_delivered(shop: Shop, what: str) -> None:
    options = {"name": "idefics.complete", "queue": "idefics", **NO_JOBS[what]}
    kwargs = shop.job(metadata={"row": 7}).model_dump(mode="json", exclude_none=True) | options.pop("kwargs", {})
    id = shop.client.app.send_task(kwargs=kwargs, **options).id
    eventually(lambda: shop.state_of(id, "job.failed") == "delivered")
    (call,) = shop.calls_of(id)
    event = call.verified()
    assert (event["type"], event["data"]["error"]["code"]) == ("job.failed", "invalid_request")
    assert (event["data"]["task"], event["data"]["metadata"]) == (options["name"], {"row": 7})


@pytest.mark.usefixtures("worker", "callbacks_process")
def test_the_callback_of_a_refused_message_of_the_first_protocol_is_delivered(shop: Shop) -> None:
    kwargs = shop.job().model_dump(mode="json", exclude_none=True)
    body = {"task": "idefics.complete", "id": uuid.uuid4().hex, "args": [], "kwargs": kwargs, "eta": "soon"}
    with shop.client.app.connection() as connection:
        connection.Producer().publish(body, serializer="json", exchange="", routing_key="idefics")
    eventually(lambda: shop.state_of(body["id"], "job.failed") == "delivered")


@pytest.mark.usefixtures("worker")
def test_a_refused_message_may_only_have_the_callbacks_that_a_job_may(shop: Shop) -> None:
    for fields in ({"key_id": "other"}, {"url": "http://10.0.0.8/"}):
        kwargs = shop.job(**fields).model_dump(mode="json", exclude_none=True)
        id = shop.client.app.send_task("idefics.captions", kwargs=kwargs, queue="idefics").id
        with pytest.raises(InvalidRequest):
            shop.client.result(id, PATIENCE_S)
        assert shop.state_of(id, "job.failed") == "none"


@pytest.mark.usefixtures("worker")
def test_an_unknown_key_is_refused(shop: Shop) -> None:
    with pytest.raises(InvalidRequest, match="IDEFICS_CALLBACK_KEYS"):
        shop.client.result(shop.submit(key_id="other"), PATIENCE_S)


def test_a_forbidden_address_is_refused_again_when_it_is_delivered(
    shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    """What was allowed when the job was submitted is not any more."""
    with stack.broker() as other:
        second = Shop(other, shop.receiver)
        job = second.record(f"{shop.receiver.url}/twice")
        with callbacks_worker(other, tmp_path / "log", {**settings, "CALLBACK_ALLOW_NETWORKS": ""}):
            eventually(lambda: second.state_of(job, "job.canceled") == "failed")
        (found,) = second.outbox.listed("failed", 10)
    assert found.note.startswith("refused: 127.0.0.1")
    assert found.attempts == 1
    assert shop.receiver.called("/hook/twice") == []


# Receivers


@pytest.mark.usefixtures("worker", "callbacks_process")
def test_a_receiver_that_was_down_gets_the_delivery_when_it_is_up(shop: Shop) -> None:
    shop.receiver.answers += [500, 302, 404]
    job = shop.submit()
    eventually(lambda: shop.state_of(job) == "delivered")
    calls = shop.calls_of(job)
    assert len(calls) == 4
    assert len({(call.id, call.body) for call in calls}) == 1
    assert len({call.verified()["data"]["id"] for call in calls}) == 1
    pauses = [later.at - call.at for call, later in pairwise(calls)]
    assert all(0.2 <= pause <= 2.0 for pause in pauses), pauses
    # Seconds, fresh at each attempt.
    stamps = [int(call.headers["webhook-timestamp"]) for call in calls]
    assert [abs(stamp - call.at) < 1.5 for stamp, call in zip(stamps, calls, strict=True)] == [True] * 4
    assert stamps[-1] > stamps[0]


@pytest.mark.usefixtures("worker", "callbacks_process")
def test_410_disables_the_url_until_it_is_enabled(shop: Shop) -> None:
    url = f"{shop.receiver.url}/gone"
    shop.receiver.answers.append(410)
    first = shop.submit(url=url)
    eventually(lambda: shop.state_of(first) == "failed")
    second = shop.submit(url=url)
    eventually(lambda: shop.state_of(second) == "failed")
    assert len(shop.receiver.called("/hook/gone")) == 1
    assert list(shop.outbox.disabled()) == [url]
    assert shop.outbox.replay(second) is False
    failed = shop.delivery_of(second, "job.succeeded")
    assert failed is not None
    assert shop.outbox.replay(failed.id)
    eventually(lambda: shop.state_of(second) == "delivered")
    assert [call.verified()["data"]["id"] for call in shop.receiver.called("/hook/gone")] == [first, second]


@pytest.mark.usefixtures("worker", "callbacks_process")
def test_retry_after_delays_the_next_attempt(shop: Shop) -> None:
    shop.receiver.answers.append(429)
    shop.receiver.headers["Retry-After"] = "2"
    job = shop.submit()
    eventually(lambda: shop.calls_of(job))
    shop.receiver.headers.clear()
    eventually(lambda: shop.state_of(job) == "delivered")
    first, second = shop.calls_of(job)
    assert 1.9 <= second.at - first.at <= 4.0


# Kills and restarts


@pytest.fixture(scope="module")
def apart(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Broker]:
    """A broker with a callbacks worker, for workers that are killed."""
    with stack.broker() as server, callbacks_worker(server, tmp_path_factory.mktemp("apart") / "log", settings):
        yield server


@pytest.fixture
def killed(apart: stack.Broker, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Its worker is killed with SIGKILL where it would record a callback: once, by tests/flow/killer.py."""
    monkeypatch.setenv(killer.LOADER, "tests.flow.killer:Loader")
    monkeypatch.setenv(killer.MARK, str(tmp_path / "mark"))
    return Shop(apart, receiver)


def test_a_model_process_killed_between_a_jobs_end_and_its_delivery_leaves_one_delivery(
    killed: Shop, apart: stack.Broker, settings: dict[str, str], tmp_path: Path
) -> None:
    with stack.worker(apart, settings=settings) as process:
        job = killed.submit()
        eventually(lambda: killed.state_of(job) == "delivered")
        assert process.poll() is None
    assert int((tmp_path / "mark").read_text()) != process.pid
    check_delivered_once(killed, job, "job.succeeded")


@pytest.mark.parametrize("end", ["succeeded", "failed", "canceled"])
def test_a_worker_killed_between_a_jobs_end_and_its_delivery_leaves_one_delivery(
    end: str,
    killed: Shop,
    apart: stack.Broker,
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The model process records a success, and the parent what it ends: a job over its limit, a canceled one.
    monkeypatch.setenv(killer.WHOLE_WORKER, "1")
    with stack.worker(apart, settings=settings) as process:
        limits = {"time_limit": 0.5, "soft_time_limit": 90} if end == "failed" else {}
        job = killed.submit(tokens=3 if end == "succeeded" else 400, options=limits)
        if end == "canceled":
            eventually(lambda: killed.client.job(job).status == "processing")
            killed.client.cancel(job)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert (int((tmp_path / "mark").read_text()) == process.pid) == (end != "succeeded")
    # The end is stored, its delivery is not recorded, and the message waits for another worker.
    stored = killed.client.app.backend.get_task_meta(job, cache=False)
    assert stored["status"] in READY_STATES
    assert killed.state_of(job, f"job.{end}") == "none"
    assert apart.connect().hlen("unacked") == 1
    let_the_visibility_timeout_pass(apart)
    with stack.worker(apart, settings=settings):
        eventually(lambda: killed.state_of(job, f"job.{end}") == "delivered")
        eventually(lambda: not apart.connect().hlen("unacked"))
    assert killed.client.app.backend.get_task_meta(job, cache=False)["date_done"] == stored["date_done"]
    check_delivered_once(killed, job, f"job.{end}")


def check_delivered_once(shop: Shop, job: str, event: str) -> None:
    (call,) = shop.calls_of(job)
    delivery = shop.delivery_of(job, event)
    assert delivery is not None
    assert call.id == delivery.id
    assert call.verified()["type"] == event


def test_attempts_of_a_killed_callbacks_worker_are_repeated_by_the_next(
    settings: dict[str, str], shop: Shop, tmp_path: Path
) -> None:
    with stack.broker() as other:
        second = Shop(other, shop.receiver)
        shop.receiver.gate.clear()
        with callbacks_worker(other, tmp_path / "first", settings) as process:
            job = second.record()
            eventually(lambda: second.calls_of(job))
            process.kill()
        shop.receiver.gate.set()
        with callbacks_worker(other, tmp_path / "second", settings):
            eventually(lambda: second.state_of(job, "job.canceled") == "delivered")
    calls = second.calls_of(job)
    assert len(calls) == 2
    assert len({(call.id, call.body) for call in calls}) == 1
    assert len({call.headers["webhook-timestamp"] for call in calls}) == 2
    assert calls[-1].verified()["data"]["id"] == job


def test_pending_deliveries_survive_a_restart_of_the_broker(
    settings: dict[str, str], shop: Shop, tmp_path: Path
) -> None:
    port = stack.free_port()
    shop.receiver.answers.append(503)
    with _durable(tmp_path, port) as other:
        second = Shop(other, shop.receiver)
        job = second.record()
        with callbacks_worker(other, tmp_path / "log", {**settings, "CALLBACK_SCHEDULE_S": "0,2,0.5,0.5"}):
            eventually(lambda: second.outbox.listed("pending", 1)[0].attempts == 1)
            other.process.kill()
            other.process.wait()
            with _durable(tmp_path, port):
                eventually(lambda: second.state_of(job, "job.canceled") == "delivered")
    assert len(second.calls_of(job)) == 2
    assert len({call.id for call in second.calls_of(job)}) == 1


def test_a_callbacks_worker_without_a_secret_warns_and_says_how_to_make_one(
    server: stack.Broker, tmp_path: Path
) -> None:
    with callbacks_worker(server, tmp_path / "log", {}):
        assert re.search("WARNING.* IDEFICS_CALLBACK_KEYS is empty.*openssl rand", (tmp_path / "log").read_text())


def test_the_callbacks_worker_is_light_and_stops_when_asked(callbacks_process: subprocess.Popen[bytes]) -> None:
    process = psutil.Process(callbacks_process.pid)
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    assert process.children() == []
    callbacks_process.terminate()
    assert callbacks_process.wait(PATIENCE_S) == 0


@contextmanager
def _durable(folder: Path, port: int) -> Iterator[stack.Broker]:
    """A Redis that keeps what it was told, on the disk."""
    command = [stack.server_binary(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    with stack.started(command, log=folder / "redis") as process:
        server = stack.Broker(port, process=process)
        eventually(lambda: _answers(server))
        yield server


def _answers(server: stack.Broker) -> bool:
    try:
        return bool(server.connect().ping())
    except redis.RedisError:
        return False


def _redelivered(shop: Shop, id: str, client: redis.Redis) -> str:
    """A job's message as the broker holds it after a worker's death."""
    shop.client.submit(shop.job(), task_id=id, queue="not-read", priority=0)
    message = json.loads(client.lpop("not-read"))
    message["properties"]["delivery_info"] |= {"redelivered": True, "routing_key": "idefics"}
    return json.dumps(message)
