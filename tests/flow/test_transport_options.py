"""Producers with transport options of their own: workers read their jobs, or the client says why they would not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tasks import Client, Complete, ConfigurationError, InvalidRequest
from tasks.redis_keys import RESULTS_FINGERPRINT, WORKER_OPTIONS, WORKERS
from tasks.worker_registry import SILENT_S
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

OPTIONS_KEY, RESULTS_KEY = WORKER_OPTIONS.named(), RESULTS_FINGERPRINT.named()

HELLO = Complete(prompt=["Hello"], max_new_tokens=3)
OURS: dict[str, str] = {
    "PRIORITY_SEPARATOR": "/",
    "PRIORITY_STEPS": "0,3,6,9,12",
    "BROKER_KEY_PREFIX": "mine:",
    "RESULT_KEY_PREFIX": "answers",
}
THEIRS: dict[str, Any] = {"sep": "/", "priority_steps": [0, 6, 12], "global_keyprefix": "mine:"}


def _app(server: stack.Broker, options: dict[str, Any], prefix: str = "", backend: str | None = "") -> Celery:
    app = Celery("shop", broker=server.url, backend=server.results if backend == "" else backend, set_as_current=False)
    app.conf.broker_transport_options = options
    app.conf.result_backend_transport_options = {"global_keyprefix": prefix} if prefix else {}
    return app


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Broker]:
    """A worker without these settings."""
    with stack.broker() as server, stack.worker(server, settings={"MODEL": "fake"}):
        eventually(lambda: server.connect(1).exists(RESULTS_KEY) and server.connect().exists(OPTIONS_KEY))
        yield server


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Broker]:
    """A worker with all of them."""
    with stack.broker() as server, stack.worker(server, settings={"MODEL": "fake:0.02", **OURS}):
        eventually(lambda: server.connect(1).exists(RESULTS_KEY) and server.connect().exists(OPTIONS_KEY))
        yield server


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sep": ":", "priority_steps": list(range(10)), "queue_order_strategy": "priority"},
        {"sep": ":"},
        {"priority_steps": [0, 5]},
    ],
    ids=["stock", "guide", "separator", "steps"],
)
def test_stock_producers_and_those_by_celerys_guide_are_read(plain: stack.Broker, options: dict[str, Any]) -> None:
    client = Client(app=_app(plain, options))
    jobs = [client.submit(HELLO, priority=priority) for priority in range(10)]
    assert {job.result(PATIENCE_S).text for job in jobs} == {"llo"}
    assert client.queued() == 0


def test_jobs_under_another_separator_are_counted(broker: stack.Broker) -> None:
    broker.connect().delete("idefics", "idefics:7")
    guide = Client(app=_app(broker, {"sep": ":", "priority_steps": list(range(10))}))
    guide.submit(HELLO, priority=7)
    assert Client(broker.url).queued() == guide.queued() == 1
    broker.connect().delete("idefics:7")


def test_options_that_the_workers_share_are_read_with_all_that_a_client_does(tuned: stack.Broker) -> None:
    client = Client(app=_app(tuned, THEIRS, prefix="answers"))
    once = HELLO.model_copy(update={"idempotency_key": "once"})
    jobs = [client.submit(once, priority=12), client.submit(HELLO, priority=6), client.submit(HELLO, priority=0)]
    assert [job.result(PATIENCE_S).text for job in jobs] == ["llo"] * 3
    assert client.submit(once).id == jobs[0].id
    failing = client.submit(Complete(prompt=["Hello"], max_new_tokens=5_000))
    with pytest.raises(InvalidRequest):
        failing.result(PATIENCE_S)
    eventually(lambda: [job.id for job in client.failed()] == [failing.id])
    slow = client.submit(Complete(prompt=["Hello"], max_new_tokens=400))
    eventually(lambda: slow.status == "processing")
    slow._note_cancellation()
    eventually(lambda: slow.status == "canceled")


def test_all_keys_have_the_prefixes(tuned: stack.Broker) -> None:
    client = Client(app=_app(tuned, THEIRS, prefix="answers"))
    client.submit(HELLO.model_copy(update={"idempotency_key": "again"})).result(PATIENCE_S)
    announced = {OPTIONS_KEY.encode(), RESULTS_KEY.encode()}
    strangers = {
        *(key for key in tuned.connect(0).scan_iter() if not key.startswith(b"mine:")),
        *(key for key in tuned.connect(1).scan_iter() if not key.startswith(b"answers_")),
    }
    assert strangers == announced


def test_the_environments_settings_are_the_clients_too(tuned: stack.Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**OURS, "BROKER_URL": tuned.url}.items():
        monkeypatch.setenv(f"IDEFICS_{name}", value)
    assert Client().submit(HELLO, priority=9).result(PATIENCE_S).text == "llo"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({**THEIRS, "global_keyprefix": "other:"}, "global_keyprefix.*IDEFICS_BROKER_KEY_PREFIX"),
        ({"sep": "/", "priority_steps": [0]}, "global_keyprefix"),
        ({**THEIRS, "sep": "#"}, "sep.*IDEFICS_PRIORITY_SEPARATOR"),
        ({**THEIRS, "priority_steps": [0, 5]}, "priority_steps.*IDEFICS_PRIORITY_STEPS"),
    ],
    ids=["prefix", "no prefix", "separator", "steps"],
)
def test_an_app_whose_jobs_the_workers_cannot_see_is_refused(
    tuned: stack.Broker, options: dict[str, Any], names: str
) -> None:
    with pytest.raises(ConfigurationError, match=names):
        Client(app=_app(tuned, options, prefix="answers")).submit(HELLO)


def test_a_url_alone_is_refused_where_the_workers_have_other_options(tuned: stack.Broker) -> None:
    with pytest.raises(ConfigurationError, match="global_keyprefix"):
        Client(tuned.url).submit(HELLO)


# Why there is no answer


def test_another_result_backend_is_named(plain: stack.Broker) -> None:
    base = plain.url.rpartition("/")[0]
    job = Client(app=_app(plain, {}, backend=f"{base}/5")).submit(HELLO)
    with pytest.raises(TimeoutError, match=f"looks for answers in {base}/5, and the workers write them elsewhere"):
        job.result(timeout=1)
    # And without a timeout it does not wait for ever.
    with pytest.raises(ConfigurationError, match="IDEFICS_RESULT_BACKEND"):
        job.result()


def test_the_queues_own_database_is_named(plain: stack.Broker) -> None:
    job = Client(app=_app(plain, {}, backend=plain.url)).submit(HELLO)
    with pytest.raises(TimeoutError, match="in the queues' own database"):
        job.result(timeout=1)


def test_another_prefix_of_answers_is_named(tuned: stack.Broker) -> None:
    job = Client(app=_app(tuned, THEIRS, prefix="other")).submit(HELLO)
    with pytest.raises(TimeoutError, match="IDEFICS_RESULT_KEY_PREFIX"):
        job.result(timeout=1)


@pytest.mark.parametrize(("backend", "says"), [(None, "no result backend"), ("rpc://", "rpc://")])
def test_a_backend_without_answers_is_named_at_once(plain: stack.Broker, backend: str | None, says: str) -> None:
    job = Client(app=_app(plain, {}, backend=backend)).submit(HELLO)
    with pytest.raises(ConfigurationError, match=says):
        job.result(timeout=120)
    with pytest.raises(ConfigurationError, match=says):
        _ = job.status


def test_a_broker_that_is_away_is_named(plain: stack.Broker) -> None:
    away = f"redis://127.0.0.1:{stack.free_port()}/0"
    with pytest.raises(TimeoutError, match="The broker cannot be reached"):
        Client(away, result_backend=plain.results).result("no-such-job", timeout=0.5)


def test_with_another_broker_than_redis_a_timeout_asks_whether_a_worker_runs(broker: stack.Broker) -> None:
    amqp = Celery(broker="memory://", backend=broker.results, set_as_current=False)
    with pytest.raises(TimeoutError, match="Is a worker running on its queue"):
        Client(app=amqp).result("no-such-job", timeout=0.5)
    with pytest.raises(ConfigurationError, match="active_queues"):
        Client(app=amqp).workers()


def test_a_queue_without_workers_is_named_although_others_run(plain: stack.Broker) -> None:
    job = Client(plain.url, queue="others").submit(HELLO)
    with pytest.raises(TimeoutError, match="No worker takes from the queue 'others': is one running"):
        job.result(timeout=0.5)
    assert Client(plain.url, queue="others").workers() == []


def test_running_workers_are_found(plain: stack.Broker) -> None:
    with pytest.raises(TimeoutError, match="1 worker takes from its queue"):
        Client(plain.url).result("no-such-job", timeout=0.5)


def test_workers_are_known_by_their_queue_under_the_prefix_until_they_end(broker: stack.Broker) -> None:
    client = Client(app=_app(broker, {"global_keyprefix": "mine:"}))
    arguments = ("--hostname", "a@here", "--queues", "idefics,others")
    with stack.worker(broker, *arguments, settings={"MODEL": "fake", "BROKER_KEY_PREFIX": "mine:"}):
        eventually(lambda: client.workers() == ["a@here"])
        assert Client(app=client.app, queue="others").workers() == ["a@here"]
        assert Client(broker.url).workers() == []
    assert client.workers() == []


def test_a_worker_that_was_killed_is_gone_soon(broker: stack.Broker) -> None:
    key = WORKERS.named("idefics")
    now, _ = broker.connect().time()
    broker.connect().zadd(key, {"killed": now - SILENT_S - 1, "there": now - SILENT_S + 5})
    assert Client(broker.url).workers() == ["there"]
    broker.connect().delete(key)


def test_the_options_are_gone_soon_after_the_last_worker(broker: stack.Broker, tmp_path: Path) -> None:
    with stack.worker(broker, settings={"MODEL": "fake"}):
        eventually(lambda: broker.connect().exists(OPTIONS_KEY))
        assert 0 < broker.connect().ttl(OPTIONS_KEY) <= 30
        assert 0 < broker.connect(1).ttl(RESULTS_KEY) <= 30
    broker.connect().delete(OPTIONS_KEY)
