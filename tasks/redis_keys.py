"""Every key in the two Redis databases: its type, its TTL, its writers and readers, and its meaning.

All code takes names of keys from here. Kombu and Celery put an app's prefix before their own keys, and we before ours,
so that two deployments can share a database; `results_prefix` and `broker_prefix` read it from the app's options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from celery import Celery

#: `queues` is the broker's database, 0; `results` that of the answers, 1 (IDEFICS_BROKER_URL, IDEFICS_RESULT_BACKEND).
Database = Literal["queues", "results"]
Type = Literal["string", "list", "hash", "set", "zset", "stream"]
#: The users of config/redis/users.acl.template. The operator's commands run with the worker's rights.
User = Literal["producer", "worker", "callbacks", "monitor", "exporter"]

_PLACEHOLDER = re.compile(r"\{\w+\}")


@dataclass(frozen=True, slots=True)
class RedisKey:
    """A kind of key."""

    #: Placeholders in braces stand for the parts that differ among keys of this kind.
    pattern: str
    database: Database
    type: Type
    #: Its TTL, in seconds or by a setting. None: it has no TTL, for the reason in `meaning`.
    ttl: str | None
    writers: tuple[User, ...]
    readers: tuple[User, ...]
    meaning: str

    @property
    def prefix(self) -> str:
        """The pattern up to its first placeholder: the whole name of a key without one."""
        return self.pattern.partition("{")[0]

    def named(self, *parts: str) -> str:
        """The name of one key, without the app's prefix: `parts` replace the placeholders."""
        rest = iter(parts)
        return _PLACEHOLDER.sub(lambda _: next(rest), self.pattern)

    def matches(self, name: str) -> bool:
        """Whether a name without the app's prefix is of this kind."""
        return fnmatchcase(name, _PLACEHOLDER.sub("?*", self.pattern))


def _of_callbacks(part: str, type: Type, ttl: str, meaning: str) -> RedisKey:
    writers: tuple[User, ...] = ("worker", "callbacks")
    return RedisKey(
        f"idefics:callbacks:{part}", "queues", type, ttl, writers, (*writers, "monitor", "exporter"), meaning
    )


def _of_failed(part: str, type: Type, meaning: str) -> RedisKey:
    readers: tuple[User, ...] = ("worker",) if part else ("worker", "monitor", "exporter")
    return RedisKey(f"idefics:failed{part}", "results", type, "IDEFICS_FAILED_TTL_S", ("worker",), readers, meaning)


def _of_review(part: str, type: Type, meaning: str) -> RedisKey:
    return _for_workers(f"idefics:review{part}", type, "IDEFICS_REVIEW_TTL_S", meaning, "results")


def _for_workers(pattern: str, type: Type, ttl: str | None, meaning: str, database: Database = "queues") -> RedisKey:
    """A key that workers alone use, and operators' commands with their rights."""
    return RedisKey(pattern, database, type, ttl, ("worker",), ("worker",), meaning)


def _of_workers(part: str, type: Type, ttl: str, meaning: str) -> RedisKey:
    readers: tuple[User, ...] = ("producer", "worker", "monitor", "exporter")
    return RedisKey(f"idefics:worker:{part}", "queues", type, ttl, ("worker",), readers, meaning)


def _of_campaigns(part: str, type: Type, meaning: str) -> RedisKey:
    users: tuple[User, ...] = ("producer", "worker")
    return RedisKey(f"idefics:campaign:{part}", "queues", type, "604800", users, (*users, "monitor"), meaning)


# The queues' database: Celery's and kombu's keys

