"""Messages of real producers are read as they were sent."""

from __future__ import annotations

import bz2
import json
import time
import zlib
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest
from celery import chain, chord, group
from celery.canvas import Signature
from kombu import Producer
from kombu.utils.json import dumps

from tests.support.envelopes import LINK, PRODUCER, caption, of, read, stamped
from tests.support.messages import ARGUMENTS, JOB, raw_message

# Good ones


def test_a_job_comes_as_it_was_sent() -> None:
    job = read(raw_message({"shadow": "my caption", "x-trace": {"id": 7}}))
    assert job.headers == {**JOB, "shadow": "my caption", "x-trace": {"id": 7}}
    assert json.loads(job.body) == ARGUMENTS
    assert list(job.payload) == ARGUMENTS


@pytest.mark.parametrize("compression", ["gzip", "zlib", "bzip2"])
def test_a_compressed_job_is_inflated(compression: str) -> None:
    pack = bz2.compress if compression == "bzip2" else zlib.compress
    job = read(raw_message({"compression": compression}, pack(json.dumps(ARGUMENTS).encode())))
    assert list(job.payload) == ARGUMENTS
    assert "compression" not in job.headers


def test_a_body_need_not_be_base64() -> None:
    raw = json.dumps({**json.loads(raw_message()), "body": json.dumps(ARGUMENTS), "properties": {}}).encode()
    assert list(read(raw).payload) == ARGUMENTS


def test_values_to_which_kombu_gives_a_type_are_read() -> None:
    sent = {"metadata": {"id": UUID(int=1), "at": datetime(2026, 1, 1, tzinfo=UTC), "price": Decimal("1.5")}}
    assert read(raw_message(body=dumps([[], sent, {}]).encode())).payload[1] == sent


def test_a_message_of_the_first_protocol_becomes_one_of_the_second() -> None:
    body = {"task": "idefics.complete", "id": "old", "args": [], "kwargs": {"a": UUID(int=1)}, "taskset": "g"}
    body |= {"callbacks": [LINK], "eta": None, "utc": True, "retries": 2}
    job = read(raw_message([], dumps(body).encode()))
    assert job.headers == {"task": "idefics.complete", "id": "old", "group": "g", "retries": 2}
    assert job.payload[2] == {"callbacks": [LINK], "errbacks": None, "chord": None, "chain": None}
    assert job.body == dumps(job.payload).encode()


def test_tracing_headers_of_the_field_are_taken() -> None:
    # Sentry puts all headers into a header once more.
    inner = {"sentry-trace": "a-b-1", "baggage": "x=1", "idefics_submitted_at": 1.5}
    assert read(raw_message({"headers": inner, **inner, "x-datadog-trace-id": "1"})).headers["headers"] == inner


@pytest.mark.parametrize("name", ["eta", "expires"])
@pytest.mark.parametrize("protocol", [1, 2])
def test_a_moment_without_an_offset_is_utc_as_for_celerys_producers(name: str, protocol: int) -> None:
    naive = datetime.fromtimestamp(time.time() + 60, UTC).replace(tzinfo=None, microsecond=0).isoformat()
    body = {**JOB, "args": [], "kwargs": {}, name: naive}
    job = read(raw_message({name: naive}) if protocol == 2 else raw_message([], body))
    assert job.headers[name] == f"{naive}+00:00"


@pytest.mark.parametrize("written", ["2030-12-31T23:59:59+02:00", "2030-12-31T23:59:59Z"])
def test_a_moment_with_an_offset_stays_as_it_was_written(written: str) -> None:
    assert read(raw_message({"expires": written})).headers["expires"] == written


def test_what_celery_writes_over_anyway_is_left_out() -> None:
    assert read(raw_message({"hostname": "a", "delivery_info": {}, "chain": None})).headers == JOB


@pytest.mark.parametrize("id", ["x", "my job: 1/2", "a" * 256, "a" * 1_024])
def test_an_id_is_printable_ascii_of_up_to_1024_characters(id: str) -> None:
    assert read(raw_message({"id": id})).headers["id"] == id


# Canvases of a real producer


NOW = datetime.now(UTC)
CANVASES = {
    "plain": caption,
    "a link": lambda: caption().set(link=of("save")),
    "links": lambda: caption().set(link=[of("save"), of("tell", immutable=True)], link_error=[of("alarm")]),
    "a link with options": lambda: caption().set(
        link=of("save", queue="shop.high-priority", priority=3, countdown=5, expires=60, task_id="mine", retry=True)
    ),
    "a link with times": lambda: caption().set(link=of("save", eta=NOW, expires=NOW + timedelta(1), headers={"a": 1})),
    "a link that is a chain": lambda: caption().set(link=of("a") | of("b")),
    "a link that is a group": lambda: caption().set(link=group(of("a"), of("b"))),
    "a link that is a chord": lambda: caption().set(link=chord([of("a"), of("b")], of("c"))),
    "an error link that is a chain": lambda: caption().set(link_error=of("a") | of("b")),
    "a chain": lambda: caption() | of("a") | of("b"),
    "a chain of ours": lambda: caption() | caption() | of("a"),
    "a chain that ends in a group": lambda: caption() | group(of("a"), of("b")),
    "a chain that becomes a chord": lambda: caption() | group(of("a"), of("b")) | of("c"),
    "chains in chords in chains": lambda: chain(
        caption(),
        group(of("a") | group(of("b"), of("c")) | of("d"), of("e")),
        of("f"),
        group(of("g"), of("h")),
        of("i"),
    ),
    "a chord": lambda: chord([caption(), caption()], of("sum")),
    "a chord whose body is a chain": lambda: chord([caption(), caption()], of("sum") | of("save")),
    "a chord whose body is a group": lambda: chord([caption(), caption()], group(of("a"), of("b"))),
    "a chord of chains": lambda: chord([caption() | of("a"), caption() | of("b")], of("sum").on_error(of("alarm"))),
    "a group of groups": lambda: group(caption(), group(caption(), caption() | of("a"))),
    "a stamped one": stamped,
    "nested twenty deep": lambda: caption().set(link=_nested(20)),
}


def _nested(depth: int) -> Signature:
    return of("last") if depth == 0 else of(f"l{depth}", link=[_nested(depth - 1)])


def sent(signature: Signature) -> list[bytes]:
    """The raw messages of ours that a stock producer sends."""
    raws: list[bytes] = []

    def keep(self: Producer, body: Any, **options: Any) -> None:
        text = dumps(body).encode()
        properties = {name: options.get(name) for name in ("priority", "correlation_id", "reply_to")}
        if options["headers"]["task"].startswith("idefics."):
            raws.append(raw_message(json.loads(dumps(options["headers"])), text, properties))

    with patch.object(Producer, "publish", keep), patch.object(type(PRODUCER.backend), "apply_chord"):
        signature.apply_async()
    assert raws
    return raws


@pytest.mark.parametrize("name", CANVASES)
def test_the_canvases_of_celerys_guide_are_taken(name: str) -> None:
    for raw in sent(CANVASES[name]()):
        job = read(raw)
        # What the worker publishes again itself, a retry or a link, is taken too.
        assert read(raw_message(job.headers, job.body)).payload == job.payload
