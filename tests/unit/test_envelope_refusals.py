"""Messages that are no jobs are refused with the cure."""

from __future__ import annotations

import bz2
import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.envelopes import LINK, MOST, message, refusal, with_options
from tests.support.memory import peak_memory
from tests.support.messages import ARGUMENTS, raw_message
from worker.queue.envelope import readable
from worker.queue.envelope.headers import HEADERS as KNOWN
from worker.queue.envelope.headers import OPTIONS

# What is none


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

    def refuse() -> None:
        assert "bytes and this worker takes" in str(refusal(raw))

    assert peak_memory(refuse, expected_below=20 * 2**20) < 20 * 2**20
