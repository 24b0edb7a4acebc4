"""A message of the queue: untrusted bytes become a checked envelope, or a refusal with the cure.

`opened` reads the outer JSON, as kombu writes it. `checked` reads a job in it: headers, body and links, in the forms
that Celery's own producers send. Both are pure. They raise only MessageRefused, even where the message makes Python
raise RecursionError or MemoryError.

What is checked here is not checked again: Celery's tracer, the pool and the engine compute with it.
"""

from worker.queue.envelope.bounds import MAX_DELAY_S
from worker.queue.envelope.errors import NO_ENVELOPE, NO_TASK, UNREADABLE, MessageRefused, described
from worker.queue.envelope.fields import unix_seconds, usable_id
from worker.queue.envelope.headers import RESERVED
from worker.queue.envelope.job import Envelope, checked, readable
from worker.queue.envelope.outer import given_back, opened, returned_job

__all__ = [
    "MAX_DELAY_S",
    "NO_ENVELOPE",
    "NO_TASK",
    "RESERVED",
    "UNREADABLE",
    "Envelope",
    "MessageRefused",
    "checked",
    "described",
    "given_back",
    "opened",
    "readable",
    "returned_job",
    "unix_seconds",
    "usable_id",
]
