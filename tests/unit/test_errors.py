"""The errors as producers meet them: after pickle, after JSON, with and without our classes."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.serialization import create_exception_cls, get_pickleable_exception, get_pickled_exception

import tasks
from tasks.errors import ERRORS, PUBLIC_MODULE, Internal, JobCanceled, JobError, from_exception
from tasks.testing import canned

CODES = {
    "invalid_request": "InvalidRequest",
    "prompt_too_long": "PromptTooLong",
    "image_blocked": "ImageBlocked",
    "image_unreachable": "ImageUnreachable",
    "image_too_large": "ImageTooLarge",
    "image_invalid": "ImageInvalid",
    "out_of_memory": "OutOfMemory",
    "deadline_exceeded": "DeadlineExceeded",
    "worker_lost": "WorkerLost",
    "internal": "Internal",
}
RETRYABLE = {"image_unreachable", "worker_lost", "out_of_memory"}

each_error = pytest.mark.parametrize("code", CODES)


@pytest.fixture(scope="module")
def app() -> Celery:
    return Celery(backend="cache+memory://", set_as_current=False)


def stored(app: Celery, error: Exception) -> BaseException:
    """An error after its way through a JSON result backend."""
    return app.backend.exception_to_python(json.loads(json.dumps(app.backend.prepare_exception(error))))


def test_the_codes_and_class_names_are_those_of_the_contract() -> None:
    assert {code: error.__name__ for code, error in ERRORS.items()} == CODES


def test_the_ones_that_may_pass_are_those_of_the_contract() -> None:
    assert {code for code, error in ERRORS.items() if error.retryable} == RETRYABLE


def test_every_class_can_be_imported_from_the_package() -> None:
    assert all(getattr(tasks, name) is ERRORS[code] for code, name in CODES.items())


@each_error
def test_the_first_argument_is_the_code_and_the_second_a_sentence(code: str) -> None:
    error = ERRORS[code]("The cure.")
    assert error.args == (code, "The cure.")
    assert str(error) == "The cure."


@each_error
def test_an_error_without_a_message_tells_its_cure(code: str) -> None:
    message = str(ERRORS[code]())
    assert ": " in message
    assert message.endswith(".")


@each_error
def test_an_error_survives_pickle(code: str) -> None:
    error = pickle.loads(pickle.dumps(ERRORS[code]("The cure.")))
    assert type(error) is ERRORS[code]
    assert error.args == (code, "The cure.")


@each_error
def test_an_error_survives_celerys_own_pickling(code: str) -> None:
    error = get_pickled_exception(get_pickleable_exception(ERRORS[code]("The cure.")))
    assert type(error) is ERRORS[code]
    assert error.args == (code, "The cure.")


@each_error
def test_a_class_that_celery_made_up_becomes_ours(code: str) -> None:
    made_up = create_exception_cls(CODES[code], "celery.exceptions")(code, "The cure.")
    error = from_exception(made_up)
    assert type(error) is ERRORS[code]
    assert error.args == (code, "The cure.")


@each_error
def test_an_error_comes_back_from_json_where_the_client_is_imported(code: str, app: Celery) -> None:
    public = pytest.importorskip(PUBLIC_MODULE)
    error = stored(app, ERRORS[code]("The cure."))
    assert type(error) is getattr(public, CODES[code])
    assert error.args == (code, "The cure.")
    assert type(from_exception(error)) is ERRORS[code]
    assert str(from_exception(error)) == "The cure."


@each_error
def test_an_error_comes_back_from_json_where_the_client_is_not_imported(
    code: str, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, PUBLIC_MODULE, raising=False)
    error = stored(app, ERRORS[code]("The cure."))
    assert type(error).__name__ == CODES[code]
    assert error.args == (code, "The cure.")
    assert type(from_exception(error)) is ERRORS[code]
    assert str(from_exception(error)) == "The cure."


def test_an_error_of_ours_stays_itself() -> None:
    error = Internal("The cure.")
    assert from_exception(error) is error


@pytest.mark.parametrize(
    "foreign",
    [
        ValueError("boom"),
        SoftTimeLimitExceeded(),
        KeyError(),
        Exception(["invalid_request"]),
        Exception("image_bad", 1),
    ],
)
def test_any_other_error_is_internal_and_named(foreign: Exception) -> None:
    error = from_exception(foreign)
    assert type(error) is Internal
    assert error.code == "internal"
    assert type(foreign).__name__ in str(error)


def test_a_code_alone_is_enough() -> None:
    error = from_exception(Exception("image_blocked"))
    assert type(error) is ERRORS["image_blocked"]
    assert str(error) == ERRORS["image_blocked"].__doc__


def test_a_canceled_job_keeps_its_text_so_far_through_pickle() -> None:
    error = JobCanceled(partial=canned("so far", tasks.Complete(prompt=["Hello"])))
    again = pickle.loads(pickle.dumps(error))
    assert again.partial == error.partial
    assert str(again) == str(error) == JobCanceled.__doc__


def test_a_canceled_job_is_not_a_failed_one() -> None:
    assert not issubclass(JobCanceled, JobError)
