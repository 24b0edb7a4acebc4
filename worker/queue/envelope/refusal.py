"""Refusals: why a message is no job, and what its sender can do. Their texts repeat nothing of the message."""

from __future__ import annotations

NO_ENVELOPE = "The message is no envelope of Celery's: send it with Celery."
UNREADABLE = "The message cannot be decoded: send JSON, as Celery's serializer 'json' does."
NO_TASK = "The message is no task of Celery's: send it with Celery."
NO_BODY = "The body is not [args, kwargs, links]: send a list of arguments and an object of keyword arguments."


class Refused(Exception):
    """A message that is no job. The text tells its sender the cure and repeats nothing of the message."""

    def __init__(self, why: str, id: str | None = None) -> None:
        super().__init__(why)
        #: The job's, where one is known: it ends as `invalid_request`.
        self.id = id


def require(holds: bool, why: str) -> None:
    """Raises Refused where a rule does not hold."""
    if not holds:
        raise Refused(why)


def shown(name: str) -> str:
    """The start of a name that its sender chose, escaped, for a refusal's text."""
    return ascii(name[:40])
