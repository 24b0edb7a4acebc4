"""Which transport is used, and messages for workers of other apps."""

from __future__ import annotations

import pytest
import redis
from kombu import Connection, Queue
from kombu import transport as kombu_transport

from tests.unit.transport.taker import Start
from worker.queue import transport

# The choice


def test_pending_acks_behind_sentinels_do_not_depend_on_which_one_is_asked() -> None:
    one, other = (Connection("sentinel://a:1/0;sentinel://b:2/0") for _ in range(2))
    other.switch("sentinel://b:2/0")
    assert transport.SentinelChannel.broker_identity(one) == transport.SentinelChannel.broker_identity(other)
    single = Connection("redis://a:1/0")
    assert transport.Channel.broker_identity(single) == single.as_uri()


def test_the_transport_replaces_kombus_for_redis_and_sentinel_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombu_transport, "TRANSPORT_ALIASES", dict(kombu_transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu_transport, "_transport_cache", {})
    transport.use()
    for url in ("redis://host/0", "rediss://host/0", "redis+socket:///run/redis.sock"):
        assert isinstance(Connection(url).transport, transport.Transport)
    assert isinstance(Connection("sentinel://host/0").transport, transport.SentinelTransport)


# Messages for workers of other apps


@pytest.mark.parametrize(
    ("task", "priority", "list_"),
    [("site.save", 5, "jobs\x06\x163"), ("site.save", 2, "jobs"), ("idefics.chat", 5, "jobs\x06\x165")],
)
def test_a_task_of_another_app_is_put_and_put_back_where_a_stock_worker_reads(
    server: redis.Redis, start: Start, task: str, priority: int, list_: str
) -> None:
    taker = start()
    producer = taker.connection.Producer(taker.channel, serializer="json")
    taker.consumer.cancel()
    producer.publish([], routing_key="jobs", priority=priority, headers={"task": task}, declare=[Queue("jobs")])
    assert server.llen(list_) == 1
    taker.consumer.consume()
    message = taker.take()
    assert server.llen(list_) == 0
    message.requeue()
    assert server.llen(list_) == 1
