"""What examples/wire/README.md says is what the code does."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from tasks.errors import ImageInvalid
from tasks.payloads import PAYLOADS, Callback, Job
from tasks.results import Result
from tasks.review.decision_callback import delivery_of
from tasks.review.items import Decision, Entry, ReviewItem
from tasks.webhooks import MAX_BODY_BYTES, Event, Review, batch_body, body
from worker.delivery.recorder import EVENTS, job_data
from worker.demo import stack

PAGE = (stack.CHECKOUT / "examples" / "wire" / "README.md").read_text()
STATES = {event: state for state, event in EVENTS.items()}


def blocks() -> dict[str, dict[str, Any]]:
    """The callbacks' bodies, by their types."""
    found = map(json.loads, re.findall(r"^```json\n({\"type.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL))
    return {each["type"]: each for each in found}


def row(start: str) -> list[str]:
    """The cells of a table's row."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_type_of_event_has_a_body() -> None:
    assert blocks().keys() == {*EVENTS.values(), "job.reviewed", "job.batch"}


@pytest.mark.parametrize("event", EVENTS.values())
def test_a_body_is_as_the_workers_write_it(event: str) -> None:
    shown = blocks()[event]
    data = shown["data"]
    value: Any = data["result"]
    if event == "job.failed":
        error = data["error"]
        value = ImageInvalid(error["message"], detail=error["detail"])
    elif event == "job.canceled":
        value = TaskRevokedError("terminated")
    written = job_data(data["id"], data["task"], {"metadata": data["metadata"]}, STATES[event], value)  # type: ignore[index]
    assert json.loads(body(event, shown["timestamp"], written)) == shown  # type: ignore[arg-type]
    Event.model_validate({**shown, "id": "msg_1"})


def test_a_decision_is_as_reviewers_send_it() -> None:
    shown = blocks()["job.reviewed"]
    data = shown["data"]
    item = ReviewItem(
        id=data["id"],
        task=data["task"],
        asked="Which one?",
        answers=(),
        confidence=data["confidence"],
        min_confidence=0.8,
        pictures=1,
        created=0.0,
        metadata=data["metadata"],
        answer=data["model_answer"],
    )
    decided = datetime.fromisoformat(shown["timestamp"]).timestamp()
    entry = Entry(item, callback=("https://shop.example/hook", "main"))
    delivery = delivery_of(entry, Decision(item.id, data["answer"], decided))
    assert delivery is not None
    assert json.loads(delivery.body) == shown
    assert isinstance(Event.model_validate({**shown, "id": "msg_1"}).data, Review)


def test_the_result_shown_has_all_fields() -> None:
    result = blocks()["job.succeeded"]["data"]["result"]
    assert Result.model_validate(result).model_dump(mode="json") == result


def test_the_batch_holds_the_event_shown() -> None:
    shown = blocks()["job.batch"]
    (event,) = shown["data"]["events"]
    alone = {name: value for name, value in event.items() if name != "id"}
    assert alone == blocks()["job.canceled"]
    assert json.loads(batch_body(shown["timestamp"], [(event["id"], json.dumps(alone))])) == shown


def test_what_is_truncated_is_named_in_its_order() -> None:
    names = re.findall(r"`([a-z.]+)`", PAGE[PAGE.index("- **`truncated`**") : PAGE.index("A `note`")])
    long = "x" * MAX_BODY_BYTES
    data = {"result": {"text": long, "scores": {long: 1}, "rest": long}, "error": None, "metadata": {"a": long}}
    failed = {"result": None, "error": {"message": long}, "metadata": {"a": long}}
    cut = [json.loads(body("job.succeeded", "now", each))["data"]["truncated"] for each in (data, failed)]
    parts = [name for name in names if name in {*cut[0], *cut[1]}]
    assert parts == ["result.scores", "result.text", "error.message", "metadata", "result"]
    assert [[name for name in parts if name in each] for each in cut] == cut
    assert f"{MAX_BODY_BYTES // 1_000} kB" in PAGE


@pytest.mark.parametrize("task", PAYLOADS)
def test_a_tasks_arguments_are_those_of_its_payload(task: str) -> None:
    needed, _, others = row(f"`{task}`")[1].partition(";")
    fields = PAYLOADS[task].model_fields.items()
    own = {name: field for name, field in fields if name not in Job.model_fields and not field.exclude}
    told = set(re.findall(r"`(\w+)`", needed)), set(re.findall(r"`(\w+)`", others))
    required = {name for name, field in own.items() if field.is_required()}
    assert told == (required, own.keys() - required)


def test_the_arguments_of_every_task_are_told() -> None:
    start = PAGE.index("Every task also takes")
    assert set(re.findall(r"`(\w+)`", PAGE[start : PAGE.index("An argument of", start)])) == Job.model_fields.keys()


def test_the_callback_shown_is_one() -> None:
    shown = json.loads("{" + re.findall(r'`("callback": {.*?})`', PAGE)[0] + "}")["callback"]
    assert Callback.model_validate(shown).model_fields_set == {"url", "key_id"}
