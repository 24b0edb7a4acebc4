"""Which messages are jobs, and what the senders of the others are told. Real canvases come from a plain Celery app."""

from __future__ import annotations

import bz2
import json
import time
import tracemalloc
import zlib
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest
from celery import Celery, chain, chord, group
from celery.canvas import Signature
from kombu import Exchange, Producer
from kombu.transport.virtual import Message
from kombu.utils.json import dumps

from tests.support.messages import ARGUMENTS, JOB, raw_message
from worker.queue import envelope
from worker.queue.envelope import Envelope, MessageRefused, checked, opened, readable
from worker.queue.envelope.headers import HEADERS as KNOWN
from worker.queue.envelope.headers import OPTIONS

MOST = 3_000_000
#: Kombu asks it to decode bodies.
CHANNEL = SimpleNamespace(decode_body=lambda body, encoding: body)
LINK: dict[str, Any] = {
    "task": "shop.save",
    "args": [],
    "kwargs": {},
    "options": {},
    "subtask_type": None,
    "immutable": False,
}


def read(raw: bytes, most: int = MOST) -> Envelope:
    return checked(Message(opened(raw, "idefics", most), channel=CHANNEL), most)


def refusal(raw: bytes, most: int = MOST) -> MessageRefused:
    with pytest.raises(MessageRefused) as raised:
        read(raw, most)
    return raised.value


# --- Good ones ---


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


# --- Canvases of a real producer ---

PRODUCER = Celery("producer", broker="memory://", backend="cache+memory://", set_as_current=False)


def caption() -> Signature:
    return PRODUCER.signature("idefics.caption", kwargs={"image": "x"}, queue="idefics")


def of(name: str, **options: Any) -> Signature:
    return PRODUCER.signature(f"shop.{name}", **options)


def stamped() -> Signature:
    signature = caption().set(link=of("save"))
    signature.stamp(monitoring_id="7")
    return signature


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


# --- What is none ---

DEEP: Any = []
for _ in range(480):
    DEEP = [DEEP]

