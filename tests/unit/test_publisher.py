"""Canvases that are sent with few producers: no thread waits for a second one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery, chord, group
from celery.canvas import Signature

from worker.queue.publisher import AMQP, OneProducerEach


@pytest.fixture
def app() -> Celery:
    app = OneProducerEach("publisher", broker="memory://", backend="cache+memory://", set_as_current=False)
    # A second producer would be waited for, and never come.
    app.conf.update(broker_pool_limit=1, broker_pool_acquire_timeout=1, broker_connection_timeout=1)
    return app


@pytest.mark.parametrize("kind", ["a group of chains", "a chord of chains", "groups in chains in groups"])
def test_tasks_nested_in_a_group_use_its_producer(app: Celery, kind: str) -> None:
    def task(name: str) -> Signature:
        return app.signature(f"shop.{name}", immutable=True)

    canvas = {
        "a group of chains": lambda: group(task("a") | task("b"), task("c") | task("d")),
        "a chord of chains": lambda: chord([task("a") | task("b"), task("c")], task("d")),
        "groups in chains in groups": lambda: group(group(task("a") | task("b")) | task("c"), task("d")),
    }[kind]()
    sender = threading.Thread(target=canvas.apply_async, daemon=True)
    sender.start()
    sender.join(20)
    assert not sender.is_alive()
    with app.connection() as connection:
        assert connection.default_channel.queue_declare("celery").message_count >= 2


def test_threads_that_publish_first_at_the_same_time_share_one_pool() -> None:
    made = []

    class App(Celery):  # type: ignore[misc]
        @property
        def pool(self) -> Any:
            made.append(threading.get_ident())
            time.sleep(0.05)
            return super().pool

    app = App("publisher", broker="memory://", amqp=f"{AMQP.__module__}:AMQP", set_as_current=False)
    with ThreadPoolExecutor(8) as threads:
        pools = {id(each.result()) for each in [threads.submit(lambda: app.amqp.producer_pool) for _ in range(8)]}
    assert len(pools) == len(set(made)) == 1


def test_a_thread_gives_its_producer_back(app: Celery) -> None:
    for _ in range(3):
        app.signature("shop.a").apply_async()
    with app.producer_or_acquire() as outer, app.producer_or_acquire() as inner:
        assert outer is inner
    with pytest.raises(ZeroDivisionError), app.producer_or_acquire():
        raise ZeroDivisionError
    with app.producer_or_acquire() as again:
        assert again is not None
