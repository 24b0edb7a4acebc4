"""A job ends once, whatever freezes or kills its workers, and a key stands for one job, whoever sends it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery.canvas import Signature
from celery.result import AsyncResult

from tasks import Client, Complete, InvalidRequest
from tasks.redis_keys import CANCELLATION
from tests.support.gallery import Gallery
from tests.support.redis_servers import let_the_visibility_timeout_pass
from tests.support.stand import Producer, Stand, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.queue.cancellation import POLL_INTERVAL_S
from worker.queue.result_backend import TAKEN


def name() -> str:
    return uuid.uuid4().hex[:8]


def processes(stood: Stand) -> list[psutil.Process]:
    parent = psutil.Process(stood.process.pid)
    return [parent, *parent.children(recursive=True)]


def kept(server: stack.Broker, job: AsyncResult) -> dict[str, Any]:
    return dict(json.loads(server.connect(1).get(f"celery-task-meta-{job.id}") or b"{}"))


# Frozen and killed


def test_a_worker_that_wakes_up_leaves_its_jobs_to_the_one_that_took_them(
    server: stack.Broker, gallery: Gallery, tmp_path: Path
) -> None:
    producer, links, shown = Producer(server), name(), [name(), name()]
    with stand(server, gallery, tmp_path / "frozen") as frozen:
        link = producer.app.signature("shop.keep", queue=links, immutable=True)
        linked = producer.show(gallery.held(shown[0]), link=link).apply_async()
        plain = producer.show(gallery.held(shown[1])).apply_async()
        gallery.await_requests(*shown)
        asleep = processes(frozen)
        for process in asleep:
            process.suspend()
        with stand(server, gallery, tmp_path / "taker", ANSWER_CACHE_TTL_S="60"):
            let_the_visibility_timeout_pass(server)
            gallery.release()
            answers = [job.get(timeout=PATIENCE_S)["text"] for job in (linked, plain)]
            told = [kept(server, job) for job in (linked, plain)]
            # Both show the same picture: the second one's answer was there.
            eventually(lambda: server.connect().exists("unacked_index") == 0)
            assert len(server.connect(1).keys("idefics:answer:*")) == 1
        for process in asleep:
            process.resume()
        eventually(lambda: f"Job {linked.id} has ended as SUCCESS already: this run is" in frozen.log.read_text())
        eventually(lambda: f"Job {plain.id} has ended as SUCCESS already: this run's" in frozen.log.read_text())
        assert producer.complete().apply_async().get(timeout=PATIENCE_S)["text"] == "llo"
        assert producer.stats()["pool"]["in-flight"] == 0
    assert answers == ["llo", "llo"]
    assert [kept(server, job) for job in (linked, plain)] == told
    assert server.connect().llen(links) == 1


def test_a_job_that_kills_its_workers_fails_as_lost_and_its_neighbour_succeeds(
    server: stack.Broker, gallery: Gallery, tmp_path: Path
) -> None:
    producer, bad, fine, errbacks = Producer(server), name(), name(), name()
    errback = producer.app.signature("shop.keep", queue=errbacks, immutable=True)
    poison = producer.show(gallery.held(bad), link_error=errback).apply_async()
    neighbour = producer.show(gallery.held(fine)).apply_async()
    for deaths in (1, 2):
        with stand(server, gallery, tmp_path / "log", MAX_WORKER_DEATHS="2") as stood:
            eventually(lambda deaths=deaths: gallery.asked.count(bad) == deaths)
            gallery.await_requests(fine)
            stood.process.kill()
            stood.process.wait(PATIENCE_S)
        gallery.release(fine)
        let_the_visibility_timeout_pass(server)
    with stand(server, gallery, tmp_path / "last", MAX_WORKER_DEATHS="2") as stood:
        error = poison.get(timeout=PATIENCE_S, propagate=False)
        assert neighbour.get(timeout=PATIENCE_S)["text"] == "llo"
        eventually(lambda: server.connect().exists("unacked_index") == 0)
    assert (poison.state, error.args[0]) == ("FAILURE", "worker_lost")
    assert error.args[1].startswith("2 workers died with this job")
    assert gallery.asked.count(bad) == 2
    assert server.connect().llen(errbacks) == 1
    kept = server.connect().keys("idefics:*") + server.connect(1).keys("idefics:*")
    # What workers tell of themselves ends by its time to live.
    others = (b"idefics:failed", b"idefics:worker:", b"idefics:load:", b"idefics:host:")
    assert [key for key in kept if not key.startswith(others)] == []


@pytest.mark.parametrize("end", ["SUCCESS", "FAILURE"])
def test_a_job_whose_worker_was_killed_right_after_its_end_does_not_run_again_and_its_chord_goes_on(
    held_up: Stand, end: str
) -> None:
    producer, id, group, shown, after = held_up.producer, name(), name(), name(), name()
    backend, queues = producer.app.backend, producer.server.connect()
    backend.set_chord_size(group, 1)
    body = producer.app.signature("shop.join", queue=after, task_id=name())
    # What is there: its record, and its message, unacknowledged.
    backend.store_result(id, {"text": "a"} if end == "SUCCESS" else InvalidRequest("no"), end)
    arguments = {"prompt": [{"image": held_up.gallery.picture(shown)}]}
    options = {"task_id": id, "group_id": group, "group_index": 0, "chord": body, "queue": name()}
    producer.app.send_task("idefics.complete", kwargs=arguments, **options)
    message = json.loads(queues.lpop(options["queue"]) or b"")
    message["properties"]["delivery_info"] = {"exchange": "", "routing_key": "idefics", "redelivered": True}
    queues.lpush("idefics", json.dumps(message))
    if end == "SUCCESS":
        eventually(lambda: queues.llen(after) == 1)
    else:
        eventually(lambda: backend.get_state(body.options["task_id"]) == "FAILURE")
    eventually(lambda: queues.hlen("unacked") == 0)
    assert backend.get_state(id) == end
    assert shown not in held_up.gallery.asked


# A task id that is used again


def again(producer: Producer, id: str, text: str, **options: Any) -> AsyncResult:
    return producer.complete(text).apply_async(task_id=id, **options)


def await_answer(producer: Producer, id: str, text: str) -> None:
    eventually(lambda: answered(producer, id, text))


def answered(producer: Producer, id: str, text: str) -> bool:
    return bool((kept(producer.server, producer.app.AsyncResult(id)).get("result") or {}).get("text") == text)


def test_an_id_that_is_used_again_for_another_payload_runs(producer: Producer) -> None:
    id = name()
    for text in ("one", "two", "one"):
        again(producer, id, text)
        await_answer(producer, id, text)


def test_a_redelivered_message_under_a_used_id_runs(producer: Producer) -> None:
    id, queue = name(), name()
    again(producer, id, "one")
    await_answer(producer, id, "one")
    again(producer, id, "two", queue=queue)
    with producer.server.connect() as queues:
        message = json.loads(queues.lpop(queue) or b"")
        message["properties"]["delivery_info"] = {"exchange": "", "routing_key": "idefics", "redelivered": True}
        queues.lpush("idefics", json.dumps(message))
    await_answer(producer, id, "two")


@pytest.mark.parametrize("refused", [{"shadow": 7}, {"task": "idefics.captoin"}, {"task": "idefics.complete", "x": 1}])
def test_a_refused_message_fails_under_its_id_and_blocks_no_later_job(
    producer: Producer, refused: dict[str, Any]
) -> None:
    id, job = name(), producer.app.AsyncResult

    def refuse() -> None:
        arguments = {"prompt": ["one"]} if "x" not in refused else {"prompt": []}
        headers = {"headers": {"shadow": 7}} if "shadow" in refused else {}
        producer.app.send_task(
            refused.get("task", "idefics.complete"), kwargs=arguments, task_id=id, queue="idefics", **headers
        )
        eventually(lambda: kept(producer.server, job(id)).get("status") == "FAILURE")

    refuse()
    again(producer, id, "one")
    await_answer(producer, id, "one")
    refuse()


def test_a_job_that_expires_under_a_used_id_is_revoked(producer: Producer) -> None:
    id = name()
    again(producer, id, "one")
    await_answer(producer, id, "one")
    again(producer, id, "two", expires=datetime.now(UTC) - timedelta(seconds=5))
    eventually(lambda: kept(producer.server, producer.app.AsyncResult(id)).get("status") == "REVOKED")
    assert kept(producer.server, producer.app.AsyncResult(id))["result"]["exc_message"] == ["expired"]
    again(producer, id, "three")
    await_answer(producer, id, "ree")


# Two payloads in flight under one id


def pushed(producer: Producer, id: str, *jobs: Signature) -> None:
    """Queue jobs under one id in one step: they are taken together."""
    scratch = name()
    for job in jobs:
        job.apply_async(task_id=id, queue=scratch)
    with producer.server.connect() as queues:
        messages = [json.loads(each) for each in reversed(queues.lrange(scratch, 0, -1))]
        for message in messages:
            message["properties"]["delivery_info"] = {"exchange": "", "routing_key": "idefics"}
        queues.lpush("idefics", *map(json.dumps, messages))
        queues.delete(scratch)


def settled(producer: Producer) -> bool:
    with producer.server.connect() as queues:
        return queues.llen("idefics") == queues.hlen("unacked") == 0


def saying(stood: Stand, text: str, shown: str, links: str = "") -> Signature:
    """A job that answers with a text once its picture is released."""
    arguments = {"prompt": [{"image": stood.gallery.held(shown)}, text], "max_new_tokens": 3}
    app = stood.producer.app
    link = app.signature("shop.keep", queue=links, immutable=True) if links else None
    return app.signature("idefics.complete", kwargs=arguments, link=link)


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old"), ("old", "new", "old")])
def test_payloads_queued_at_once_under_a_used_id_end_as_the_last_of_them(
    producer: Producer, order: tuple[str, ...]
) -> None:
    for _ in range(5):
        id, links = name(), name()
        again(producer, id, "old")
        await_answer(producer, id, "old")
        link = producer.app.signature("shop.keep", queue=links, immutable=True)
        pushed(producer, id, *(producer.complete(text, link=link if text == "new" else None) for text in order))
        eventually(lambda: settled(producer))
        assert answered(producer, id, order[-1])
        assert producer.server.connect().llen(links) == 1


def test_another_payload_under_an_id_that_still_runs_runs_after_it(held_up: Stand) -> None:
    producer, shown, links, id = held_up.producer, [name(), name()], [name(), name()], name()
    first, second = (saying(held_up, text, *rest) for text, *rest in zip(("one", "two"), shown, links, strict=True))
    pushed(producer, id, first)
    held_up.gallery.await_requests(shown[0])
    pushed(producer, id, second)
    eventually(lambda: producer.queued() == 0)
    held_up.gallery.release(shown[0])
    held_up.gallery.await_requests(shown[1])
    assert kept(producer.server, producer.app.AsyncResult(id))["status"] == "STARTED"
    held_up.gallery.release(shown[1])
    await_answer(producer, id, "two")
    assert [producer.server.connect().llen(each) for each in links] == [1, 1]


@pytest.mark.parametrize("by", ["key", "revoke"])
def test_a_cancellation_ends_all_jobs_under_its_id_and_by_key_none_that_follows(held_up: Stand, by: str) -> None:
    producer, shown, id = held_up.producer, [name(), name()], name()
    first, second = (saying(held_up, text, picture) for text, picture in zip(("one", "two"), shown, strict=True))
    pushed(producer, id, first)
    held_up.gallery.await_requests(shown[0])
    pushed(producer, id, second)
    eventually(lambda: producer.queued() == 0)
    if by == "revoke":
        producer.app.control.revoke(id, terminate=True)
    else:
        producer.server.connect(1).set(CANCELLATION.named(id), 1, ex=60)
    eventually(lambda: settled(producer))
    assert kept(producer.server, producer.app.AsyncResult(id))["status"] == "REVOKED"
    assert shown[1] not in held_up.gallery.asked
    held_up.gallery.release(*shown)
    if by == "key":
        # The worker's next look forgets the id.
        time.sleep(2 * POLL_INTERVAL_S)
        again(producer, id, "three")
        await_answer(producer, id, "ree")


@pytest.fixture(scope="module")
def one_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """One of two workers at one broker, each with a job at a time."""
    folder, settings = tmp_path_factory.mktemp("two"), {"PREFETCH": "1", "MODEL": "fake:0.002"}
    with (
        Gallery().open() as gallery,
        stack.broker() as server,
        stand(server, gallery, folder / "one", **settings) as stood,
        stand(server, gallery, folder / "other", **settings),
    ):
        yield stood


@pytest.mark.parametrize("released", [(0, 1), (1, 0)])
def test_of_two_payloads_running_under_one_id_the_later_ones_result_is_kept(
    one_of_two: Stand, released: tuple[int, int]
) -> None:
    producer, shown, links, id = one_of_two.producer, [name(), name()], [name(), name()], name()
    pushed(producer, id, *map(saying, [one_of_two] * 2, ("one", "two"), shown, links))
    one_of_two.gallery.await_requests(*shown)
    for number in released:
        one_of_two.gallery.release(shown[number])
        eventually(lambda number=number: producer.server.connect().llen(links[number]) == 1)
    eventually(lambda: settled(producer))
    assert answered(producer, id, "two")


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_two_workers_agree_on_the_last_payload_under_a_used_id(one_of_two: Stand, order: tuple[str, str]) -> None:
    producer = one_of_two.producer
    for _ in range(20):
        id = name()
        again(producer, id, "old")
        await_answer(producer, id, "old")
        pushed(producer, id, *map(producer.complete, order))
        eventually(lambda: settled(producer))
        assert answered(producer, id, order[-1])


# Idempotency keys


def keyed(key: str, text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"prompt": [text], "max_new_tokens": 3, "idempotency_key": key, **more}


def send(producer: Producer, arguments: dict[str, Any], **options: Any) -> AsyncResult:
    return producer.app.send_task("idefics.complete", kwargs=arguments, queue="idefics", **options)


def test_a_job_with_a_used_key_waits_for_the_first_ones_answer_without_running(held_up: Stand) -> None:
    shown, key = name(), name()
    picture = {"image": held_up.gallery.held(shown)}
    first = send(held_up.producer, keyed(key, picture, metadata={"row": 1}))  # type: ignore[arg-type]
    held_up.gallery.await_requests(shown)
    second = send(held_up.producer, keyed(key, picture, metadata={"row": 2}))  # type: ignore[arg-type]
    eventually(lambda: second.state == "RETRY")
    held_up.gallery.release(shown)
    answers = [job.get(timeout=PATIENCE_S) for job in (first, second)]
    assert answers[1] == {**answers[0], "metadata": {"row": 2}}
    assert held_up.gallery.asked.count(shown) == 1
    assert second.retries == 0


def test_a_job_with_a_used_key_may_reach_its_deadline_while_it_waits(held_up: Stand) -> None:
    shown, key = name(), name()
    job = keyed(key, {"image": held_up.gallery.held(shown)}, deadline_s=1.5)  # type: ignore[arg-type]
    # The first one takes its time to load its image: its deadline is looked at afterwards.
    send(held_up.producer, job)
    held_up.gallery.await_requests(shown)
    error = send(held_up.producer, job).get(timeout=PATIENCE_S, propagate=False)
    held_up.gallery.release(shown)
    assert error.args[0] == "deadline_exceeded"
    assert "idempotency_key" in error.args[1]


def test_a_job_with_a_used_key_and_another_payload_is_refused(producer: Producer) -> None:
    key = name()
    assert send(producer, keyed(key)).get(timeout=PATIENCE_S)["text"] == "llo"
    error = send(producer, keyed(key, "Goodbye")).get(timeout=PATIENCE_S, propagate=False)
    assert error.args[0] == "invalid_request"
    assert "another payload" in error.args[1]


def test_a_message_that_was_sent_twice_is_answered_once(held_up: Stand) -> None:
    producer, links, key, id = held_up.producer, name(), name(), name()
    link = producer.app.signature("shop.keep", queue=links, immutable=True)
    job = send(producer, keyed(key), task_id=id, link=link)
    job.get(timeout=PATIENCE_S)
    told = kept(producer.server, job)
    send(producer, keyed(key), task_id=id, link=link)
    eventually(lambda: f"Job {id} has ended as SUCCESS already" in held_up.log.read_text())
    eventually(lambda: producer.server.connect().hlen("unacked") == 0)
    assert kept(producer.server, job) == {**told, TAKEN: kept(producer.server, job)[TAKEN]}
    assert producer.server.connect().llen(links) == 1


def test_a_message_redelivered_while_its_job_runs_takes_no_place(held_up: Stand) -> None:
    producer, shown, id = held_up.producer, name(), name()
    with producer.server.connect() as server:
        job = producer.show(held_up.gallery.held(shown)).apply_async(task_id=id)
        held_up.gallery.await_requests(shown)
        for _ in range(3):
            producer.show(held_up.gallery.held(shown)).apply_async(task_id=id)
        # Taken, and answered by the same run: one message is left to stand for it.
        eventually(lambda: server.llen("idefics") == 0 and server.hlen("unacked") == 1)
        held_up.gallery.release()
        assert job.get(timeout=PATIENCE_S)["text"] == "llo"
        eventually(lambda: server.hlen("unacked") == 0)


def test_the_client_and_other_producers_share_their_keys(producer: Producer, client: Client) -> None:
    key = name()
    job = Complete.model_validate(keyed(key))
    first = client.submit(job)
    again = client.submit(job)
    other = send(producer, keyed(key))
    assert again.id == first.id != other.id
    assert first.result(PATIENCE_S).text == other.get(timeout=PATIENCE_S)["text"] == "llo"
    assert first.result().timing.generate_s == other.get()["timing"]["generate_s"]
    with pytest.raises(InvalidRequest, match="another job has this key and another payload"):
        client.submit(Complete.model_validate(keyed(key, "Goodbye")))
