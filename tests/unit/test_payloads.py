"""Payloads of the six tasks: defaults, bounds, round trips."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tasks.chat_messages import ChatMessage
from tasks.errors import InvalidRequest
from tasks.payload_fields import ImagePath
from tasks.payloads import (
    PAYLOADS,
    Answer,
    AnswerExample,
    Callback,
    Caption,
    CaptionExample,
    Chat,
    Classify,
    ClassifyExample,
    Complete,
    Job,
    Write,
    parse,
)
from tasks.protocol import MAX_METADATA_BYTES, MAX_TEXT_CHARS
from tasks.results import ModelInfo, Result, Timing, Usage
from tests.support.payloads import LEAST, URL, refusal

# Defaults


#: A job of each kind with all that is its own.
FULL: list[Job] = [
    Caption(
        image=ImagePath(path="a/b.jpg"),
        prompt="A photo of",
        examples=[CaptionExample(image=URL, text="A dog")],
        instruction="Say what it is.",
        max_new_tokens=5,
        temperature=0.7,
        top_p=0.9,
        seed=3,
        stop=["\n"],
        deadline_s=30,
        callback=Callback(url="https://example.com/hook", key_id="k", events=["job.failed"]),
        metadata={"row": 7, "tags": ["a", None]},
        idempotency_key="row-7",
    ),
    Answer(image=URL, question="What?", examples=[AnswerExample(image=URL, question="Who?", answer="Me")]),
    Classify(image=URL, labels=["food", "animal"], examples=[ClassifyExample(image=URL, label="food")], num_beams=1),
    Write(images=[URL, ImagePath(path="c.png")], instruction="Write an advert.", lead="Advert:", num_beams=4),
    parse("idefics.complete", {"prompt": ["User:", URL, {"text": URL}, {"image": {"path": "d.png"}}]}),
    parse(
        "idefics.chat",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Who?"},
                        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
                    ],
                },
            ]
        },
    ),
]
RESULT = Result(
    text="food",
    finish_reason="stop",
    label="food",
    scores={"food": 0.93, "animal": 0.07},
    usage=Usage(prompt_tokens=31, completion_tokens=8, images=1, cached_images=1),
    model=ModelInfo(id="demo", revision="abc", family="idefics", dtype="float32", quantization="4bit"),
    timing=Timing(queued_s=0.01, fetch_s=0.08, wait_s=0.02, generate_s=0.4),
    metadata={"row": 7},
)


def test_the_six_tasks_have_the_contracts_names() -> None:
    assert set(PAYLOADS) == set(LEAST)


@pytest.mark.parametrize("task", LEAST)
def test_a_task_takes_the_least_and_sends_no_defaults(task: str) -> None:
    job = parse(task, LEAST[task])
    assert type(job) is PAYLOADS[task]
    assert set(job.arguments()) == set(LEAST[task])


@pytest.mark.parametrize("task", LEAST)
def test_the_common_fields_have_the_contracts_defaults(task: str) -> None:
    job = parse(task, LEAST[task])
    assert job.model_dump(include=set(Job.model_fields)) == {
        "max_new_tokens": None,
        "num_beams": 1,
        "temperature": 0.0,
        "top_p": None,
        "top_k": None,
        "min_p": None,
        "repetition_penalty": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "n": 1,
        "logprobs": None,
        "seed": None,
        "stop": [],
        "deadline_s": None,
        "min_confidence": None,
        "stream": False,
        "callback": None,
        "metadata": {},
        "idempotency_key": None,
    }


def test_the_tasks_own_fields_have_the_contracts_defaults() -> None:
    caption, write = Caption(image=URL), Write(images=[URL])
    assert (caption.prompt, caption.examples, caption.instruction) == (None, [], "Describe this image.")
    assert (write.instruction, write.lead) == ("Use the image to write a story.", "Story:")
    assert Answer(image=URL, question="?").examples == []
    assert Classify(image=URL, labels=["a", "b"]).examples == []


# Refusals


def test_a_task_that_does_not_exist_is_refused_with_the_names_of_those_that_do() -> None:
    with pytest.raises(InvalidRequest, match=r"idefics\.captoin.*idefics\.caption"):
        parse("idefics.captoin", {"image": URL})


@pytest.mark.parametrize("task", LEAST)
def test_an_unknown_field_is_refused_by_its_name(task: str) -> None:
    assert "temprature" in refusal(task, temprature=1)


@pytest.mark.parametrize("task", LEAST)
def test_a_missing_field_is_refused_by_its_name(task: str) -> None:
    for name in LEAST[task]:
        with pytest.raises(InvalidRequest, match=name):
            parse(task, {key: value for key, value in LEAST[task].items() if key != name})


def test_every_wrong_field_is_named_at_once() -> None:
    message = refusal("idefics.caption", num_beams=0, top_p=2, seed=-1)
    assert all(name in message for name in ("num_beams", "top_p", "seed"))


def test_unknown_fields_are_refused_inside_a_payload_too() -> None:
    assert "caption" in refusal("idefics.caption", examples=[{"image": URL, "text": "a", "caption": "a"}])
    refusal("idefics.caption", callback={"url": URL, "key_id": "k", "secret": "whsec_a"})
    refusal("idefics.complete", prompt=[{"image": URL, "text": "A"}])
    refusal("idefics.caption", image={"path": "a.jpg", "root": "/"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("num_beams", 0),
        ("num_beams", 17),
        ("temperature", -0.1),
        ("temperature", 10.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {"5": 100.5}),
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"cat": 1}),
        ("n", 0),
        ("n", 17),
        ("logprobs", -1),
        ("logprobs", 21),
        ("top_k", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", [""]),
        ("stop", ["a" * 201]),
        ("stop", ["a"] * 17),
        ("stop", "a"),
        ("min_confidence", 1.1),
        ("min_confidence", float("nan")),
        ("deadline_s", 0),
        ("deadline_s", -1),
        ("idempotency_key", ""),
        ("idempotency_key", "k" * 256),
        ("callback", {"url": "ftp://example.com", "key_id": "k"}),
        ("callback", {"url": "https://user@example.com", "key_id": "k"}),
        ("callback", {"url": "https://example.com\\@inside", "key_id": "k"}),
        ("callback", {"url": "https://example.com:0", "key_id": "k"}),
        ("callback", {"url": "https://example.com:99999", "key_id": "k"}),
        ("callback", {"url": "https://", "key_id": "k"}),
        ("callback", {"url": "https://example.com", "key_id": ""}),
        ("callback", {"url": "https://example.com", "key_id": "k", "events": ["job.started"]}),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_fields_name(name: str, value: Any) -> None:
    assert name in refusal("idefics.caption", **{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 1, "num_beams": 16},
        {"temperature": 10, "top_p": 1, "top_k": 0, "seed": 2**63 - 1},
        {"stop": ["a" * 200] * 16},
        {"min_confidence": 0},
        {"min_confidence": 1},
        {"deadline_s": 0.001, "idempotency_key": "k" * 255},
    ],
)
def test_values_on_the_bounds_are_taken(fields: dict[str, Any]) -> None:
    assert parse("idefics.caption", {"image": URL, **fields})


def test_several_answers_need_a_way_to_differ() -> None:
    assert "temperature" in refusal("idefics.caption", n=2)
    assert "temperature" in refusal("idefics.caption", n=3, num_beams=2)
    for asked in ({"temperature": 0.5}, {"num_beams": 2}):
        assert parse("idefics.caption", {"image": URL, "n": 2, **asked}).n == 2


def test_labels_have_one_answer_and_no_tokens() -> None:
    for asked in ({"n": 2, "temperature": 1}, {"logprobs": 0}):
        assert "scores" in refusal("idefics.classify", **asked)


def test_a_bias_goes_by_token_ids_as_json_writes_them() -> None:
    job = Caption(image=URL, logit_bias={7: -100})
    assert job.arguments()["logit_bias"] == {"7": -100.0}
    assert parse(job.task, job.arguments()) == job


def test_beams_and_temperature_do_not_go_together() -> None:
    assert "num_beams" in refusal("idefics.caption", num_beams=2, temperature=0.5)


@pytest.mark.parametrize("labels", [[], ["one"], [str(n) for n in range(1001)]])
def test_labels_are_two_to_a_thousand(labels: list[str]) -> None:
    assert "labels" in refusal("idefics.classify", labels=labels)


def test_labels_stay_as_they_were_sent_and_are_spoken_without_outer_blanks() -> None:
    job = Classify(image=URL, labels=[" food", "animal "])
    assert job.labels == [" food", "animal "]
    assert job.spoken_labels == ["food", "animal"]


@pytest.mark.parametrize(("sent", "read"), [("a\r\nb", "a\nb"), ("a\rb", "a\nb"), ("a\x00b\tc\x85", "ab\tc")])
def test_line_ends_are_newlines_and_other_control_characters_are_left_out(sent: str, read: str) -> None:
    assert Caption(image=URL, prompt=sent).prompt == read


def test_a_thousand_labels_are_taken() -> None:
    assert len(parse("idefics.classify", {"image": URL, "labels": [str(n) for n in range(1000)]}).labels) == 1000  # type: ignore[attr-defined]


@pytest.mark.parametrize("labels", [["a", "a"], ["a", " a "], ["a", "  "], ["a", "b\nc"], ["a", "b" * 201]])
def test_labels_are_distinct_and_fit_on_a_line(labels: list[str]) -> None:
    assert "labels" in refusal("idefics.classify", labels=labels)


def test_metadata_has_a_limit_in_bytes() -> None:
    room = MAX_METADATA_BYTES - len(json.dumps({"a": ""}))
    assert parse("idefics.caption", {"image": URL, "metadata": {"a": "x" * room}})
    assert "metadata" in refusal("idefics.caption", metadata={"a": "x" * (room + 1)})


def test_metadata_that_json_cannot_say_is_refused() -> None:
    assert "metadata" in refusal("idefics.caption", metadata={"a": object()})


def test_a_text_has_a_limit() -> None:
    assert "question" in refusal("idefics.answer", question="a" * (MAX_TEXT_CHARS + 1))


def test_a_task_that_shows_images_needs_one() -> None:
    assert "images" in refusal("idefics.write", images=[])
    assert "prompt" in refusal("idefics.complete", prompt=[])
    assert "messages" in refusal("idefics.chat", messages=[])


@pytest.mark.parametrize("role", ["assistant", "system"])
def test_a_conversations_last_message_is_the_users(role: str) -> None:
    assert "user" in refusal("idefics.chat", messages=[{"role": role, "content": "Hello"}])


# Round trips


@pytest.mark.parametrize("job", FULL, ids=lambda job: job.task)
def test_a_job_comes_out_of_the_queue_as_it_went_in(job: Job) -> None:
    assert parse(job.task, json.loads(json.dumps(job.arguments()))) == job


@pytest.mark.parametrize("job", FULL, ids=lambda job: job.task)
def test_no_argument_is_a_default(job: Job) -> None:
    for name, value in job.arguments().items():
        assert value != type(job).model_fields[name].default


def test_a_result_comes_back_from_json_as_it_was() -> None:
    assert Result.model_validate_json(RESULT.model_dump_json()) == RESULT
    assert Result.model_validate(json.loads(json.dumps(RESULT.model_dump(mode="json")))) == RESULT


def test_a_result_has_the_contracts_form() -> None:
    form = RESULT.model_dump(mode="json")
    assert list(form) == [
        "text",
        "finish_reason",
        "label",
        "scores",
        "usage",
        "model",
        "timing",
        "generation",
        "metadata",
    ]
    assert list(form["usage"]) == ["prompt_tokens", "completion_tokens", "images", "cached_images"]
    assert list(form["model"]) == ["id", "revision", "family", "dtype", "quantization"]
    assert list(form["timing"]) == ["queued_s", "fetch_s", "wait_s", "generate_s"]


def test_an_older_client_reads_a_newer_result() -> None:
    newer = RESULT.model_dump(mode="json") | {"reasoning": "none"}
    newer["usage"] |= {"kept_tokens": 3}
    newer["model"] |= {"engine": "stock"}
    newer["timing"] |= {"decode_s": 0.1}
    assert Result.model_validate(newer) == RESULT


@pytest.mark.parametrize(
    "thing",
    [
        *FULL,
        RESULT,
        RESULT.usage,
        RESULT.model,
        RESULT.timing,
        ImagePath(path="a"),
        Callback(url=URL, key_id="k"),
        CaptionExample(image=URL, text="a"),
        ChatMessage(role="user", content="a"),
        Complete(prompt=["a"]).prompt[0],  # type: ignore[list-item]
        Chat(messages=[ChatMessage(role="user", content="a")]).messages[0],
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_everything_is_frozen(thing: BaseModel) -> None:
    for name in type(thing).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, getattr(thing, name))
