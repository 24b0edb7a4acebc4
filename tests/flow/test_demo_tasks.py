"""The six tasks on the bundled model, asked by a producer that knows Celery and Redis only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PICTURES
from tests.support.pictures import data_uri
from tests.support.stand import Producer
from tests.support.waiting import PATIENCE_S
from worker.demo.__main__ import Shown, pictures
from worker.demo.sayings import (
    FORMS,
    expected_answer,
    expected_caption,
    expected_reply,
    prompted_caption,
    story,
)
from worker.demo.stack import Broker
from worker.demo.world import CATEGORIES, THINGS

PRODUCER = Path(__file__).parent / "producer.py"
Job = tuple[str, dict[str, Any]]


def ask(broker: Broker, jobs: list[Job]) -> list[tuple[str, Any]]:
    """(state, result) of each job, in order."""
    done = subprocess.run(
        [sys.executable, PRODUCER, broker.url, broker.results],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        # Not the checkout: `tasks` must not be importable there.
        cwd="/",
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(outcome) for outcome in json.loads(done.stdout)]


def jobs_about(shown: Shown, example: Shown) -> list[tuple[Job, str]]:
    """Each task about one picture, with the right answer."""
    image, picture = {"path": shown.file}, shown.picture
    fun_fact = FORMS["fun fact"]
    few_shot = [{"image": {"path": example.file}, "text": fun_fact(example.picture)}]
    question = "What is in this image?"
    data = data_uri((PICTURES / shown.file).read_bytes())
    asked = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
    return [
        (("idefics.caption", {"image": image}), expected_caption(picture)),
        (("idefics.caption", {"image": data, "prompt": "This is an image of"}), prompted_caption(picture)),
        (("idefics.caption", {"image": image, "examples": few_shot}), fun_fact(picture)),
        (("idefics.answer", {"image": image, "question": question}), expected_answer(picture, question)),
        (("idefics.classify", {"image": image, "labels": list(CATEGORIES)}), THINGS[picture.thing].category),
        (("idefics.write", {"images": [image]}), story(picture)),
        (("idefics.complete", {"prompt": [data, "This is an image of"]}), prompted_caption(picture)),
        (("idefics.chat", {"messages": [{"role": "user", "content": asked}]}), expected_reply(picture, question)),
    ]


def test_the_parent_never_loads_torch_and_the_model_process_does(demo_broker: Broker) -> None:
    worker = Producer(demo_broker)
    answer = worker.app.signature("idefics.complete", kwargs={"prompt": ["Hello"]}, queue="idefics").delay()
    assert answer.get(timeout=PATIENCE_S)
    assert not loaded_libraries(worker.stats()["pid"], "torch")
    assert loaded_libraries(worker.model_process(), "libtorch")


def loaded_libraries(pid: int, name: str) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if name in line]


def test_all_six_tasks_answer_rightly_on_the_shipped_pictures(demo_broker: Broker) -> None:
    shown = pictures()
    expected = [pair for n in range(8) for pair in jobs_about(shown[n], shown[n + 8])]
    outcomes = ask(demo_broker, [job for job, _ in expected])
    assert {state for state, _ in outcomes} == {"SUCCESS"}
    wrong = [
        (job, value["text"], right)
        for (job, right), (_, value) in zip(expected, outcomes, strict=True)
        if value["text"].strip() != right
    ]
    # The model card gives the rate; here nearly all must be right, so that a broken path shows.
    assert len(wrong) <= len(expected) // 20, wrong


def test_a_result_has_the_contracts_form(demo_broker: Broker) -> None:
    shown = pictures()[0]
    arguments = {"image": {"path": shown.file}, "labels": list(CATEGORIES), "metadata": {"row": 7}}
    [(_, result)] = ask(demo_broker, [("idefics.classify", arguments)])
    assert set(result) == {
        "text", "finish_reason", "label", "scores", "confidence", "usage", "model", "timing", "generation", "metadata",
        "receipt",
    }  # fmt: skip
    assert set(result["scores"]) == set(CATEGORIES)
    assert sum(result["scores"].values()) == pytest.approx(1.0)
    assert result["label"] == max(result["scores"], key=result["scores"].__getitem__)
    assert result["confidence"] == pytest.approx(result["scores"][result["label"]])
    assert result["usage"]["images"] == 1
    assert result["usage"]["prompt_tokens"] > 10
    assert result["model"] == {
        "id": "demo", "revision": None, "family": "idefics", "dtype": "float32", "quantization": None,
    }  # fmt: skip
    assert set(result["timing"]) == {"queued_s", "fetch_s", "wait_s", "generate_s"}
    assert all(seconds >= 0 for seconds in result["timing"].values())
    assert result["metadata"] == {"row": 7}


GOOD = {"image": {"path": "PICTURE"}}

BAD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a missing image": ("idefics.caption", {}, "InvalidRequest", "invalid_request"),
    "an unknown field": ("idefics.caption", {**GOOD, "colour": 1}, "InvalidRequest", "invalid_request"),
    "one label": ("idefics.classify", {**GOOD, "labels": ["animal"]}, "InvalidRequest", "invalid_request"),
    "a broken image": (
        "idefics.caption", {"image": "data:image/png;base64,iVBORw0KGgo="}, "ImageInvalid", "image_invalid",
    ),
    "a file URL": ("idefics.caption", {"image": "file:///etc/passwd"}, "ImageBlocked", "image_blocked"),
    "an image token in a question": (
        "idefics.answer", {**GOOD, "question": "What is <image> here?"}, "InvalidRequest", "invalid_request",
    ),
    "a path that leaves the root": (
        "idefics.caption", {"image": {"path": "../vocabulary.json"}}, "ImageBlocked", "image_blocked",
    ),
    "a private address": ("idefics.caption", {"image": "http://127.0.0.1:80/a.png"}, "ImageBlocked", "image_blocked"),
    "a prompt that is too long": (
        "idefics.caption", {**GOOD, "prompt": "word " * 5000}, "PromptTooLong", "prompt_too_long",
    ),
    "more tokens than allowed": (
        "idefics.caption", {**GOOD, "max_new_tokens": 100_000}, "InvalidRequest", "invalid_request",
    ),
}  # fmt: skip


def test_each_bad_payload_fails_with_its_code_while_good_jobs_beside_it_succeed(demo_broker: Broker) -> None:
    shown = pictures()[1]
    jobs: list[Job] = []
    for task, arguments, _, _ in BAD.values():
        named = json.loads(json.dumps(arguments).replace("PICTURE", shown.file))
        jobs += [(task, named), ("idefics.caption", {"image": {"path": shown.file}})]
    outcomes = ask(demo_broker, jobs)
    for name, (state, value), (_, _, exception, code) in zip(BAD, outcomes[::2], BAD.values(), strict=True):
        assert (state, *value[:2]) == ("FAILURE", exception, code), name
        assert len(value[2]) > 20, name
    assert {(state, value["text"]) for state, value in outcomes[1::2]} == {("SUCCESS", outcomes[1][1]["text"])}
