"""The errors of this package: every one is an IdeficsError with a stable `code`.

A failed job is a Celery FAILURE. Its exception's class name and its first argument, the code, are stable: your code may
rely on them. The second argument is a sentence with the cure. The third one, if there is one, is the `detail`: the
exact reason (`http_404`, `timeout`, `not_a_picture`), to sort many failures by.

`str(error)` is for developers and operators, and may name hosts and settings. `error.response()` is for a web
application's visitors, and has neither: its sentences are each class's `public` ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .picture_forms import PICTURE_FORMS
from .results import Result

if TYPE_CHECKING:
    from .worker_registry import ServedModel

#: Under this name the producers' wheel installs this module, so that Celery finds the classes there.
PUBLIC_MODULE = "idefics_jobs.errors"


_SET_UP_WRONGLY = "The service is set up wrongly, which is not the request's fault: tell its operator."


class PublicError(TypedDict):
    """The error that visitors see."""

    code: str
    message: str
    detail: str | None
    retryable: bool


class ErrorBody(TypedDict):
    """The JSON body of an HTTP answer."""

    error: PublicError


class IdeficsError(Exception):
    """The base of all errors here. `str(error)` is a sentence with the cure."""

    #: Stable.
    code: ClassVar[str] = "internal"
    #: The same call may succeed later.
    retryable: ClassVar[bool] = False
    #: HTTP status for a web application's answer.
    http_status: int = 500
    #: Messages for visitors, by the detail or its part before `_`; the key "" is for any other detail. Without one, or
    #: if it is empty, visitors see the error's own message: it is about what they sent.
    public: ClassVar[Mapping[str, str]] = {}
    #: The exact reason; None if the code says it all.
    detail: str | None = None

    # redis-py's own __str__ omits the message.
    __repr__ = Exception.__repr__

    def as_dict(self) -> dict[str, str]:
        """The code, the message and, if there is one, the detail, as in JSON lines and callbacks."""
        told = {"code": self.code, "message": str(self)}
        return {**told, "detail": self.detail} if self.detail else told

    def response(self) -> tuple[int, ErrorBody]:
        """The HTTP status and the JSON body for a web application's visitor, without names of hosts and settings."""
        told: PublicError = {
            "code": self.code,
            "message": self._public_message(),
            "detail": self.detail,
            "retryable": self.retryable,
        }
        return self.http_status, {"error": told}

    def _public_message(self) -> str:
        detail = self.detail or ""
        found = (self.public[name] for name in (detail, detail.partition("_")[0], "") if name in self.public)
        return next(found, "") or str(self)


class JobError(IdeficsError):
    """A job ended without an answer. `code` is stable; `str(error)` is a sentence with the cure."""

    #: For a job's error also: the worker retries the job with back-off before it fails.
    retryable: ClassVar[bool] = False
    #: Seconds until the retry, if the image's server sent Retry-After.
    retry_after_s: float | None = None
    #: HTTP statuses of details that differ from their class's.
    statuses: ClassVar[Mapping[str, int]] = {}

    def __init_subclass__(cls) -> None:
        cls.__module__ = PUBLIC_MODULE

    def __init__(self, *args: str, detail: str | None = None) -> None:
        # Celery rebuilds an exception from its stored arguments, (code, message) or (code, message, detail); our own
        # code passes the message only.
        message = (args[0] if len(args) == 1 else args[1]) if args else (self.__doc__ or self.code)
        self.detail = args[2] if len(args) > 2 else detail
        self.http_status = self.statuses.get(self.detail or "", self.http_status)
        super().__init__(*filter(None, (self.code, message, self.detail)))

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        # By code, since in a checkout the class is not importable under its public name.
        return _from_code, self.args


def _from_code(code: str, *rest: str) -> JobError:
    return ERRORS[code](code, *rest)


class InvalidRequest(JobError):
    """The payload breaks the contract: correct the field that the message names and send it again."""

    code = "invalid_request"
    http_status = 422
    statuses = {"job_bytes": 413, "callback": 500}

    def response(self) -> tuple[int, ErrorBody]:
        """A forbidden callback is not the visitor's fault: the site is set up wrongly."""
        return ConfigurationError().response() if self.detail == "callback" else super().response()


class PromptTooLong(JobError):
    """The prompt has more tokens than the worker allows: shorten it or raise IDEFICS_MAX_PROMPT_TOKENS."""

    code = "prompt_too_long"
    http_status = 422
    public = {"": "The text is too long: shorten it, or send fewer images."}


class ImageBlocked(JobError):
    """The operator's policy forbids this image's address: use a public http(s) URL or a data: URI."""

    code = "image_blocked"
    http_status = 422
    public = {
        "": "The image's address is not allowed: use a public http(s) URL, or send the picture itself.",
        "url": "The image's URL is malformed: write http(s)://host/path, without a user.",
        "scheme": "An image is an http(s) URL or a data:image/...;base64, URI: no other scheme is read.",
        "data_uri": "Of data: URIs only data:image/...;base64, is read: send the image in this form.",
        "port": "The image's URL names a port that is not allowed: write one without a port.",
        "redirects": "The image's URL leads elsewhere: use its final one.",
        "noai": "The image's server forbids its use by AI: leave the image out.",
        "path": "No image is read at this path: send the picture itself.",
    }

    def response(self) -> tuple[int, ErrorBody]:
        """A host in a private network is reported as not existing: visitors must not learn which names resolve."""
        return ImageUnreachable(detail="dns").response() if self.detail == "network" else super().response()