QUEUE_LIST = RedisKey(
    "{queue}",
    "queues",
    "list",
    None,
    ("producer", "worker", "callbacks"),
    ("producer", "worker", "callbacks", "monitor", "exporter"),
    "Waiting messages of priority 0. Permanent: they are jobs.",
)
PRIORITY_LIST = replace(
    QUEUE_LIST,
    pattern="{queue}{separator}{priority}",
    meaning="Waiting messages of another priority. Permanent: they are jobs.",
)
UNACKED = RedisKey(
    "unacked", "queues", "hash", None, ("worker",), ("worker", "monitor", "exporter"),
    "Messages that a worker has taken and not acknowledged, by tag. Permanent: they are jobs.",
)  # fmt: skip
UNACKED_INDEX = RedisKey(
    "unacked_index", "queues", "zset", None, ("worker",), ("worker", "monitor"),
    "Tags of the messages in `unacked`, by the time of their worker's last renewal. Permanent: they belong to jobs.",
)  # fmt: skip
UNACKED_MUTEX = _for_workers(
    "unacked_mutex",
    "string",
    "the time between two sweeps, twice at most",
    "Lock of the worker that sweeps for messages of silent workers.",
)
BINDING = RedisKey(
    "_kombu.binding.{exchange}",
    "queues",
    "set",
    None,
    ("producer", "worker", "callbacks", "monitor"),
    ("worker", "callbacks", "monitor"),
    "Queues of an exchange. Permanent: kombu declares them once.",
)
PERMANENT_BINDING = replace(
    BINDING,
    pattern="_kombu.binding_permanent.{exchange}",
    meaning="Queues of an exchange that do not expire. Permanent: kombu declares them once.",
)
BINDING_DEADLINES = RedisKey(
    "_kombu.binding_deadlines",
    "queues",
    "zset",
    None,
    ("worker", "callbacks", "monitor"),
    ("worker", "callbacks", "monitor"),
    "Bindings of queues that expire, by the time of expiry. Permanent: kombu removes its members.",
)
MAILBOX_REPLY = RedisKey(
    "{id}.reply.{mailbox}.pidbox", "queues", "list", "10", ("worker", "callbacks"), ("worker", "callbacks"),
    "Replies to Celery's remote control (`inspect`, `control`).",
)  # fmt: skip
EVENT_QUEUE = RedisKey(
    "celeryev.{id}", "queues", "list", "60", ("worker", "callbacks", "monitor"), ("worker", "callbacks", "monitor"),
    "Events for one receiver, if they are not published.",
)  # fmt: skip

# The queues' database: ours