HEADERS: dict[str, dict[str, Any]] = {
    "a header nested 480 deep": {"x": DEEP},
    "a header of a megabyte": {"x": "a" * 1_000_000},
    "thousands of headers": {f"x{number}": 1 for number in range(3_000)},
    "retries that are a text": {"retries": "1"},
    "retries below none": {"retries": -1},
    "retries without end": {"retries": 10**30},
    "time limits that are texts": {"timelimit": ["1", "2"]},
    "one time limit": {"timelimit": [1]},
    "a time limit below none": {"timelimit": [-1, None]},
    "a time limit that is not a number": {"timelimit": [float("nan"), None]},
    "an eta that is none": {"eta": "soon"},
    "an eta that is a number": {"eta": 7},
    "an eta in the year 2099": {"eta": "2099-01-01T00:00:00+00:00"},
    "an eta in 32 days": {"eta": datetime.fromtimestamp(time.time() + 32 * 86_400, UTC).isoformat()},
    "an eta at the end of time": {"eta": "9999-12-31T23:59:59-23:59"},
    "an eta with a typed value": {"eta": {"__type__": "datetime", "__value__": "never"}},
    "an expiry that is none": {"expires": {"a": 1}},
    "an expiry at the end of time": {"expires": "9999-12-31T23:59:59-23:59"},
    "a group that is a number": {"group": 7},
    "a group that is a list": {"group": ["a"]},
    "a group with a newline": {"group": "a\nb"},
    "a group index that is a text": {"group_index": "1"},
    "a root that is a list": {"root_id": [1]},
    "a parent that is an object": {"parent_id": {}},
    "a shadow with an escape": {"shadow": "\x1b[2J"},
    "a shadow that turns the line": {"shadow": "a\u202eb"},
    "a task with a newline": {"task": "idefics.complete\nTask"},
    "a task that is a list": {"task": ["idefics.complete"]},
    "no task": {"task": None},
    "a time of submission that is a text": {"idefics_submitted_at": "now"},
    "a time of submission that is none": {"idefics_submitted_at": float("inf")},
    "stamps that are a text": {"stamps": "a", "stamped_headers": ["a"]},
    "stamped headers that are a text": {"stamped_headers": "a"},
    "a stamp without a value": {"stamps": {}, "stamped_headers": ["a"]},
    "a stamp that names a queue": {"stamps": {"queue": "unacked_mutex"}, "stamped_headers": ["queue"]},
    "a stamp that names a link": {"stamps": {"link": "x"}, "stamped_headers": ["link"]},
    "a chord in a header": {"chord": {"task": "celery.accumulate"}},
    "a chain in a header": {"chain": [LINK]},
    "callbacks in a header": {"callbacks": [LINK]},
    "children in a header": {"_children": [1]},
    "a method in a header": {"as_execution_options": 7},
    "an inner header that names another job": {"headers": {"id": "another"}},
    "inner headers that are a list": {"headers": [1]},
    "a header with half a character": {"x\ud800": 1},
    "an unknown compression": {"compression": "xz"},
    "a compression that is a list": {"compression": ["gzip"]},
    "a compression that it has not": {"compression": "gzip"},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_another_form_than_celerys_is_refused(name: str) -> None:
    refused = refusal(raw_message(HEADERS[name]))
    assert refused.id == "job"
    assert str(refused).isprintable()
    assert len(str(refused)) < 200


MESSAGES: dict[str, tuple[bytes, str]] = {
    "pickle": (raw_message(**{"content-type": "application/x-python-serialize"}), "set task_serializer='json'"),
    "yaml": (raw_message(**{"content-type": "application/x-yaml"}), "set task_serializer='json'"),
    "JSON of another kind": (raw_message(**{"content-type": "application/json; v=1"}), "set task_serializer='json'"),
    "no content type": (raw_message(**{"content-type": None}), "set task_serializer='json'"),
    "a codec that inflates": (raw_message(**{"content-encoding": "zlib_codec"}), "send utf-8"),
    "an encoding that is a list": (raw_message(**{"content-encoding": ["utf-8"]}), "send utf-8"),
    "an encoding of the body that is none": (
        raw_message(properties={"body_encoding": "rot13"}),
        "in base64 with",
    ),
    "a body that is no base64": (
        json.dumps({**json.loads(raw_message()), "body": "abcde"}).encode(),
        "in base64 with",
    ),
    "a body that is no JSON": (raw_message(body=b"{"), "send JSON"),
    "a body that is no text": (raw_message(body=b"\xff"), "send JSON"),
    "a body in UTF-16": (raw_message(body=json.dumps(ARGUMENTS).encode("utf-16")), "send JSON"),
    "no body": (raw_message(body=b""), "send JSON"),
    "a body that is nested beyond all measure": (raw_message(body=b"[" * 9_000 + b"]" * 9_000), "send"),
    "a body that is nested": (raw_message(body=[[], {"metadata": DEEP}, {}]), "send less"),
    "a number of thousands of digits": (raw_message(body=b"[[], {}, " + b"9" * 9_000 + b"]"), "send JSON"),
    "a million values": (raw_message(body=[[], {"prompt": [0] * 600_000}, {}]), "send fewer"),
    "a hundred thousand values": (raw_message(body=[[], {"prompt": [0] * 110_000}, {}]), "send less"),
    "a bad typed value": (
        raw_message(body=[[], {"a": {"__type__": "decimal", "__value__": "abc"}}, {}]),
        "plain JSON",
    ),
    "an unknown type": (raw_message(body=[[], {"a": {"__type__": "os", "__value__": 1}}, {}]), "plain JSON"),
    "a number that has a billion digits": (
        raw_message(body=[[], {"seed": {"__type__": "decimal", "__value__": "1e999999999"}}, {}]),
        "plain JSON",
    ),
    "keyword arguments alone": (raw_message(body=ARGUMENTS[1]), "[args, kwargs, links]"),
    "an empty object": (raw_message(body={}), "[args, kwargs, links]"),
    "two parts": (raw_message(body=[[], {}]), "keyword arguments"),
    "no arguments": (raw_message(body=[None, None, None]), "keyword arguments"),
    "arguments that are an object": (raw_message(body=[{}, {}, {}]), "keyword arguments"),
    "keyword arguments that are a list": (raw_message(body=[[], [], {}]), "keyword arguments"),
    "an embed that is none": (raw_message(body=[[], {}, 7]), "keyword arguments"),
    "an embed that goes over the headers": (raw_message(body=[[], {}, {"delivery_info": 7}]), "keyword arguments"),
    "a priority without end": (raw_message(properties={"priority": float("inf")}), "property priority"),
    "a priority that is a text": (raw_message(properties={"priority": "1"}), "property priority"),
    "a reply to a number": (raw_message(properties={"reply_to": 7}), "property reply_to"),
    "properties nested 480 deep": (raw_message(properties={"x": DEEP}), "properties"),
    "a body that is a number": (
        json.dumps({**json.loads(raw_message()), "body": 2**62}).encode(),
        "in base64 with",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_that_is_no_job_is_refused_with_the_cure(name: str) -> None:
    raw, cure = MESSAGES[name]
    refused = refusal(raw)
    assert refused.id == "job"
    assert cure in str(refused)


@pytest.mark.parametrize("name", KNOWN)
def test_a_refused_header_is_told_what_it_must_be(name: str) -> None:
    assert str(refusal(raw_message({name: [None]}))) == f"The header {name} must be {KNOWN[name].words}."


@pytest.mark.parametrize(
    ("headers", "cure"),
    [
        ({"idefics_submitted_at": 1_800_000_000_000}, "unix seconds, a number: not milliseconds"),
        ({"idefics_submitted_at": "2026-01-01T00:00:00+00:00"}, "unix seconds, a number"),
        ({"expires": "tomorrow"}, "ISO 8601 in UTC or with an offset"),
        ({"expires": 1_800_000_000}, "ISO 8601 in UTC or with an offset"),
        ({"eta": 1_800_000_000}, "ISO 8601 in UTC or with an offset"),
        ({"timelimit": 60}, "[hard, soft], each a number of seconds or null"),
        ({"id": 7}, "a text of printable ASCII, 1 to 1,024 characters long"),
    ],
)
def test_a_producer_without_celery_is_told_what_a_header_must_be(headers: dict[str, Any], cure: str) -> None:
    assert cure in str(refusal(raw_message(headers)))


@pytest.mark.parametrize("name", ["priority", "reply_to", "correlation_id"])
def test_a_refused_property_is_told_what_it_must_be(name: str) -> None:
    assert f"The property {name} must be a" in str(refusal(raw_message(properties={name: [None]})))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_links_refused_option_is_told_what_it_must_be(name: str) -> None:
    refused = refusal(raw_message(body=[[], {}, {"callbacks": [with_options(**{name: [None]})]}]))
    assert str(refused) == f"A link's option {name} must be {OPTIONS[name].words}."


# What can be read of a message that is refused


def message(headers: dict[str, Any] | None = None, body: Any = ARGUMENTS, **outer: Any) -> Message:
    return Message(opened(raw_message(headers, body, **outer), "idefics", MOST), channel=CHANNEL)


CALLED = {"callback": {"url": "https://example.com/", "key_id": "main"}, "metadata": {"row": 7}}


@pytest.mark.parametrize("headers", [{}, {"expires": "tomorrow"}, {"shadow": 7}])
@pytest.mark.parametrize("body", [[[], CALLED, {}], [[], CALLED, {"callbacks": 7}], [["x"], CALLED, {}]])
def test_task_and_arguments_of_a_refused_message_are_read(headers: dict[str, Any], body: Any) -> None:
    assert readable(message(headers, body), MOST) == ("idefics.complete", CALLED)


def test_task_and_arguments_of_a_refused_message_of_the_first_protocol_are_read() -> None:
    body = {"task": "idefics.caption", "id": "old", "kwargs": CALLED, "args": None}
    assert readable(message([], body), MOST) == ("idefics.caption", CALLED)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("headers", "body", "outer"),
    [
        ({"task": "a\x1b"}, [[], {"image": "x"}, {}], {}),
        ({"task": None}, b'"callback"', {}),
        ({"task": 7}, b'{"callback": ' * 9_000, {}),
        ({"task": ["a"]}, [[], [CALLED], {}], {}),
        ({"task": {}}, [[], CALLED, {}], {"content-type": "application/x-python-serialize"}),
        ({"task": "a\n"}, [[], {**CALLED, "prompt": ["x" * MOST]}, {}], {}),
    ],
)
def test_what_cannot_be_read_of_a_refused_message_is_left(headers: dict[str, Any], body: Any, outer: Any) -> None:
    assert readable(message(headers, body, **outer), MOST) == ("unknown", {})


def test_pickle_is_named() -> None:
    assert str(refusal(MESSAGES["pickle"][0])) == (
        "pickle is not accepted: send application/json; in Celery set task_serializer='json'."
    )


@pytest.mark.parametrize(
    "body",
    [
        {"task": "idefics.complete", "id": "old", "args": None, "kwargs": {}},
        {"task": "idefics.complete", "id": "old", "args": [], "kwargs": None},
        {"task": "idefics.complete", "id": "old", "args": [], "kwargs": {}, "eta": "soon"},
        {"task": "idefics.complete", "id": "old", "args": [], "kwargs": {}, "callbacks": "a text"},
        {"task": ["idefics.complete"], "id": "old", "args": [], "kwargs": {}},
        {"task": "x", "id": "old", "args": [], "kwargs": {"a": {"__type__": "decimal", "__value__": "abc"}}},
        {"id": "old"},
    ],
)
def test_a_refusal_knows_the_id_in_a_body_of_the_first_protocol(body: dict[str, Any]) -> None:
    assert refusal(raw_message([], body)).id == "old"


@pytest.mark.parametrize("id", ["\u00e4" * 300, "tab\there", "\x1b[2J"])
def test_an_id_that_a_job_may_not_have_is_told_so_all_the_same(id: str) -> None:
    assert refusal(raw_message({"id": id})).id == id


@pytest.mark.parametrize("id", [None, "", 7, ["a"], "a" * 1_025, "\ud800"])
def test_under_an_id_that_is_none_nothing_is_stored(id: Any) -> None:
    assert refusal(raw_message({"id": id})).id is None


@pytest.mark.parametrize("raw", [b"", b"garbage", b"[]", b"7", b"{}", b'{"body": "a', b"\xff", b"[" * 5_000])
def test_what_is_no_envelope_is_refused(raw: bytes) -> None:
    assert refusal(raw).id is None


def test_a_bomb_is_not_inflated() -> None:
    raw = raw_message({"compression": "bzip2"}, bz2.compress(bytes(2**26)))
    tracemalloc.start()
    try:
        assert "bytes and this worker takes" in str(refusal(raw))
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


# --- Links ---


def link(**changes: Any) -> dict[str, Any]:
    return {**LINK, **changes}


def with_options(**options: Any) -> dict[str, Any]:
    return link(options=options)


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
