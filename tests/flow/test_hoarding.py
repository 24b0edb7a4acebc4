"""Two workers, one of them slow: none holds jobs while the other one is idle."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from tasks import Client, Complete
from tests.support.stand import Producer
from tests.support.waiting import PATIENCE_S, eventually
from worker.demo import stack

#: Jobs that a worker runs at once; it takes three times as many.
SLOTS = 4
TOKENS = 10
#: Seconds of a job in the slow worker. In the other one it takes a twentieth.
SLOW_S = 0.2 * (TOKENS + 1)


@pytest.fixture(scope="module")
def server() -> Iterator[stack.Broker]:
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(stack.broker())
        for name, step_s in (("slow", 0.2), ("fast", 0.01)):
            settings = {"MODEL": f"fake:{step_s}", "MAX_BATCH_SIZE": str(SLOTS)}
            opened.enter_context(stack.worker(server, "-n", f"{name}@here", settings=settings))
        yield server


@pytest.fixture
def client(server: stack.Broker) -> Client:
    return Client(server.url)


def job(number: int) -> Complete:
    return Complete(prompt=[f"hello {number}"], max_new_tokens=TOKENS)


def test_a_bulk_ends_when_the_fast_worker_and_what_the_slow_one_has_begun_do(client: Client) -> None:
    """The fast one needs two seconds. What the slow one takes ahead is four batches of it."""
    started = time.monotonic()
    for each in client.submit_many(job(number) for number in range(60)):
        assert each.result(PATIENCE_S).text
    assert time.monotonic() - started < 2.5 * SLOW_S


def test_an_urgent_job_does_not_wait_in_a_slow_worker_while_the_other_one_is_idle(
    client: Client, server: stack.Broker
) -> None:
    producer = Producer(server)
    # The slow one is given more than it can begin, less than it takes ahead; the fast one comes back to an empty queue.
    producer.app.control.cancel_consumer("idefics", destination=["fast@here"], reply=True)
    unimportant = [producer.complete(f"later {number}", TOKENS).apply_async(priority=9) for number in range(2 * SLOTS)]
    eventually(lambda: producer.queued() == 0)
    producer.app.control.add_consumer("idefics", destination=["fast@here"], reply=True)
    for number in range(6):
        started = time.monotonic()
        assert producer.complete(f"now {number}", TOKENS).apply_async(priority=0).get(PATIENCE_S)
        assert time.monotonic() - started < SLOW_S
    assert all(each.get(PATIENCE_S) for each in unimportant)
