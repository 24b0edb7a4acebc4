"""The errors as producers meet them: after pickle, after JSON, with and without our classes."""

from __future__ import annotations

import ast
import json
import pickle
import sys
from pathlib import Path

import pytest
import redis
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.serialization import create_exception_cls, get_pickleable_exception, get_pickled_exception
from kombu.exceptions import OperationalError
from redis.exceptions import NoPermissionError

import tasks
from tasks import errors
from tasks.batch import JobsLost
from tasks.batch_input import NotJsonLines
from tasks.campaign.errors import CampaignError, PlanError, TableError
from tasks.campaign.evaluation.rows import EvaluationError
from tasks.campaign.output import NotRun
from tasks.errors import (
    ERRORS,
    PUBLIC_MODULE,
    BrokerUnavailable,
    IdeficsError,
    ImageInvalid,
    Internal,
    JobCanceled,
    JobError,
    QueueFull,
    from_broker,
    from_exception,
)
from tasks.testing import canned
from tasks.webhooks import InvalidWebhook

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


def test_the_transient_errors_are_those_of_the_contract() -> None:
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


# One base

#: Every error of the package, with what it was before there was one base, or is beside it.
KINDS = {
    **dict.fromkeys(ERRORS.values(), Exception),
    JobCanceled: Exception,
    QueueFull: Exception,
    errors.JobTimeout: TimeoutError,
    BrokerUnavailable: (ConnectionError, redis.ConnectionError, redis.TimeoutError, OperationalError),
    errors.BrokerRefused: redis.ResponseError,
    errors.NotPermitted: NoPermissionError,
    errors.ConfigurationError: ValueError,
    errors.NotFound: LookupError,
    errors.ModelNotFound: LookupError,
    JobsLost: Exception,
    NotJsonLines: ValueError,
    CampaignError: ValueError,
    EvaluationError: ValueError,
    NotRun: Exception,
    PlanError: ValueError,
    TableError: ValueError,
    InvalidWebhook: ValueError,
}


def test_every_error_of_the_package_is_listed_here() -> None:
    def kinds(base: type) -> set[type]:
        return {base, *(one for kind in base.__subclasses__() for one in kinds(kind))}

    public = {kind for kind in kinds(IdeficsError) if kind.__module__.startswith(("tasks.", "idefics_jobs."))}
    assert {kind.__name__ for kind in public} - {kind.__name__ for kind in KINDS} == {"IdeficsError", "JobError"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_an_idefics_error_and_what_it_was_before(kind: type[IdeficsError]) -> None:
    assert issubclass(kind, IdeficsError)
    for before in KINDS[kind] if isinstance(KINDS[kind], tuple) else (KINDS[kind],):
        assert issubclass(kind, before)
    assert kind.code != "internal" or kind is Internal
    assert isinstance(kind.retryable, bool)
    assert 400 <= kind.http_status < 600


def test_transient_errors_are_not_the_requests_fault() -> None:
    assert {kind.http_status for kind in KINDS if kind.retryable} == {424, 503, 504}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OperationalError("away"), BrokerUnavailable),
        (redis.ConnectionError("away"), BrokerUnavailable),
        (redis.TimeoutError("away"), BrokerUnavailable),
        (redis.ResponseError("WRONGTYPE"), errors.BrokerRefused),
        (NoPermissionError("NOPERM"), errors.NotPermitted),
    ],
)
def test_what_the_broker_raises_becomes_one_of_ours(error: Exception, kind: type) -> None:
    ours = from_broker(error)
    assert type(ours) is kind
    assert str(error) in str(ours)
    assert from_broker(ours) is ours
    assert repr(ours) == f"{kind.__name__}({str(ours)!r})"


def test_an_error_says_what_a_web_application_answers() -> None:
    status, body = ImageInvalid(
        "a.example answered with status 404: check that the URL is public.", detail="http_404"
    ).response()
    assert status == 422
    assert body == {
        "error": {
            "code": "image_invalid",
            "message": "There is no picture at the image's URL: check that it is right and public.",
            "detail": "http_404",
            "retryable": False,
        }
    }


#: Those whose message says what is wrong with what the visitor sent.
TOLD_AS_THEY_ARE = {errors.InvalidRequest, JobCanceled, errors.NotFound, NotJsonLines}


@pytest.mark.parametrize(
    # A list: the order must be the same in each process of the tests.
    "kind",
    [kind for kind in KINDS if kind not in {*TOLD_AS_THEY_ARE, JobsLost, NotRun}],
    ids=lambda kind: kind.__name__,
)
def test_visitors_see_neither_hosts_nor_settings(kind: type[IdeficsError]) -> None:
    error = kind("db.internal is at no public address: have it added to IDEFICS_IMAGE_ALLOW_NETWORKS.")
    for detail in (None, "http_404", "dns", "network", "new", *filter(kind.public.get, kind.public)):
        error.detail = detail
        _, body = error.response()
        for word in ("internal is", "IDEFICS", "Redis", "worker", "broker", "queue", "Client("):
            assert word not in body["error"]["message"]
        assert body["error"]["message"].endswith(".")
    assert "IDEFICS_IMAGE_ALLOW_NETWORKS" in str(error)


def test_an_error_does_not_tell_which_internal_names_resolve() -> None:
    resolves = errors.ImageBlocked("db.internal is at no public address.", detail="network")
    does_not = errors.ImageUnreachable("dc.internal has no address.", detail="dns")
    assert resolves.response() == does_not.response()
    assert resolves.response()[0] == 424


def test_a_callback_that_is_refused_is_the_sites_fault_and_not_its_visitors() -> None:
    error = errors.InvalidRequest("callback.url: its host is not public.", detail="callback")
    assert error.response() == errors.ConfigurationError().response()
    assert error.response()[0] == error.http_status == 500
    assert errors.InvalidRequest("prompt: too long.").response()[0] == 422


def test_messages_that_visitors_see_name_no_setting() -> None:
    """Those of an InvalidRequest, as they are written: but where it has a detail, which says that they do not."""
    folder = Path(errors.__file__).parents[1]
    calls = [
        node
        for path in (*folder.glob("tasks/**/*.py"), *folder.glob("worker/**/*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InvalidRequest"
    ]
    assert len(calls) > 10
    assert not [
        ast.unparse(call) for call in calls if "IDEFICS_" in ast.unparse(call) and "detail=" not in ast.unparse(call)
    ]


# The detail


@each_error
def test_a_detail_is_the_third_argument_and_survives_every_way(code: str, app: Celery) -> None:
    error = ERRORS[code]("The cure.", detail="http_404")
    assert error.args == (code, "The cure.", "http_404")
    assert str(error) == "The cure."
    for again in (
        pickle.loads(pickle.dumps(error)),
        get_pickled_exception(get_pickleable_exception(error)),
        from_exception(create_exception_cls(CODES[code], "celery.exceptions")(*error.args)),
        from_exception(stored(app, error)),
    ):
        assert (type(again), again.args, again.detail) == (ERRORS[code], error.args, "http_404")


def test_an_error_without_a_detail_has_none() -> None:
    assert Internal("The cure.").detail is None
    assert from_exception(Exception("internal", "The cure.", None)).args == ("internal", "The cure.")
