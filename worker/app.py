"""The Celery app and its six tasks. `celery -A worker.app worker` starts a worker with the settings' defaults.

This module is imported by Celery's parent process too, which never loads torch: the tasks' bodies run in the
model process, which hands its service over with `serve_with`.
"""

from __future__ import annotations

import logging
import random
from typing import Any, NoReturn

from celery import Celery, Task
from celery.exceptions import Ignore
from celery.signals import setup_logging

from config.celery import configuration
from config.logging import configure
from config.settings import load
from tasks.errors import Internal, InvalidRequest, JobError
from tasks.failed import Bounds
from tasks.payloads import DEFAULT_PRIORITY, PAYLOADS, QUEUE, SUBMITTED_AT, parse
from worker.failed import keep_failures
from worker.pool import SoftShutdown
from worker.service import Canceled, Service, Ticket
from worker.transport import use as use_atomic_take

logger = logging.getLogger(__name__)

settings = load()
if settings.atomic_take:
    use_atomic_take()
app = Celery("idefics", set_as_current=False)
app.conf.update(configuration(settings, QUEUE, DEFAULT_PRIORITY))
app.steps["worker"].add(SoftShutdown)
keep_failures(app, Bounds(settings.failed_max, settings.failed_max_bytes, settings.failed_ttl_s))

_service: Service | None = None


def serve_with(service: Service) -> None:
    """Let the tasks of this process run on a service."""
    global _service
    _service = service


@setup_logging.connect(weak=False)  # type: ignore[untyped-decorator]
def _set_up_logging(**_: Any) -> None:
    configure(settings.log_level)


class JobCanceled(Ignore):  # type: ignore[misc]
    """Leaves the job's state to the parent process, which revokes it."""


class JobTask(Task):  # type: ignore[misc]
    """One of the six: its name says which payload its keyword arguments are."""

    abstract = True
    # Logs and events say that a job succeeded, and not what it answered.
    resultrepr_maxsize = 0

    def run(self, *args: Any, **arguments: Any) -> dict[str, Any]:
        try:
            if args:
                raise InvalidRequest(
                    "The task takes keyword arguments only. In a chain, make it immutable: signature.si(...)."
                )
            return self._answer(arguments)
        except Canceled as canceled:
            raise JobCanceled from canceled
        except JobError as error:
            if error.retryable:
                self._retry(error)
            raise
        except Exception as error:
            logger.exception("Job %s hit a defect; it fails as internal.", self.request.id)
            raise Internal(f"{type(error).__name__} in the worker: its log has the traceback.") from None

    def _answer(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if _service is None:
            raise Internal("This process holds no model: start the worker with `celery -A worker.app worker`.")
        request = self.request
        ticket = Ticket(
            id=request.id,
            priority=(request.delivery_info or {}).get("priority") or 0,
            submitted_at=request.get(SUBMITTED_AT),
            soft_limit_s=(request.timelimit or [None, None])[1] or self.soft_time_limit,
        )
        return _service.run(parse(self.name, arguments), ticket).model_dump(mode="json")

    def _retry(self, error: JobError) -> NoReturn:
        delay = settings.retry_backoff_s * 2**self.request.retries
        raise self.retry(
            exc=error,
            countdown=delay * random.uniform(0.5, 1.0),  # noqa: S311 - jitter, not a secret
            max_retries=settings.max_retries,
        )


for _name, _payload in PAYLOADS.items():
    app.register_task(type(_payload.__name__, (JobTask,), {"name": _name, "__doc__": _payload.__doc__})())
