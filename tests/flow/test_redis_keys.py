"""After a mixed load every key in Redis is one of tasks/redis_keys.py, and what has no TTL is named permanent there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chord
from celery.exceptions import TimeoutError as CeleryTimeoutError

from tasks import Callback, Client, Complete
from tasks.redis_keys import BINDING, BINDING_DEADLINES, CANCELLATION, PERMANENT_BINDING, REDIS_KEYS, RedisKey
from tests.support.gallery import Gallery
from tests.support.receiver import SECRET, Receiver
from tests.support.redis_servers import let_the_visibility_timeout_pass
from tests.support.stand import Producer, stand
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack
from worker.models.fake import UNSURE

#: Lists are queues only where somebody has a queue of that name.
QUEUES = ("idefics", "celery", "shop")


def found(server: stack.Broker) -> Iterator[tuple[str, bool, list[RedisKey]]]:
    """Each key, whether it has a TTL, and the kinds that it may be of."""
    for number, database in enumerate(("queues", "results")):
        with server.connect(number) as redis:
            for raw in redis.scan_iter():
                name, ttl, type = raw.decode(), redis.ttl(raw), redis.type(raw).decode()
                if type != "none":
                    kinds = [key for key in REDIS_KEYS if (key.database, key.type) == (database, type)]
                    yield f"{database}: {name}", ttl != -1, [key for key in kinds if key.matches(name)]


def strays(server: stack.Broker) -> list[str]:
    """Keys that are not in the table, or should end by themselves and do not."""
    return [
        name
        for name, has_ttl, kinds in found(server)
        if not kinds or (not has_ttl and all(key.ttl is not None for key in kinds))
    ]


def kinds(server: stack.Broker) -> set[str]:
    return {key.pattern for _, _, kinds in found(server) for key in kinds}


def test_a_key_of_no_kind_and_one_without_its_ttl_are_found(server: stack.Broker) -> None:
    server.connect(0).set("idefics:stray", 1)
    server.connect(1).set("celery-task-meta-a", "{}")
    server.connect(1).set("idefics:key:a", "{}", ex=60)
    assert strays(server) == ["queues: idefics:stray", "results: celery-task-meta-a"]


def test_a_mixed_load_leaves_only_keys_of_the_table(server: stack.Broker, gallery: Gallery, tmp_path: Path) -> None:
    producer, client = Producer(server), Client(server.url, check_callbacks=False)
    held, alone = uuid.uuid4().hex, uuid.uuid4().hex
    with Receiver().open() as receiver:
        settings: dict[str, str] = {
            "ANSWER_CACHE_TTL_S": "60",
            "CALLBACK_KEYS": f"main={SECRET}",
            "CALLBACK_ALLOW_HTTP": "true",
            "CALLBACK_ALLOW_NETWORKS": "127.0.0.0/8",
            "CALLBACK_PORTS": str(receiver.port),
            "CALLBACK_SCHEDULE_S": "0,0.2,0.2",
        }
        with stack.worker(server, settings={"MODEL": "fake", **settings}, app="worker.callbacks"):
            with stand(server, gallery, tmp_path / "killed", **settings) as stood:
                _send_everything(producer, client, receiver)
                killed = producer.show(gallery.held(held)).apply_async()
                gallery.await_requests(held)
                assert strays(server) == []
                seen = kinds(server)
                stood.process.kill()
                stood.process.wait(PATIENCE_S)
            let_the_visibility_timeout_pass(server)
            seen |= kinds(server)
            assert strays(server) == []
            gallery.release(held)
            with stand(server, gallery, tmp_path / "next", **settings) as stood:
                assert killed.get(timeout=PATIENCE_S)
                later = producer.show(gallery.held(alone), countdown=1).apply_async()
                gallery.await_requests(alone)
                seen |= kinds(server)
                gallery.release(alone)
                assert later.get(timeout=PATIENCE_S)
                eventually(lambda: server.connect().exists("unacked_index", *QUEUES) == 0)
    assert strays(server) == []
    # The bindings alone have no end: the jobs are gone.
    lasting = {key.pattern for _, has_ttl, kinds in found(server) for key in kinds if not has_ttl}
    assert lasting <= {key.pattern for key in (BINDING, PERMANENT_BINDING, BINDING_DEADLINES)}
    assert seen >= {
        *("unacked", "unacked_index", "idefics:redeliveries:{id}", "celery-task-meta-{id}", "idefics:key:{sha256}"),
        *(
            "idefics:updates:{id}",
            "idefics:answer:{digest}",
            "idefics:failed",
            "idefics:review",
            "idefics:failed:signatures",
            "idefics:cancel:{id}",
        ),
        *(
            "idefics:worker:options",
            "idefics:worker:results",
            "idefics:worker:models",
            "idefics:callbacks:delivery:{id}",
        ),
        *("idefics:callbacks:delivered", "idefics:callbacks:failed", "idefics:callbacks:disabled"),
    }


def _send_everything(producer: Producer, client: Client, receiver: Receiver) -> None:
    def submit(text: str, **fields: Any) -> Any:
        return client.submit(Complete(prompt=[text], max_new_tokens=3, **fields))

    def callback(path: str = "/hook") -> Callback:
        return Callback(url=receiver.url.replace("/hook", path), key_id="main")

    jobs = [submit("Hello", stream=True), submit("Hello"), submit("Once", idempotency_key="once")]
    jobs.append(client.submit(Complete(prompt=["First"], max_new_tokens=3), priority=0))
    jobs.append(submit("Delivered", callback=callback()))
    jobs.append(submit(f"{UNSURE} Hello", min_confidence=0.9))
    for job in jobs:
        assert job.result(timeout=PATIENCE_S)
    eventually(lambda: len(receiver.calls) == 1)
    for answers in ([410], [500] * 3):
        receiver.answers[:] = answers
        submit("Refused", callback=callback(f"/{len(answers)}")).result(timeout=PATIENCE_S)
        eventually(lambda: not receiver.answers)
    submit("Canceled").cancel()
    # As in examples/wire: no job of this id ends, which would delete the key.
    producer.server.connect(1).set(CANCELLATION.named(uuid.uuid4().hex), 1, ex=60)
    producer.app.send_task("idefics.complete", kwargs={"prompt": 7}, queue="idefics").get(propagate=False)
    with producer.server.connect() as redis:
        redis.lpush("idefics", json.dumps({"body": "", "headers": {}, "properties": {}}))
    joined = chord([producer.complete("a"), producer.complete("b")], producer.complete("joined").set(immutable=True))()
    assert joined.get(timeout=PATIENCE_S)
    later = producer.complete(countdown=1).apply_async()
    with pytest.raises(CeleryTimeoutError):
        later.get(timeout=0.3)
    assert later.get(timeout=PATIENCE_S)
    assert producer.app.control.ping(timeout=1.0)
    eventually(lambda: producer.queued() == 0)
