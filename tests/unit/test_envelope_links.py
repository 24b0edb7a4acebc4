"""Links, chains and chords that a worker must not send are refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
from kombu import Exchange
from kombu.transport.virtual import Message

from tests.support.envelopes import CHANNEL, LINK, MOST, link, read, refusal, with_options
from tests.support.messages import raw_message
from worker.queue import envelope
from worker.queue.envelope import checked, opened


def canvas(kind: str, **kwargs: Any) -> dict[str, Any]:
    return link(task=f"celery.{kind}", subtask_type=kind, kwargs=kwargs)


LINKS: dict[str, Any] = {
    "a text": "shop.save",
    "a number": 7,
    "nothing": None,
    "no task": {"args": [], "kwargs": {}, "options": {}},
    "a task that is a list": link(task=["a"]),
    "arguments that are a text": link(args="abc"),
    "arguments that are missing": {"task": "a", "kwargs": {}, "options": {}},
    "options that are a list": link(options=[]),
    "more than a signature has": link(type="x"),
    "immutable by a text": link(immutable="yes"),
    **{
        f"celery.{name}": link(task=f"celery.{name}")
        for name in ("accumulate", "chord_unlock", "map", "starmap", "chunks", "group", "chain", "chord", "unknown")
    },
    "a map": link(task="celery.map", subtask_type="xmap", kwargs={"task": LINK, "it": [1]}),
    "chunks": link(task="celery.chunks", subtask_type="chunks", kwargs={"task": LINK, "it": [1], "n": 1}),
    "an unknown canvas": link(subtask_type="Signature"),
    "a canvas that is a list": link(subtask_type=["chain"]),
    "a chain of another name": link(subtask_type="chain", kwargs={"tasks": [LINK]}),
    "a chain without tasks": canvas("chain", tasks=[]),
    "a chain of a text": canvas("chain", tasks="abc"),
    "a chain of a built-in": canvas("chain", tasks=[link(task="celery.accumulate")]),
    "a group of a built-in": canvas("group", tasks=[LINK, link(task="celery.backend_cleanup")]),
    "a chord without a body": canvas("chord", header=[LINK], body=None),
    "a chord without a header": canvas("chord", body=LINK),
    "a chord with more": canvas("chord", header=[LINK], body=LINK, task_id="x"),
    "a chord whose body is a built-in": canvas("chord", header=[LINK], body=link(task="celery.accumulate")),
    "a chord whose header is": canvas("chord", header=canvas("group", tasks=[link(task="celery.map")]), body=LINK),
    "a link of a link": with_options(link=[with_options(link_error=[link(task="celery.chord_unlock")])]),
    "a link of a link that is a text": with_options(link="shop.save"),
    "a chord of a link": with_options(chord=link(task="celery.accumulate")),
    "a chain of a link": with_options(chain=[link(task="celery.accumulate")]),
    **{
        f"to {name!r}": with_options(queue=name)
        for name in (
            *(
                "unacked",
                "unacked_index",
                "unacked_mutex",
                "_kombu.binding.x",
                "idefics:callbacks:due",
                "idefics:key:x",
            ),
            *(
                "idefics.callbacks",
                "celery-task-meta-x",
                "celery-taskset-meta-x",
                "x.reply.celery.pidbox",
                "celeryev.x",
            ),
            *("idefics\x06\x163", "/0.celery.pidbox", "a b", "", "x" * 300),
        )
    },
    "to a queue that is a list": with_options(queue=["a"]),
    "by a routing key": with_options(routing_key="unacked_mutex"),
    "by an exchange": with_options(exchange="_kombu.binding.x"),
    "by our own exchange, whose bindings producers write": with_options(exchange="idefics", routing_key="idefics"),
    "over another connection": with_options(connection="redis://evil"),
    "by a producer": with_options(producer={}),
    "in pickle": with_options(serializer="pickle"),
    "compressed by a codec": with_options(compression="zstd"),
    "tried for ever": with_options(retry=True, retry_policy={"max_retries": 10**9}),
    "in the year 2099": with_options(eta="2099-01-01T00:00:00"),
    "in 32 days": with_options(countdown=32 * 86_400),
    "after no number": with_options(countdown=float("nan")),
    "with an expiry that is a text": with_options(expires="soon"),
    "with a priority that is a text": with_options(priority="1"),
    "with an id that is a list": with_options(task_id=[1]),
    "with headers that name another job": with_options(headers={"id": "another"}),
    "stamped with a queue": with_options(queue="a", stamped_headers=["queue"]),
    "stamped with an option": with_options(connection="x", stamped_headers=["connection"]),
    "stamped with nothing": with_options(stamped_headers=["mine"]),
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("place", ["callbacks", "errbacks", "chain", "chord"])
def test_a_link_that_the_worker_must_not_send_is_refused(name: str, place: str) -> None:
    if place == "chord" and LINKS[name] is None:
        return
    value = LINKS[name] if place == "chord" else [LINK, LINKS[name]]
    refused = refusal(raw_message(body=[[], {}, {place: value}]))
    assert refused.id == "job"
    assert str(refused).isprintable()


@pytest.mark.parametrize("place", ["callbacks", "errbacks", "chain"])
@pytest.mark.parametrize("value", ["x" * 3_000, {}, LINK, 7, True, "", 0])
def test_links_that_are_no_list_are_refused(place: str, value: Any) -> None:
    refusal(raw_message(body=[[], {}, {place: value}]))


def test_a_message_has_at_most_a_hundred_links() -> None:
    read(raw_message(body=[[], {}, {"callbacks": [LINK] * 60, "errbacks": [LINK] * 40}]))
    for many in ([LINK] * 101, [canvas("group", tasks=[LINK] * 100)], [with_options(link=[LINK] * 50)] * 2):
        assert "more than 100 links" in str(refusal(raw_message(body=[[], {}, {"callbacks": many}])))


def test_a_checked_job_costs_the_parent_little() -> None:
    raw = raw_message()
    message = Message(opened(raw, "idefics", MOST), channel=CHANNEL)
    took = min(_timed(lambda: checked(message, MOST)) for _ in range(50))
    assert took < 0.001


def _timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def test_names_that_celery_would_take_for_its_own_are_reserved() -> None:
    assert {"id", "chain", "callbacks", "_children", "is_eager", "called_directly"} <= envelope.RESERVED
    assert Exchange("x").name not in envelope.RESERVED
