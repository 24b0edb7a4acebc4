"""The form that an answer may be asked to have: what producers may write, and what is refused at once."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

from tasks import Answer, Caption, Complete, Write
from tasks.batch_lines import read_line
from tasks.campaign.outcome_columns import field_of
from tasks.campaign.plan import Plan
from tasks.errors import InvalidRequest
from tasks.idempotency import digest
from tasks.payloads import parse
from tasks.testing import FakeClient

URL = "https://example.com/a.png"
ASKED = {"image": URL, "question": "What is it?"}
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMATS: list[dict[str, Any]] = [
    {"type": "json_schema", "json_schema": {"name": "product", "schema": OBJECT, "strict": True}},
    {"type": "json_object"},
    {"type": "regex", "regex": "[a-z]+"},
    {"type": "choice", "choice": ["yes", "no"]},
    {"type": "grammar", "grammar": 'start: "a"'},
]


class Part(BaseModel):
    kind: Literal["wheel", "seat"]


class Product(BaseModel):
    name: str
    parts: list[Part] = []


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form["type"])
def test_a_format_arrives_as_it_was_sent(form: dict[str, Any]) -> None:
    job = parse("idefics.answer", {**ASKED, "response_format": form})
    sent = json.loads(json.dumps(job.arguments()))
    assert sent["response_format"] == form
    assert parse("idefics.answer", sent) == job


@pytest.mark.parametrize("form", [None, {"type": "text"}])
def test_text_is_no_form(form: Any) -> None:
    plain = parse("idefics.answer", ASKED)
    assert parse("idefics.answer", {**ASKED, "response_format": form}) == plain
    assert "response_format" not in plain.arguments()


def test_jobs_in_different_forms_are_different_jobs() -> None:
    jobs = [parse("idefics.answer", {**ASKED, "response_format": form}) for form in [None, *FORMATS]]
    assert len({digest(job) for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"type": "xml"}, "response_format: type is one of"),
        ("json", "response_format: type is one of"),
        ({"type": "json_schema"}, "response_format.json_schema: Field required"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1/a"}}}, "leads out of the schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"items": [{"$ref": "file:///a"}]}}}, "leads out of"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 1_000_000]}}}, "at most 65,536"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}}, "cannot represent"),
        ({"type": "regex", "regex": "a" * 70_000}, "at most 65,536"),
        ({"type": "regex", "regex": ""}, "response_format.regex"),
        ({"type": "choice", "choice": []}, "response_format.choice"),
        ({"type": "choice", "choice": ["a", "a"]}, "distinct"),
        ({"type": "choice", "choice": [" a"]}, "blank"),
        ({"type": "grammar"}, "response_format.grammar"),
    ],
)
def test_a_wrong_format_is_refused_at_once(form: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        parse("idefics.answer", {**ASKED, "response_format": form})


def test_a_schema_that_is_deeply_nested_is_refused_at_once() -> None:
    schema: dict[str, Any] = {}
    for _ in range(10_000):
        schema = {"items": schema}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    with pytest.raises(InvalidRequest):
        parse("idefics.answer", {**ASKED, "response_format": form})


def test_a_reference_in_data_is_none() -> None:
    schema = {"const": {"$ref": "http://example.com"}, "$defs": {"a": {"$ref": "#/$defs/a"}}}
    parse("idefics.answer", {**ASKED, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}})


def test_a_beam_search_keeps_to_no_form() -> None:
    with pytest.raises(InvalidRequest, match="num_beams"):
        parse("idefics.answer", {**ASKED, "response_format": {"type": "json_object"}, "num_beams": 2})


def test_captions_and_labels_have_no_form() -> None:
    with pytest.raises(ValidationError):
        Caption(image=URL, response_format={"type": "json_object"})  # type: ignore[call-arg]


def test_a_model_is_sent_as_its_schema_without_other_fields() -> None:
    job = Answer(image=URL, question="?", response_model=Product)
    schema = job.arguments()["response_format"]["json_schema"]["schema"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Part"]["additionalProperties"] is False
    assert "response_model" not in job.arguments()
    assert Write(images=[URL], response_model=Product).arguments()["response_format"]


def test_a_model_and_a_format_are_one_too_many() -> None:
    with pytest.raises(InvalidRequest, match="not both"):
        Complete(prompt=["a"], response_model=Product, response_format={"type": "json_object"})


def test_a_result_is_parsed_as_the_jobs_model_or_as_plain_values() -> None:
    client = FakeClient(lambda job: '{"name": "car", "parts": [{"kind": "seat"}]}')
    result = client.submit(Answer(image=URL, question="?", response_model=Product)).result()
    assert result.parsed == Product(name="car", parts=[Part(kind="seat")])
    assert client.submit(Answer(image=URL, question="?")).result().parsed["parts"] == [{"kind": "seat"}]


def test_a_text_that_was_cut_is_not_parsed() -> None:
    client = FakeClient(lambda job: '{"name": "ca')
    for model in (Product, None):
        with pytest.raises(ValueError, match=r"EOF|Unterminated"):
            _ = client.submit(Answer(image=URL, question="?", response_model=model)).result().parsed


def test_a_batch_line_of_openais_may_have_a_format() -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": FORMATS[0]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert read_line(1, json.dumps(line)).job().arguments()["response_format"] == FORMATS[0]


def test_a_campaigns_columns_hold_parts_of_parsed_answers() -> None:
    plan = Plan(
        "answer",
        image="url",
        set={"question": "?", "response_format": json.dumps(FORMATS[0])},
        columns={"a": "parsed.a"},
    )
    plan.check(["url"])
    assert plan.job({"url": URL}).arguments()["response_format"] == FORMATS[0]
    client = FakeClient(lambda job: '{"a": [1, {"b": 2}]}')
    get, _ = field_of("parsed.a")
    assert get(client.submit(Answer(image=URL, question="?")).result()) == [1, {"b": 2}]
    cut = FakeClient(lambda job: '{"a": [1').submit(Answer(image=URL, question="?")).result()
    assert get(cut) is None
