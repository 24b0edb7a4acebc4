"""Jobs that end early: canceled, abandoned or out of time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tasks.errors import DeadlineExceeded
from tests.support.pictures import data_uri, png
from tests.support.web import Quiet, serving
from tests.unit.service.jobs import CONTEXT, SOON, Start, complete, job
from worker.engine.interfaces import PromptContent
from worker.engine.row import Tokens
from worker.images.loader import DOWNLOADS
from worker.images.sources import SourceReader
from worker.jobs.runs import CancellationError, JobContext
from worker.jobs.service import Service
from worker.models.fake import FakeCodec, FakeModel

# Cancelling


class Meddler(FakeCodec):
    """Does something between a job's download and its row."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle = meddle

    def min_token_count(self, parts: PromptContent) -> int:
        return 0

    def prepare(self, parts: PromptContent) -> Tokens:
        self._meddle()
        return super().prepare(parts)


def meddled(meddle: Callable[[], object]) -> FakeModel:
    model = FakeModel()
    model.codec = Meddler(meddle)
    return model


def test_a_job_canceled_before_its_row_is_submitted_does_not_run(start: Start) -> None:
    model = meddled(lambda: service.cancel("job"))
    service = start(model)
    with pytest.raises(CancellationError):
        service.run(complete("a"), CONTEXT)
    assert model.batches == []


def test_a_job_canceled_while_its_image_loads_is_not_even_tokenized(start: Start) -> None:
    prepared: list[int] = []

    class Pictures(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            service.cancel("job")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())

    with serving(Pictures) as port:
        model = meddled(lambda: prepared.append(1))
        service = start(model, image_allow_networks="127.0.0.0/8", image_ports=(port,))
        with pytest.raises(CancellationError):
            service.run(job("caption", image=f"http://127.0.0.1:{port}/a.png"), CONTEXT)
    assert prepared == []


@pytest.mark.parametrize(("url", "at_once"), [(data_uri(png()), 1), ("http://a.test/{}", DOWNLOADS)])
def test_the_files_of_a_jobs_images_are_not_all_held_at_once(
    start: Start, url: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: set[int] = set()
    most: list[int] = []

    class File(bytes):
        def __init__(self, *_: object) -> None:
            held.add(id(self))
            most.append(len(held))

        def __del__(self) -> None:
            held.remove(id(self))

    monkeypatch.setattr(SourceReader, "read", lambda *_, **__: File(png()))
    result = start().run(job("write", images=[url.format(n) for n in range(32)]), CONTEXT)
    assert result.text
    assert 0 < max(most) <= at_once


def test_a_job_canceled_while_it_runs_ends_with_its_text_so_far(start: Start) -> None:
    service = start(FakeModel(step_s=0.01))
    timer = threading.Timer(0.1, service.cancel, ["job"])
    timer.start()
    with pytest.raises(CancellationError) as canceled:
        service.run(complete("a" * 60, max_new_tokens=60), CONTEXT)
    partial = canceled.value.partial
    assert partial is not None
    assert partial.finish_reason == "canceled"
    assert 0 < len(partial.text) < 60


def test_a_run_that_is_abandoned_ends_and_another_of_its_job_does_not(start: Start) -> None:
    service = start(FakeModel(step_s=0.01))
    threading.Timer(0.1, service.abandon, ["job"]).start()
    with pytest.raises(CancellationError):
        service.run(complete("a" * 60, max_new_tokens=60), CONTEXT)
    assert not service.is_canceled("job")
    assert service.run(complete("a", max_new_tokens=1), CONTEXT).text == "a"
    assert service.abandon("job") is None


def test_canceling_a_job_leaves_the_others_alone(start: Start) -> None:
    service = start(FakeModel(step_s=0.005))
    texts: list[str] = []
    other = threading.Thread(
        target=lambda: texts.append(service.run(complete("b" * 30, max_new_tokens=30), JobContext(id="other")).text)
    )
    other.start()
    threading.Timer(0.05, service.cancel, ["job"]).start()
    with pytest.raises(CancellationError):
        service.run(complete("a" * 60, max_new_tokens=60), CONTEXT)
    other.join(SOON)
    assert texts == ["b" * 30]


def test_a_job_canceled_between_its_arrival_and_its_start_does_not_run(start: Start) -> None:
    model = FakeModel()
    service = start(model)
    assert service.cancel("job") is False
    assert service.is_canceled("job")
    with pytest.raises(CancellationError):
        service.run(complete("a"), CONTEXT)
    assert model.batches == []


def test_a_canceled_job_that_is_forgotten_may_run_again(service: Service) -> None:
    service.cancel("job")
    service.forget("job")
    assert service.run(complete("a"), CONTEXT).text == "a"


def test_only_a_job_that_is_in_the_model_has_a_text_to_wait_for(start: Start) -> None:
    said: list[bool] = []
    service = start(meddled(lambda: said.append(service.cancel("job"))))
    with pytest.raises(CancellationError):
        service.run(complete("a"), CONTEXT)
    slow = start(FakeModel(step_s=0.01))
    threading.Timer(0.1, lambda: said.append(slow.cancel("job"))).start()
    with pytest.raises(CancellationError):
        slow.run(complete("a" * 60, max_new_tokens=60), CONTEXT)
    assert said == [True, False]


def test_a_canceled_job_that_fails_is_canceled_and_not_tried_again(start: Start) -> None:
    service = start(meddled(lambda: service.cancel("job") and None), max_prompt_tokens=1)
    with pytest.raises(CancellationError):
        service.run(complete("too long"), CONTEXT)


# Deadlines


def test_a_job_whose_deadline_passed_in_the_queue_fails_without_running(start: Start) -> None:
    model = FakeModel()
    context = JobContext(id="job", submitted_at=time.time() - 10)
    with pytest.raises(DeadlineExceeded):
        start(model).run(complete("a", deadline_s=9), context)
    assert model.batches == []


def test_a_deadline_counts_from_submission(service: Service) -> None:
    context = JobContext(id="job", submitted_at=time.time() - 10)
    assert service.run(complete("a", deadline_s=60), context).finish_reason == "length"


@pytest.mark.parametrize(
    ("arguments", "context"),
    [
        ({"deadline_s": 0.2}, CONTEXT),
        ({}, JobContext(id="job", soft_limit_s=0.2)),
        ({"deadline_s": 60}, JobContext(id="job", soft_limit_s=0.2)),
    ],
    ids=["deadline", "soft limit", "the earlier of both"],
)
def test_a_job_whose_time_is_up_while_it_runs_ends_with_its_text(
    start: Start, arguments: dict[str, Any], context: JobContext
) -> None:
    result = start(FakeModel(step_s=0.01)).run(complete("a" * 60, max_new_tokens=60, **arguments), context)
    assert result.finish_reason == "deadline"
    assert 0 < len(result.text) < 60
