"""The body of a callback, and who may believe it: against the library's own verifier and a known vector."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from standardwebhooks import Webhook

from tasks.errors import ConfigurationError, InvalidRequest
from tasks.payloads import Callback
from tasks.webhooks import (
    MAX_BODY_BYTES,
    Batch,
    Event,
    InvalidWebhook,
    Outcome,
    batch_body,
    body,
    check_public,
    shortened,
    verify,
)
from tests.support.receiver import NEW_SECRET, SECRET
from worker.delivery.sender import signed

MOMENT = "2026-01-02T03:04:05+00:00"


def data(**fields: Any) -> dict[str, Any]:
    result = {
        "text": "a cat",
        "finish_reason": "stop",
        "label": None,
        "scores": None,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "images": 1},
        "model": {"id": "m", "family": "fake", "dtype": "float32"},
        "timing": {"queued_s": 0, "fetch_s": 0, "wait_s": 0, "generate_s": 0},
    }
    whole = {"id": "job-1", "task": "idefics.caption", "result": result, "error": None, "metadata": {}, "truncated": []}
    return {**whole, **fields}


def headers(text: str, *secrets: str, id: str = "msg_1", age_s: float = 0) -> dict[str, str]:
    return signed(id, text, [SecretStr(secret) for secret in secrets], datetime.now(UTC) - timedelta(seconds=age_s))


# Signatures


def test_the_known_vector_is_signed_as_known() -> None:
    moment = datetime.fromtimestamp(1614265330, UTC)
    assert signed("msg_p5jXN8AQM9LWM0D4loKWxJek", '{"test": 2432232314}', [SecretStr(SECRET)], moment) == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_the_librarys_own_verifier_takes_what_we_sign() -> None:
    text = body("job.succeeded", MOMENT, data())
    assert Webhook(SECRET).verify(text, headers(text, SECRET)) == json.loads(text)


@pytest.mark.parametrize("secret", ["whsec_x", "", "abc", "whsec_", f"{SECRET}!", [], [SECRET, ""], "A" * 100])
def test_a_secret_that_is_none_is_a_mistake_of_the_receivers_set_up(secret: Any) -> None:
    text = body("job.succeeded", MOMENT, data())
    with pytest.raises(ConfigurationError, match="a secret is whsec_ and base64 of 24 to 64 bytes") as told:
        verify(secret, headers(text, SECRET), text)
    assert SECRET[6:] not in str(told.value)


def test_a_secret_may_lack_its_prefix_and_its_padding() -> None:
    text = body("job.succeeded", MOMENT, data())
    assert verify(SECRET.removeprefix("whsec_").rstrip("="), headers(text, SECRET), text)


def test_while_a_secret_rotates_both_verify() -> None:
    text = body("job.succeeded", MOMENT, data())
    both = headers(text, NEW_SECRET, SECRET)
    assert len(both["webhook-signature"].split(" ")) == 2
    assert verify(SECRET, both, text) == verify(NEW_SECRET, both, text)


def test_a_receiver_may_hold_several_secrets() -> None:
    text = body("job.succeeded", MOMENT, data())
    assert verify([NEW_SECRET, SECRET], headers(text, SECRET), text).data.id == "job-1"


def test_an_event_is_typed() -> None:
    text = body("job.succeeded", MOMENT, data(metadata={"row": 7}))
    event = verify(SECRET, {name.title(): value for name, value in headers(text, SECRET).items()}, text.encode())
    assert (event.id, event.type, event.timestamp) == ("msg_1", "job.succeeded", datetime.fromisoformat(MOMENT))
    assert isinstance(event.data, Outcome)
    assert event.data.result is not None
    assert (event.data.result.text, event.data.metadata) == ("a cat", {"row": 7})
    assert event.events == [event]


def test_what_a_newer_worker_adds_is_ignored() -> None:
    text = body("job.canceled", MOMENT, data(result=None, colour="blue"))
    assert verify(SECRET, headers(text, SECRET), text).data.result is None


@pytest.mark.parametrize("change", ["body", "id", "timestamp"])
def test_a_signed_body_cannot_be_changed(change: str) -> None:
    text = body("job.succeeded", MOMENT, data())
    given = headers(text, SECRET)
    if change == "body":
        text = text.replace("a cat", "a dog")
    elif change == "id":
        given["webhook-id"] = "msg_2"
    else:
        given["webhook-timestamp"] = str(int(given["webhook-timestamp"]) + 1)
    with pytest.raises(InvalidWebhook):
        verify(SECRET, given, text)


@pytest.mark.parametrize("age_s", [310, -310])
def test_what_was_signed_at_another_time_is_refused(age_s: float) -> None:
    text = body("job.succeeded", MOMENT, data())
    with pytest.raises(InvalidWebhook):
        verify(SECRET, headers(text, SECRET, age_s=age_s), text)


@pytest.mark.parametrize(
    "signature", ["", "nonsense", "v1", "v1,", "v1,!!!", "v2,abc", "v1,é", "v1,AAAA", " ".join(["v1,AAAA"] * 99), ",,"]
)
def test_a_malformed_signature_is_refused_as_a_wrong_one(signature: str) -> None:
    text = body("job.succeeded", MOMENT, data())
    with pytest.raises(InvalidWebhook):
        verify(SECRET, {**headers(text, SECRET), "webhook-signature": signature}, text)


def test_a_malformed_signature_beside_a_right_one_does_no_harm() -> None:
    text = body("job.succeeded", MOMENT, data())
    given = headers(text, SECRET)
    assert verify(SECRET, {**given, "webhook-signature": f"nonsense v1,!! {given['webhook-signature']}"}, text)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_missing_header_is_refused(name: str) -> None:
    text = body("job.succeeded", MOMENT, data())
    given = headers(text, SECRET)
    del given[name]
    with pytest.raises(InvalidWebhook):
        verify(SECRET, given, text)


@pytest.mark.parametrize("text", ["[]", "7", "{}", '{"type":"job.succeeded"}', "no json"])
def test_a_signed_body_that_is_no_event_is_refused(text: str) -> None:
    with pytest.raises(InvalidWebhook, match="not an event"):
        verify(SECRET, headers(text, SECRET), text)


def test_a_body_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidWebhook):
        verify(SECRET, headers("{}", SECRET), b"\xff\xfe")


# Size


@pytest.mark.parametrize(
    ("field", "cut"),
    [
        (
            {"result": data()["result"] | {"scores": {"label" * 30 + str(n): 0.001 for n in range(1000)}}},
            "result.scores",
        ),
        ({"result": data()["result"] | {"text": "word " * 20_000}}, "result.text"),
        ({"result": data()["result"] | {"text": "ü\x01😀" * 9_000}}, "result.text"),
        ({"result": None, "error": {"code": "invalid_request", "message": "no " * 30_000}}, "error.message"),
    ],
)
def test_what_is_too_large_is_cut_and_the_body_says_so(field: dict[str, Any], cut: str) -> None:
    text = body("job.succeeded", MOMENT, data(**field, metadata={"row": 7}))
    assert len(text.encode()) <= MAX_BODY_BYTES
    event = verify(SECRET, headers(text, SECRET), text)
    assert isinstance(event.data, Outcome)
    assert event.data.truncated == [cut]
    assert event.data.metadata == {"row": 7}
    assert "by the job's id" in json.loads(text)["data"]["note"]


def test_a_body_that_fits_says_nothing_of_cuts() -> None:
    assert "note" not in json.loads(body("job.succeeded", MOMENT, data()))["data"]


def test_a_body_with_any_content_fits() -> None:
    huge = {"text": "x" * 50_000, "scores": {str(n): 0.1 for n in range(9_000)}, "model": {"id": "m" * 50_000}}
    text = body("job.succeeded", MOMENT, data(result=huge, metadata={"a": "b" * 30_000}))
    assert len(text) <= MAX_BODY_BYTES
    found = json.loads(text)["data"]
    assert (found["result"], found["metadata"]) == (None, {})


def test_a_lone_surrogate_can_be_sent() -> None:
    text = body("job.succeeded", MOMENT, data(metadata={"odd": "\ud800"}))
    assert Webhook(SECRET).verify(text, headers(text, SECRET))["data"]["metadata"] == {"odd": "\ud800"}


def test_a_shortened_text_is_its_beginning() -> None:
    assert shortened("short") == "short"
    assert len(shortened("y" * 9_999)) == 3_998
    assert shortened("ü" * 9_999, 100) == "ü" * 16


# Batches


def test_a_batchs_events_are_those_of_its_members() -> None:
    members = [(f"msg_{n}", body("job.succeeded", MOMENT, data(id=f"job-{n}"))) for n in range(3)]
    text = batch_body(MOMENT, members)
    batch = verify(SECRET, headers(text, SECRET, id="msg_b"), text)
    assert batch.type == "job.batch"
    assert isinstance(batch.data, Batch)
    assert [(event.id, event.data.id) for event in batch.events] == [(f"msg_{n}", f"job-{n}") for n in range(3)]
    assert all(isinstance(event, Event) and event.type == "job.succeeded" for event in batch.events)


# What a client refuses


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://example.com:8443/",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://10.0.0.8/",
        "https://169.254.169.254/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[fec0::1]/",
        "https://localhost/",
        "https://api.localhost./",
    ],
)
def test_a_client_refuses_what_no_worker_calls_by_default(url: str) -> None:
    with pytest.raises(InvalidRequest, match="check_callbacks"):
        check_public(Callback(url=url, key_id="main"))


@pytest.mark.parametrize("url", ["https://example.com/hook?a=b", "https://example.com:443/", "https://93.184.216.34/"])
def test_a_client_sends_the_others(url: str) -> None:
    check_public(Callback(url=url, key_id="main"))