DUE = RedisKey(
    "idefics:due:{list}",
    "queues",
    "zset",
    None,
    ("worker",),
    ("worker", "monitor", "exporter"),
    "Messages of a queue's list that wait for their `eta` or `countdown`, by due time. Permanent: they are jobs.",
)
DUE_IDS = _for_workers(
    "idefics:due-ids",
    "zset",
    None,
    "Ids of the jobs in `idefics:due:{list}`, by due time: finds canceled jobs. Permanent: they belong to jobs.",
)
REDELIVERIES = _for_workers(
    "idefics:redeliveries:{id}",
    "hash",
    "7 days beyond the visibility timeout",
    "A job's redeliveries after deaths of workers, by its retries (worker/queue/redeliveries.py).",
)
LOAD = _for_workers(
    "idefics:load:{queue}",
    "hash",
    "5",
    "The loads of a queue's workers, while one is busy (worker/queue/load_balancing.py).",
)
HOST_SLOTS = _for_workers(
    "idefics:host:{digest}",
    "hash",
    "5, or until the host may be asked again: IDEFICS_IMAGE_RETRY_AFTER_MAX_S at most",
    "An image host's slots that workers have leased, by worker, and the time until which the host wants no requests "
    "(worker/images/host_leases.py).",
)
WORKER_OPTIONS = RedisKey(
    "idefics:worker:options",
    "queues",
    "string",
    "30",
    ("worker",),
    ("producer", "worker"),
    "Options by which workers read messages, and a fingerprint of the results' address. Has no prefix, since a client "
    "may have the wrong one.",
)
WORKERS = _of_workers(
    "queue:{queue}", "zset", "30", "The workers that take from a queue, by the time when each last registered."
)
WORKER_STATUS = _of_workers(
    "status:{worker}",
    "string",
    "30",
    "A worker's state and recent work, for `idefics-jobs top` (tasks/worker_status.py).",
)
MODELS = _of_workers(
    "models",
    "zset",
    "86400",
    "The models that workers serve, each with its queue, by the second at which a worker last said so.",
)
CAMPAIGN_ABOUT = _of_campaigns(
    "about:{id}", "hash", "A campaign's names, host and progress, which its producer renews every few seconds."
)
CAMPAIGN_WANTED = _of_campaigns(
    "wanted:{id}",
    "string",
    "`paused` or `canceled`, and since when: what a campaign's users want. Absent if it is to run. Renewed with its "
    "record.",
)
CAMPAIGN_INDEX = _of_campaigns("index", "zset", "The newest 1,000 campaigns, by the time of their last report.")
DELIVERY = _of_callbacks(
    "delivery:{id}", "hash", "30 days, then IDEFICS_CALLBACK_KEEP_S", "A callback's event, URL, state and attempts."
)
PENDING_DELIVERIES = _of_callbacks(
    "pending:{host}", "zset", "30 days", "A host's pending deliveries, by the time of their next attempt."
)
DELIVERY_AGES = _of_callbacks(
    "ages:{host}", "zset", "30 days", "A host's pending deliveries, by the time when they were added."
)
DELIVERY_HOSTS = _of_callbacks(
    "hosts", "zset", "30 days", "Hosts with pending deliveries, by the time of their next attempt."
)
OLDEST_DELIVERIES = _of_callbacks(
    "oldest", "zset", "30 days", "Hosts with pending deliveries, by the age of their oldest one."
)
DELIVERED = _of_callbacks(
    "delivered", "zset", "IDEFICS_CALLBACK_KEEP_S", "Successful deliveries, by the time of their end."
)
UNDELIVERED = _of_callbacks("failed", "zset", "IDEFICS_CALLBACK_KEEP_S", "Failed deliveries, by the time of their end.")
DISABLED_URLS = _of_callbacks(
    "disabled",
    "zset",
    "IDEFICS_CALLBACK_DISABLED_S",
    "URLs that answered 410, by the time until which they get no callbacks.",
)
DELIVERY_SIZES = _of_callbacks(
    "sizes",
    "hash",
    "30 days",
    "By delivery: its bytes, and the account that they count for (its host while it is pending, else its state).",
)
DELIVERY_BYTES = _of_callbacks(
    "bytes", "hash", "30 days", "Bytes by account, the sum of all hosts, and the number of deliveries that did not fit."
)

# The results' database

