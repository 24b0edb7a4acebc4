"""The error for a message that is not a job, and its texts. The texts repeat nothing of the message.

The other modules of this package check and raise; `worker/queue/refusals.py` ends what is refused.
"""

from __future__ import annotations

NO_ENVELOPE = (
    "The message is not in Celery's form: send a JSON object with body, headers and properties, as Celery does or as "
    "examples/wire shows."
)
UNREADABLE = "The message cannot be decoded: send JSON, as Celery's serializer 'json' does."
NO_TASK = "The message names no task: send the header task, for example idefics.caption."
NO_BODY_TEXT = "The body cannot be read: send it in base64 with properties.body_encoding base64, or as JSON without."
NO_BODY = (
    "The body is not [args, kwargs, links]: send a list of arguments, an object of keyword arguments and an object of "
    'links, for example [[], {"image": "https://..."}, {}].'
)


class MessageRefused(Exception):
    """A message is not a job. The text has the cure for its sender, and repeats nothing of the message."""

    def __init__(self, why: str, id: str | None = None) -> None:
        super().__init__(why)
        #: The job's, where one is known: it ends as `invalid_request`.
        self.id = id


def require(holds: bool, why: str) -> None:
    """Raises MessageRefused where a rule does not hold."""
    if not holds:
        raise MessageRefused(why)


def shown(name: str) -> str:
    """The start of a name that its sender chose, escaped, for a refusal's text."""
    return ascii(name[:40])


def described(raw: bytes, refused: MessageRefused) -> str:
    """A message that is dropped, for a line of the log: its failure is stored under the id."""
    return f"Message {refused.id!a} of {len(raw)} bytes" if refused.id else f"A message of {len(raw)} bytes"
