"""Defects in each process of a worker, for IDEFICS_SETUP: jobs meet them by the beginning of their ids."""

from __future__ import annotations

from typing import Any

from worker.observability import sentry

#: In the errors' messages, as a prompt or a URL would be.
SECRET = "s3cr3t"


def set_up(process: str) -> None:
    """Have this process hit a defect at the jobs whose ids begin with its name."""
    {"parent": _break_sending, "model": _break_running, "callbacks": _break_posting}[process]()


def set_up_with_sentry(process: str) -> None:
    """The same, with Sentry."""
    sentry.set_up(process)
    set_up(process)


def _break_sending() -> None:
    from worker.pool import lifecycle

    sendable = lifecycle.sendable

    def broken(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        _hit(arguments[1], "parent")
        return sendable(arguments)

    lifecycle.sendable = broken


def _break_running() -> None:
    from worker.jobs.service import Service

    run = Service.run

    def broken(self: Service, job: Any, context: Any) -> Any:
        _hit(context.id, "model")
        return run(self, job, context)

    Service.run = broken  # type: ignore[method-assign]


def _break_posting() -> None:
    from worker.delivery.sender import Sender

    post = Sender.post

    def broken(self: Sender, delivery: Any) -> Any:
        _hit(delivery.job, "callbacks")
        return post(self, delivery)

    Sender.post = broken  # type: ignore[method-assign]


def _hit(id: str, process: str) -> None:
    if id.startswith(process):
        raise LookupError(f"https://example.com/?{SECRET}")