RESULT = RedisKey(
    "celery-task-meta-{id}",
    "results",
    "string",
    "IDEFICS_RESULT_TTL_S",
    ("worker",),
    ("producer", "worker"),
    "A job's state and its answer or error, in Celery's form. It is also published on the channel of this name.",
)
GROUP = RedisKey(
    "celery-taskset-meta-{id}",
    "results",
    "string",
    "IDEFICS_RESULT_TTL_S",
    ("producer", "worker"),
    ("producer", "worker"),
    "A group's members, in Celery's form. With `.s`, `.t` or `.c` after the id: a chord's counters and its lock.",
)
CHORD_RESULTS = RedisKey(
    "celery-taskset-meta-{id}.j",
    "results",
    "zset",
    "IDEFICS_RESULT_TTL_S",
    ("producer", "worker"),
    ("worker",),
    "The results of a chord's parts that have ended.",
)
CHORD_PARTS = replace(
    CHORD_RESULTS,
    pattern="celery-taskset-meta-{id}.d",
    type="set",
    meaning="The ids of a chord's parts that have ended: a part that runs twice counts once.",
)
CANCELLATION = RedisKey(
    "idefics:cancel:{id}",
    "results",
    "string",
    "32 days",
    ("producer",),
    ("worker",),
    "While it exists, the job does not start, and ends if it runs. Setting it needs no access to Celery's mailbox.",
)
IDEMPOTENCY = replace(
    GROUP,
    pattern="idefics:key:{sha256}",
    ttl="IDEFICS_IDEMPOTENCY_TTL_S",
    meaning="The job of a queue's idempotency key (tasks/idempotency.py).",
)
UPDATES = replace(
    RESULT,
    pattern="idefics:updates:{id}",
    type="stream",
    ttl="3600",
    readers=("producer", "worker", "monitor"),
    meaning="Stages and text of a job with `stream`: 5,000 entries at most (worker/jobs/live_updates.py).",
)
ANSWER = _for_workers(
    "idefics:answer:{digest}",
    "string",
    "IDEFICS_ANSWER_CACHE_TTL_S",
    "An answer that is reused for identical jobs (worker/jobs/answer_cache.py).",
    "results",
)
RESULTS_FINGERPRINT = RedisKey(
    "idefics:worker:results",
    "results",
    "string",
    "30",
    ("worker",),
    ("producer", "worker"),
    "The fingerprint in `idefics:worker:options`: without it, this is not the database that workers write results to.",
)
FAILED = _of_failed("", "zset", "Ids of failed jobs, by the time of failure.")
FAILED_INVALID = _of_failed(":invalid", "zset", "Ids of failed invalid requests, which are dropped first.")
FAILED_ABOUT = _of_failed(":about", "hash", "Summaries of failed jobs, by id.")
FAILED_SIGNATURES = _of_failed(":signatures", "hash", "Whole failed jobs, by id, to be sent again.")
FAILED_BYTES = _of_failed(":bytes", "string", "The bytes of both hashes.")
REVIEW = _of_review("", "zset", "Ids of jobs whose doubtful answers wait for a person, by time (tasks/review).")
REVIEW_DECIDED = _of_review(":decided", "zset", "Ids of those that a person has decided, by the time of the decision.")
REVIEW_UNDOABLE = _of_review(":undoable", "zset", "Of them, those that may still be undone: their pictures are kept.")
REVIEW_UNSENT = _of_review(":unsent", "zset", "Of them, those whose callbacks may not be in the outbox yet.")
REVIEW_ITEMS = _of_review(":items", "hash", "Doubtful answers, by id.")
REVIEW_PICTURES = _of_review(":pictures", "hash", "Small JPEG copies of their pictures, by id.")
REVIEW_DECISIONS = _of_review(":decisions", "hash", "Decisions, by id.")
REVIEW_BYTES = _of_review(":bytes", "string", "The bytes of the three hashes.")

#: All of them, in this order.
REDIS_KEYS = tuple(value for value in list(globals().values()) if isinstance(value, RedisKey))

#: Kombu's keys, Celery's and ours.
_NOT_QUEUES = re.compile(r"unacked|idefics:|idefics\.callbacks|celery-task(set)?-meta|celeryev|.*pidbox")


def is_no_queue(name: str) -> bool:
    """True for names that a queue must not have: a message sent there would overwrite a key of another kind."""
    return _NOT_QUEUES.match(name) is not None


#: Kombu's default separator before a priority's number in the name of a queue's list.
SEPARATOR = "\x06\x16"
#: The separator that Celery's guide to priorities on Redis recommends.
GUIDES_SEPARATOR = ":"
#: Kombu's default: each number has a list, for the priorities up to the next number.
STEPS = (0, 3, 6, 9)
#: The workers' and the client's default: each priority has its own list.
OUR_STEPS = tuple(range(10))


def results_prefix(app: Celery) -> str:
    """The prefix of all keys in the results' Redis."""
    prefix = str((app.conf.result_backend_transport_options or {}).get("global_keyprefix") or "")
    # As Celery's backends do.
    return prefix if not prefix or prefix[-1] in ":_-." else f"{prefix}_"


def broker_prefix(app: Celery) -> str:
    """The prefix of all keys in the queues' Redis."""
    return str(_broker(app).get("global_keyprefix") or "")


def separator(app: Celery) -> str:
    """The separator before a priority's number in the names of the lists that an app sends to."""
    return str(_broker(app).get("sep") or SEPARATOR)


def steps(app: Celery) -> tuple[int, ...]:
    """The priorities that an app has lists for."""
    return tuple(_broker(app).get("priority_steps") or STEPS)


def list_name(queue: str, step: int, sep: str) -> str:
    """The name of a queue's list for a priority, as kombu builds it."""
    return f"{queue}{sep}{step}" if step else queue


def _broker(app: Celery) -> dict[str, Any]:
    return dict(app.conf.broker_transport_options or {})
