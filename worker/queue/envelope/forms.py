"""The forms that values of headers, properties and options must have: each with its check and its wording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from worker.queue.envelope import fields
from worker.queue.envelope.bounds import MAX_DELAY_S, MAX_ID_CHARS, MAX_LABEL_CHARS, MAX_RETRIES


# Compared by identity: a message has a dozen fields, and dataclasses compare by tuples that they make each time.
@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """What a value must be."""

    holds: fields.Check
    #: Follows "must be" in a refusal, for producers with and without Celery.
    words: str


def one_of(*values: Any) -> Form:
    return Form(fields.is_one_of(*values), f"one of {', '.join(map(str, values))}")


_ISO = 'ISO 8601 in UTC or with an offset, for example "2030-12-31T23:59:59+00:00"'
_DAYS = MAX_DELAY_S // 86_400

ID = Form(fields.is_id, f"a text of printable ASCII, 1 to {MAX_ID_CHARS:,} characters long")
LABEL = Form(fields.is_label, f"a text of printable characters, at most {MAX_LABEL_CHARS}")
TASK = Form(
    lambda value: fields.is_label(value) and value != "", f"a task's name, at most {MAX_LABEL_CHARS} characters"
)
TEXT = Form(fields.is_any_text, "a text")
ADDRESS = Form(fields.is_address, f"a text of printable ASCII, at most {MAX_ID_CHARS:,} characters")
FLAG = Form(fields.is_flag, "true or false")
COUNT = Form(fields.is_count, f"a whole number from 0 to {MAX_RETRIES - 1}")
INDEX = Form(fields.is_index, "a whole number from 0 on")
PRIORITY = Form(fields.is_priority, "a whole number from 0 to 9")
DUE_TIME = Form(fields.is_due_time, f"{_ISO}, at most {_DAYS} days from now")
MOMENT = Form(fields.is_moment, f"{_ISO}, before the year 3000")
EXPIRY = Form(fields.is_expiry, f"seconds from now, a number, or {_ISO}")
UNIX_SECONDS = Form(fields.is_seconds, "unix seconds, a number: not milliseconds, and not a text")
SECONDS = Form(fields.is_seconds, "seconds, a number from 0 on")
DELAY = Form(fields.is_delay, f"seconds, a number of at most {_DAYS} days")
LIMITS = Form(fields.is_limits, "[hard, soft], each a number of seconds or null")
QUEUE = Form(fields.is_queue, "one of your own plain queues")
EXCHANGE = Form(fields.is_exchange, "the exchange of one of your own plain queues, or empty")
RETRY_POLICY = Form(fields.is_retry_policy, "Celery's retry_policy, its numbers from 0 to 100")
