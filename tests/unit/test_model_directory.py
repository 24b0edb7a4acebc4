"""How `model=` finds a queue: what workers say in Redis that they serve, and what a client makes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from celery import Celery
from redis.exceptions import NoPermissionError

from tasks import (
    BrokerUnavailable,
    Client,
    Complete,
    ConfigurationError,
    ModelNotFound,
    NotPermitted,
    QueueFull,
    ServedModel,
    model_directory,
)
from tasks.model_directory import CACHE_S, ModelDirectory, Reading, queues
from tasks.worker_registry import MODEL_TTL_S, SILENT_S, models_key
from worker.demo import stack

LARGE = ServedModel("HuggingFaceM4/idefics-9b", "idefics.large")
SMALL = ServedModel("HuggingFaceTB/SmolVLM-256M", "idefics.small")
DEMO = ServedModel("demo", "idefics")
JOB = Complete(prompt=["Hello"])


@pytest.fixture
def client(broker: stack.Broker) -> Iterator[Client]:
    client = Client(broker.url)
    yield client
    client.app.close()
    broker.connect().flushdb()
    broker.connect(1).flushdb()


def say(broker: stack.Broker, *models: ServedModel, ago_s: float = 0.0) -> None:
    """Enter models, as workers did some seconds ago."""
    redis = broker.connect()
    now, _ = redis.time()
    redis.zadd("idefics:worker:models", {model.written(): now - ago_s for model in models})


def waiting(broker: stack.Broker) -> dict[str, int]:
    """Jobs by queue."""
    counts = {name: broker.connect().llen(f"{name}\x06\x165") for name in ("idefics", LARGE.queue, SMALL.queue)}
    return {name: count for name, count in counts.items() if count}


# What is served


@pytest.mark.parametrize(
    ("queue", "name"),
    [("idefics", None), ("idefics.large", "large"), ("idefics.qwen2.5-vl", "qwen2.5-vl"), ("others", None)],
)
def test_a_models_name_is_its_queues(queue: str, name: str | None) -> None:
    assert ServedModel("id", queue).name == name


def test_a_served_model_is_read_as_it_was_written() -> None:
    assert ServedModel.read(LARGE.written()) == LARGE


def test_a_model_is_found_by_its_name_and_by_its_id() -> None:
    assert queues([DEMO, LARGE]) == {"demo": "idefics", "large": LARGE.queue, LARGE.id: LARGE.queue}


def test_of_two_queues_with_one_id_the_first_counts_and_each_has_its_name() -> None:
    quantized = ServedModel(LARGE.id, "idefics.quantized")
    found = queues([LARGE, quantized])
    assert (found[LARGE.id], found["quantized"]) == (LARGE.queue, quantized.queue)


def test_a_name_comes_before_an_id() -> None:
    assert queues([DEMO, ServedModel("another", "idefics.demo")])["demo"] == "idefics.demo"


def test_the_key_has_the_brokers_prefix() -> None:
    app = Celery(set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": "mine:"}
    assert models_key(app) == "mine:idefics:worker:models"


def test_models_are_listed_by_queue_while_their_workers_are_alive(client: Client, broker: stack.Broker) -> None:
    assert client.models() == []
    say(broker, SMALL, DEMO)
    say(broker, LARGE, ago_s=SILENT_S + 5)
    assert client.models() == asyncio.run(client.amodels()) == [DEMO, SMALL]


def test_models_cannot_be_known_on_another_broker() -> None:
    with pytest.raises(ConfigurationError, match="Redis only"):
        Client("memory://", result_backend="cache+memory://").submit(JOB, model="large")


# Where a job goes


@pytest.mark.parametrize("model", ["large", LARGE.id])
def test_a_job_goes_to_the_queue_of_its_model(client: Client, broker: stack.Broker, model: str) -> None:
    say(broker, DEMO, LARGE)
    client.submit(JOB, model=model)
    client.submit_many([JOB, JOB], model=model)
    asyncio.run(client.asubmit(JOB, model=model))
    assert waiting(broker) == {LARGE.queue: 4}
    assert client.queued(model=model) == client.queued(5, model=model) == 4
    assert asyncio.run(client.aqueued(model=model)) == 4


def test_a_client_of_a_model_sends_all_to_it_and_one_job_may_name_another(broker: stack.Broker, client: Client) -> None:
    say(broker, DEMO, LARGE, SMALL)
    of_large = Client(app=client.app, model="large")
    assert (of_large.queue, of_large.is_bound, client.is_bound) == (LARGE.queue, True, False)
    of_large.submit(JOB)
    of_large.submit(JOB, model="small")
    of_large.submit(JOB, queue="idefics")
    assert waiting(broker) == {"idefics": 1, LARGE.queue: 1, SMALL.queue: 1}
    assert of_large.queued() == 1


def test_a_model_that_nobody_serves_is_refused_with_those_that_are(client: Client, broker: stack.Broker) -> None:
    say(broker, DEMO, LARGE)
    with pytest.raises(ModelNotFound) as refused:
        client.submit(JOB, model="smal")
    assert str(refused.value) == (
        "No worker serves the model 'smal'. Served now: demo, large (HuggingFaceM4/idefics-9b)."
    )
    assert (refused.value.code, refused.value.served) == ("model_not_found", [DEMO, LARGE])
    assert refused.value.response()[0] == 404
    assert waiting(broker) == {}


def test_without_any_worker_the_refusal_says_so(client: Client) -> None:
    with pytest.raises(ModelNotFound, match=r"'large'\. No worker is running\."):
        client.submit(JOB, model="large")


def test_a_client_of_an_unknown_model_reads_results_all_the_same(client: Client) -> None:
    of_gone = Client(app=client.app, model="gone")
    assert of_gone.status("an id") == "starting"
    with pytest.raises(TimeoutError, match="Is a worker running on its queue"):
        of_gone.result("an id", timeout=0.1)
    with pytest.raises(ModelNotFound):
        _ = of_gone.queue


def test_a_models_jobs_wait_while_its_only_worker_restarts(client: Client, broker: stack.Broker) -> None:
    say(broker, LARGE, ago_s=MODEL_TTL_S - 60)
    client.submit(JOB, model="large")
    assert waiting(broker) == {LARGE.queue: 1}


def test_a_model_whose_workers_are_alive_has_an_id_before_one_whose_are_not(
    client: Client, broker: stack.Broker
) -> None:
    say(broker, ServedModel(SMALL.id, LARGE.queue), ago_s=600)
    say(broker, SMALL)
    client.submit(JOB, model=SMALL.id)
    assert waiting(broker) == {SMALL.queue: 1}


def test_a_queue_and_a_model_are_refused(client: Client) -> None:
    with pytest.raises(ConfigurationError, match="not both"):
        client.submit(JOB, queue="idefics", model="large")
    with pytest.raises(ConfigurationError, match="not both"):
        Client(app=client.app, queue="idefics", model="large")


def test_an_idempotency_key_is_another_one_for_each_model(client: Client, broker: stack.Broker) -> None:
    say(broker, DEMO, LARGE, SMALL)
    keyed = JOB.model_copy(update={"idempotency_key": "row 7"})
    ids = {model: client.submit(keyed, model=model).id for model in ("demo", "large", "small")}
    assert len(set(ids.values())) == 3
    again = {model: client.submit(keyed, model=model).id for model in ids}
    assert again == ids
    assert client.submit(keyed).id == ids["demo"]
    assert client.submit(keyed, model=LARGE.id).id == client.submit(keyed, queue=LARGE.queue).id == ids["large"]
    assert waiting(broker) == {"idefics": 1, LARGE.queue: 1, SMALL.queue: 1}


def test_the_bound_on_waiting_jobs_is_each_models_own(client: Client, broker: stack.Broker) -> None:
    say(broker, LARGE, SMALL)
    bounded = Client(app=client.app, max_queued=2)
    bounded.submit_many([JOB, JOB], model="large")
    with pytest.raises(QueueFull, match=r"idefics\.large"):
        bounded.submit(JOB, model="large")
    bounded.submit(JOB, model="small")


# What it costs


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Reading]:
    """What was read from Redis, in order."""
    read, made = model_directory.read_models, []

    def note(app: Celery) -> Reading:
        made.append(read(app))
        return made[-1]

    monkeypatch.setattr(model_directory, "read_models", note)
    return made


def test_many_jobs_ask_once(client: Client, broker: stack.Broker, readings: list[Reading]) -> None:
    say(broker, LARGE)
    for _ in range(50):
        client.submit(JOB, model="large")
    assert len(readings) == 1


def test_a_model_that_was_just_started_is_found_within_a_second(
    client: Client, broker: stack.Broker, readings: list[Reading], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ModelDirectory(client.app)
    for _ in range(50):
        with pytest.raises(ModelNotFound):
            directory.queue_of("large")
    assert len(readings) == 1
    say(broker, LARGE)
    later = time.monotonic() + 1.1
    monkeypatch.setattr(model_directory.time, "monotonic", lambda: later)
    assert directory.queue_of("large") == LARGE.queue


def test_what_was_read_is_read_again_later(
    client: Client, broker: stack.Broker, readings: list[Reading], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(broker, LARGE)
    directory = ModelDirectory(client.app)
    directory.queue_of("large")
    broker.connect().delete("idefics:worker:models")
    assert directory.queue_of("large") == LARGE.queue
    later = time.monotonic() + CACHE_S
    monkeypatch.setattr(model_directory.time, "monotonic", lambda: later)
    with pytest.raises(ModelNotFound):
        directory.queue_of("large")


def test_a_broker_that_is_away_is_asked_once_a_second(readings: list[Reading]) -> None:
    directory = ModelDirectory(Client(f"redis://127.0.0.1:{stack.free_port()}/0").app)
    for _ in range(5):
        with pytest.raises(BrokerUnavailable):
            directory.queue_of("large")
    assert len(readings) == 1


def test_a_user_who_may_not_ask_is_told_so(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(app: Celery) -> str:
        raise NoPermissionError("no")

    monkeypatch.setattr(model_directory, "models_key", refuse)
    with pytest.raises(NotPermitted):
        client.submit(JOB, model="large")
