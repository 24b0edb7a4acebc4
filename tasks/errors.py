"""The errors a job can end in.

A failed job is a Celery FAILURE. Its exception's class name and its first argument, the code, are stable:
build on them. The second argument is a sentence that tells the cure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .payloads import Result

#: Under this name the producers' wheel installs this module, so that Celery finds the classes there.
PUBLIC_MODULE = "idefics_jobs.errors"


class JobError(Exception):
    """A job ended without an answer. `code` is stable; `str(error)` is a sentence that tells the cure."""

    code: ClassVar[str] = "internal"
    #: The same job may succeed later: the worker retries it with back-off before it fails.
    retryable: ClassVar[bool] = False
    #: Seconds until then, where somebody said so: an image's server with Retry-After.
    retry_after_s: float | None = None

    def __init_subclass__(cls) -> None:
        cls.__module__ = PUBLIC_MODULE

    def __init__(self, *args: str) -> None:
        # Celery rebuilds an exception from its stored arguments, (code, message); our code gives the message.
        message = args[-1] if args else (self.__doc__ or self.code)
        super().__init__(self.code, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        # By code: in a checkout the class is not importable under its public name.
        return _from_code, self.args


def _from_code(code: str, message: str) -> JobError:
    return ERRORS[code](message)


class InvalidRequest(JobError):
    """The payload breaks the contract: correct the field that the message names and send it again."""

    code = "invalid_request"


class PromptTooLong(JobError):
    """The prompt has more tokens than the worker allows: shorten it or raise IDEFICS_MAX_PROMPT_TOKENS."""

    code = "prompt_too_long"


class ImageBlocked(JobError):
    """The operator's policy forbids this image's address: use a public http(s) URL or a data: URI."""

    code = "image_blocked"


class ImageUnreachable(JobError):
    """The image could not be downloaded in time: check that its server is up, then send the job again."""

    code = "image_unreachable"
    retryable = True


class ImageTooLarge(JobError):
    """The image has too many bytes or pixels: send a smaller one."""

    code = "image_too_large"


class ImageInvalid(JobError):
    """The bytes are no JPEG, PNG, WebP or GIF image that can be decoded: send the picture in one of these."""

    code = "image_invalid"


class OutOfMemory(JobError):
    """The device has not enough memory for this job: send fewer images, a shorter prompt or fewer beams."""

    code = "out_of_memory"
    retryable = True


class DeadlineExceeded(JobError):
    """The job did not finish in its time: give it a longer deadline or add workers."""

    code = "deadline_exceeded"


class WorkerLost(JobError):
    """The model process died with this job each time it ran: look at the worker's log for the reason."""

    code = "worker_lost"
    retryable = True


class Internal(JobError):
    """The worker has a defect: report it with the traceback in the worker's log."""

    code = "internal"


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


class JobCanceled(Exception):
    """The job was canceled before it had an answer: submit it again if you still want one."""

    code: ClassVar[str] = "canceled"

    def __init__(self, message: str = "", partial: Result | None = None) -> None:
        super().__init__(message or self.__doc__)
        #: What it had said when it ended; None where its model had not begun.
        self.partial = partial


class QueueFull(Exception):
    """The broker has no room for the job, which was not queued: submit it later, or add workers."""

    code: ClassVar[str] = "queue_full"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)
        #: The jobs that `submit_many` had queued before.
        self.submitted: list[Any] = []


def from_exception(error: BaseException) -> JobError:
    """Any exception that a result backend gives for a failed job, as one of ours.

    Celery cannot import a worker's classes in every producer and then makes up a class of the same name: the
    code in the first argument tells which of ours it was.
    """
    if isinstance(error, JobError):
        return error
    args: tuple[Any, ...] = error.args
    if args and isinstance(args[0], str) and args[0] in ERRORS:
        return ERRORS[args[0]](*(str(arg) for arg in args[1:2]))
    return Internal(f"{type(error).__name__}: {error}")
