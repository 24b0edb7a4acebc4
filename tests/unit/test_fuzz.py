"""Short campaigns of `make fuzz`: broken images and payloads end in an answer or in an error of ours."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks import fuzz

ENDS = {"result", "invalid_request", "prompt_too_long", "deadline_exceeded", "image_blocked"}
ENDS |= {"image_invalid", "image_too_large"}


@pytest.fixture(scope="module")
def answering() -> Iterator[fuzz.Answering]:
    with fuzz.Answering() as answering:
        yield answering


def test_broken_images_open_or_are_refused_in_time() -> None:
    found = fuzz.images(600)
    assert set(found["ends"]) == {"opened", "image_invalid", "image_too_large"}
    assert sum(found["ends"].values()) == found["tried"] == 600
    # Neither all whole nor all broken at the first byte.
    assert 60 < found["ends"]["opened"] < 300
    assert found["over_2_s"] == 0


@settings(max_examples=200, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(job=fuzz.jobs())
def test_a_fuzzed_payload_ends_in_a_result_or_a_refusal(
    job: tuple[str, dict[str, Any]], answering: fuzz.Answering
) -> None:
    # What would become `internal` raises here, and hypothesis shows the smallest such job.
    assert answering.end(*job) in ENDS


def test_the_campaign_reaches_answers_and_refusals_of_every_task() -> None:
    found = fuzz.payloads(200)
    assert found["tried"] == 200
    assert len(found["by_task"]) == 6
    assert min(found["ends"]["result"], found["ends"]["invalid_request"]) > 10


def test_a_defect_is_not_taken_for_an_end(answering: fuzz.Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(answering._service, "run", broken)
    with pytest.raises(ZeroDivisionError):
        answering.end("idefics.complete", {"prompt": ["Hello"]})


def test_no_look_up_leaves_the_machine(answering: fuzz.Answering) -> None:
    assert socket.getaddrinfo("example.com", 80)[0][4] == ("127.0.0.1", 80)
    assert answering.end("idefics.caption", {"image": "http://example.com/a.png"}) == "image_blocked"
