"""The app's tasks, called without a worker."""

from __future__ import annotations

import traceback
from unittest.mock import Mock

import pytest
from celery import Celery

from tasks.errors import ImageInvalid, Internal, InvalidRequest
from tasks.payloads import PAYLOADS
from tasks.testing import canned
from worker.app import app
from worker.engine.row import NotBegun
from worker.jobs.runs import CancellationError
from worker.jobs.task import JobApp, RunCanceled, RunReturned

ARGUMENTS = {"prompt": ["Hello"]}


def service_that(monkeypatch: pytest.MonkeyPatch, **behaviour: object) -> Mock:
    service = Mock(**{f"run.{name}": value for name, value in behaviour.items()})
    monkeypatch.setattr(app, "service", service)
    return service


def test_the_app_has_the_six_tasks_and_none_of_celerys() -> None:
    assert set(app.tasks) == set(PAYLOADS)


def test_the_apps_own_attributes_are_none_of_celerys() -> None:
    assert not {"settings", "recorder", "service"} & set(dir(Celery("plain", set_as_current=False)))
    assert JobApp.service is None


def test_a_failure_shows_no_frame_below_its_task() -> None:
    with pytest.raises(InvalidRequest, match="prompt") as failure:
        app.tasks["idefics.complete"].run(prompt=[])
    assert traceback.extract_tb(failure.tb)[-1].name == "run"
    assert failure.value.__suppress_context__


def test_a_task_returns_what_the_service_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    task = app.tasks["idefics.complete"]
    job = PAYLOADS["idefics.complete"].model_validate(ARGUMENTS)
    answer = canned("llo", job)
    service = service_that(monkeypatch, return_value=answer)
    assert task.run(**ARGUMENTS) == answer.model_dump(mode="json")
    assert service.run.call_args.args[0] == job


def test_without_a_model_a_job_fails_as_internal() -> None:
    with pytest.raises(Internal, match="has no model"):
        app.tasks["idefics.complete"].run(**ARGUMENTS)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (CancellationError(), RunCanceled),
        (NotBegun(), RunReturned),
        (ImageInvalid("no picture"), ImageInvalid),
        (KeyError("x"), Internal),
    ],
)
def test_a_run_ends_as_the_model_process_reports_it(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception]
) -> None:
    service_that(monkeypatch, side_effect=raised)
    with pytest.raises(expected):
        app.tasks["idefics.complete"].run(**ARGUMENTS)