class ImageUnreachable(JobError):
    """The image could not be downloaded in time: check that its server is up, then send the job again."""

    code = "image_unreachable"
    retryable = True
    http_status = 424
    public = {
        "": "The image could not be downloaded: check that its server is up, then try again.",
        "dns": "There is no public server of the image's address: check its spelling, then try again.",
        "timeout": "The image's server did not send it in time: try again later.",
    }


class ImageTooLarge(JobError):
    """The image has too many bytes or pixels: send a smaller one."""

    code = "image_too_large"
    http_status = 413
    public = {
        "": "The image is too large: send a smaller one.",
        "job_bytes": "",
        "pixels": "The image has too many pixels: send a smaller one.",
    }


class ImageInvalid(JobError):
    __doc__ = f"The bytes are not an image that can be decoded: send the picture as {PICTURE_FORMS}."

    code = "image_invalid"
    http_status = 422
    public = {
        "": f"The picture cannot be read: send a whole {PICTURE_FORMS}.",
        "http": "There is no picture at the image's URL: check that it is right and public.",
        "redirects": "The image's URL leads nowhere: use its final one.",
        "no_file": "The picture's file cannot be read: send it again.",
        "truncated": "The picture is not whole: send it again.",
    }


class OutOfMemory(JobError):
    """The device has not enough memory for this job: send fewer images, a shorter prompt or fewer beams."""

    code = "out_of_memory"
    retryable = True
    http_status = 503
    public = {"": "There is not enough memory for this: send fewer images or a shorter text, or try again later."}


class DeadlineExceeded(JobError):
    """The job did not finish in its time: give it a longer deadline or add workers."""

    code = "deadline_exceeded"
    http_status = 504
    public = {"": "There was no time for this: try again later."}


class WorkerLost(JobError):
    """The model process died with this job each time it ran: look at the worker's log for the reason."""

    code = "worker_lost"
    retryable = True
    http_status = 503
    public = {"": "This could not be finished: try again later."}


class Internal(JobError):
    """The worker has a defect: report it with the traceback in the worker's log."""

    code = "internal"
    public = {"": "This failed by a fault of the service."}


ERRORS: dict[str, type[JobError]] = {
    error.code: error
    for error in (
        InvalidRequest,
        PromptTooLong,
        ImageBlocked,
        ImageUnreachable,
        ImageTooLarge,
        ImageInvalid,
        OutOfMemory,
        DeadlineExceeded,
        WorkerLost,
        Internal,
    )
}


class JobCanceled(IdeficsError):
    """The job was canceled before it had an answer: submit it again if you still want one."""

    code = "canceled"
    http_status = 409

    def __init__(self, message: str = "", partial: Result | None = None) -> None:
        super().__init__(message or self.__doc__)
        #: The result so far; None if the model had not begun.
        self.partial = partial


class QueueFull(IdeficsError):
    """The broker has no room for the job, which was not queued: submit it later, or add workers."""

    code = "queue_full"
    retryable = True
    http_status = 503
    public = {"": "Too much is waiting already: try again later."}

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)
        #: The jobs that `submit_many` had queued before.
        self.submitted: list[Any] = []


class JobTimeout(IdeficsError, TimeoutError):
    """The job has no answer yet, and goes on: ask again later."""

    code = "timeout"
    retryable = True
    http_status = 504
    public = {"": "There is no answer yet: ask again later."}


class BrokerUnavailable(IdeficsError, OperationalError, RedisConnectionError, RedisTimeoutError, ConnectionError):  # type: ignore[misc]
    """The job queue does not answer: try again later."""

    code = "broker_unavailable"
    retryable = True
    http_status = 503
    public = {"": "The service cannot be reached: try again later."}


class BrokerRefused(IdeficsError, ResponseError):
    """The job queue refuses the request: its operator has to see to it."""

    code = "broker_refused"
    public = {"": _SET_UP_WRONGLY}


class NotPermitted(BrokerRefused, NoPermissionError):
    """The job queue does not let this application do that: its operator has to grant it."""


class ConfigurationError(IdeficsError, ValueError):
    """The job queue's client is set up wrongly: its operator has to see to it."""

    code = "configuration"
    public = {"": _SET_UP_WRONGLY}


class ModelNotFound(IdeficsError, LookupError):
    """No worker serves the model that the job names: name one that the message lists, or start a worker for it."""

    code = "model_not_found"
    http_status = 404
    public = {"": "There is no such model."}

    def __init__(self, model: str = "", served: Sequence[ServedModel] = ()) -> None:
        now = f"Served now: {', '.join(map(str, served))}." if served else "No worker is running."
        super().__init__(f"No worker serves the model {model[:200]!r}. {now}")
        #: The models whose workers are alive.
        self.served = list(served)


class NotFound(IdeficsError, LookupError):
    """There is no such job, or no longer."""

    code = "not_found"
    http_status = 404


def from_broker(error: Exception) -> IdeficsError:
    """An exception of Redis or the broker as an IdeficsError that is still an error of the original kind."""
    if isinstance(error, IdeficsError):
        return error
    if isinstance(error, ResponseError):
        kind = NotPermitted if isinstance(error, NoPermissionError) else BrokerRefused
        return kind(f"Redis refuses: {error}")
    return BrokerUnavailable(f"Redis does not answer ({error}): is it up, and its URL right?")


def from_exception(error: BaseException) -> JobError:
    """The JobError for any exception that a result backend gives for a failed job.

    In a producer without the worker's classes Celery makes up a class of the same name: the code in the first argument
    identifies the error.
    """
    if isinstance(error, JobError):
        return error
    args: Sequence[Any] = error.args
    if args and isinstance(args[0], str) and args[0] in ERRORS:
        return ERRORS[args[0]](*(str(arg) for arg in args[:3] if arg is not None and len(args) > 1))
    return Internal(f"{type(error).__name__}: {error}")
