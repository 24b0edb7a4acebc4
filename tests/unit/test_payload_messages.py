"""What the messages of refused payloads say, and what they keep to themselves."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tasks.errors import IdeficsError, ImageBlocked, InvalidRequest, JobError
from tasks.payload_fields import ImagePath
from tasks.payloads import Callback, Caption, CaptionExample, Chat, Complete, parse
from tests.support.payloads import LEAST, URL, refusal

SECRET = "s3cr3t"
SIGNED = f"https://user:{SECRET}@example.com/a.jpg?X-Amz-Signature={SECRET}"


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("idefics.caption", {"image": f"https://exam ple.com/{SECRET}"}),
        ("idefics.caption", {"image": f"file://{SECRET}"}),
        ("idefics.caption", {"image": {"path": SECRET, "url": SIGNED}}),
        ("idefics.caption", {"image": [SIGNED]}),
        ("idefics.caption", {"image": SIGNED, "prompt": f"<image>{SECRET}"}),
        ("idefics.caption", {"image": SIGNED, "num_beams": SECRET}),
        ("idefics.caption", {"image": SIGNED, "stop": SECRET}),
        ("idefics.caption", {"image": SIGNED, "metadata": SECRET}),
        ("idefics.caption", {"image": SIGNED, "callback": {"url": f"ftp://{SECRET}", "key_id": "k"}}),
        ("idefics.caption", {"image": SIGNED, "callback": {"url": URL, "key_id": "k", "events": [SECRET]}}),
        ("idefics.classify", {"labels": [SECRET, SECRET]}),
        ("idefics.classify", {"labels": SECRET}),
        ("idefics.complete", {"prompt": [SIGNED, {"image": SECRET}]}),
        ("idefics.complete", {"prompt": SIGNED}),
        ("idefics.chat", {"messages": [{"role": SECRET, "content": SECRET}]}),
        ("idefics.chat", {"messages": [{"role": "user", "content": [{"type": SECRET, "text": SECRET}]}]}),
        ("idefics.chat", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": [SIGNED]}]}]}),
        ("idefics.chat", {"messages": SIGNED}),
    ],
)
def test_no_message_repeats_a_value(task: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(JobError) as refused:
        parse(task, {**LEAST[task], **arguments})
    assert SECRET not in str(refused.value)
    assert SECRET not in repr(refused.value)


def test_a_payload_built_wrongly_in_python_keeps_its_secrets_too() -> None:
    with pytest.raises(ValidationError) as refused:
        Caption(image=SIGNED, num_beams=SECRET)  # type: ignore[arg-type]
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("task", "arguments", "told"),
    [
        ("idefics.complete", {"prompt": [{"image": 5}]}, "prompt.0.image: an image is"),
        ("idefics.complete", {"prompt": [{"text": 5}]}, "prompt.0.text: "),
        ("idefics.complete", {"prompt": [5]}, "prompt.0: a part is"),
        ("idefics.caption", {"image": {"path": ""}}, "image.path: "),
        ("idefics.write", {"images": [URL, {"path": 5}]}, "images.1.path: "),
    ],
)
def test_an_error_in_a_part_is_one_place_and_one_reason(task: str, arguments: dict[str, Any], told: str) -> None:
    message = refusal(task, **arguments)
    assert message.startswith(told)
    assert ";" not in message.replace("...;base64", "")


def test_a_chat_has_one_length() -> None:
    assert "not both" in refusal("idefics.chat", max_new_tokens=1, max_completion_tokens=1)


class _Body(BaseModel):
    """A web framework's request."""

    job: Caption | Complete | Chat
    count: int = 1


@pytest.mark.parametrize(
    "job",
    [
        {"image": "file:///etc/passwd"},
        {"image": URL, "examples": [{"image": "ftp://a/b", "text": "a"}]},
        {"prompt": [{"image": "file:///etc/passwd"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "gopher://x"}}]}]},
        {"image": URL, "colour": 1},
    ],
)
def test_in_a_web_frameworks_body_every_error_is_a_validation_error(job: Any) -> None:
    with pytest.raises(ValidationError):
        _Body.model_validate({"job": job})
    with pytest.raises(ValidationError):
        Caption.model_validate({"image": "file:///etc/passwd"})


def test_a_payload_built_wrongly_raises_our_error_and_pydantics_at_once() -> None:
    for fields, kind in [
        ({"image": "file:///etc/passwd", "colour": 1}, ImageBlocked),
        ({"image": URL, "num_beams": "{x}"}, InvalidRequest),
        ({}, InvalidRequest),
    ]:
        with pytest.raises(kind) as refused:
            Caption(**fields)  # type: ignore[arg-type]
        assert isinstance(refused.value, ValidationError)
        assert isinstance(refused.value, IdeficsError)
        assert isinstance(refused.value, ValueError)
        assert type(refused.value).__name__ == kind.__name__
        with pytest.raises(kind) as parsed:
            parse("idefics.caption", fields)
        assert refused.value.args == parsed.value.args
        assert refused.value.detail == parsed.value.detail
        again = pickle.loads(pickle.dumps(refused.value))
        assert (type(again), again.args) == (kind, parsed.value.args)


def test_a_payload_built_wrongly_still_tells_each_place() -> None:
    with pytest.raises(ValidationError) as refused:
        Caption(image=URL, num_beams=0, colour="red")  # type: ignore[call-arg]
    assert {fault["loc"] for fault in refused.value.errors()} == {("num_beams",), ("colour",)}
    assert refused.value.error_count() == 2


def test_every_part_of_a_payload_built_wrongly_raises_our_error() -> None:
    for build in (
        lambda: Callback(url="x", key_id="k"),
        lambda: ImagePath(path=""),
        lambda: CaptionExample(image="file:///x", text="a"),
    ):
        with pytest.raises(IdeficsError):
            build()
