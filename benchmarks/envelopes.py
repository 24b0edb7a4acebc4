"""Whole Celery messages, broken at every level: `python -m benchmarks.envelopes --save envelopes`.

They are written into a real worker's queue without checks. After each batch the worker must answer a plain job, each
message with an id of its own must have ended, no message may be left in the queue or unacknowledged, and the memory of
the worker's parent process must be bounded.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import copy
import json
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from celery import states
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks import fuzz, measures
from tasks import Client, Complete
from tasks.payloads import PAYLOADS
from tasks.protocol import QUEUE
from worker.demo import stack

ENVELOPES, BATCH = 20_000, 500
#: Seconds that a batch may take until all of it has ended.
PATIENCE_S = 60.0
#: Megabytes that the parent process may grow by. Its allocator keeps what the largest messages took.
MOST_GROWTH_MB = 150
#: How the ids begin that no other message has.
MARK = "fuzzed-"

# --- Messages -------------------------------------------------------------------------------------

_DEEP: Any = 0
for _ in range(480):
    _DEEP = [_DEEP]


def _typed(kind: str, value: Any) -> dict[str, Any]:
    return {"__type__": kind, "__value__": value}


#: What has broken a worker, or might.
HOSTILE: list[Any] = [
    _DEEP,
    *(_typed("decimal", value) for value in ("abc", "1e999999999")),
    *(_typed(kind, "a") for kind in ("datetime", "date", "uuid", "bytes", "base64", "x")),
    *(_typed("uuid", {}), {"__type__": [], "__value__": 1}),
    *("\ud800", "\x1b[2J", "a\nb", "\u202e", "x" * 2_000, "", "unacked_mutex", "idefics:callbacks:due", "celery"),
    *(2**62, 10**30, -1, 1e308, float("nan"), float("inf"), True, None, [], {}, [[]], {"": None}),
    *("2099-01-01T00:00:00", "9999-12-31T23:59:59-23:59", "2020-01-01T00:00:00+00:00", "soon"),
]


def _mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Not at a bound of the integers: those are drawn more often."""
    return st.integers(0, 30).flatmap(lambda number: bad if number == 7 else good)


JUNK: st.SearchStrategy[Any] = st.sampled_from(HOSTILE).map(copy.deepcopy) | fuzz.JUNK

_TASKS = ["shop.save", "shop.tell", *PAYLOADS]
_BUILT_IN = [f"celery.{name}" for name in ("accumulate", "chord_unlock", "map", "starmap", "chunks", "group", "chord")]
_NO_QUEUES = ["unacked", "unacked_mutex", "_kombu.binding.idefics", "idefics.callbacks", "idefics:x"]
_QUEUES = _mostly(st.sampled_from(["celery", "shop"]), st.sampled_from(_NO_QUEUES))
_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "task_id": st.uuids().map(str),
    "group_id": st.uuids().map(str),
    "queue": _QUEUES,
    "routing_key": _QUEUES,
    "exchange": _QUEUES,
    "priority": _mostly(st.integers(0, 9), JUNK),
    "countdown": _mostly(st.sampled_from([0, 1, -1]), st.just(10**7)),
    "serializer": _mostly(st.just("json"), st.just("pickle")),
    "headers": st.dictionaries(_mostly(st.just("a"), st.sampled_from(["id", "task", "chain"])), fuzz.TEXTS),
    "stamped_headers": _mostly(st.just([]), st.lists(st.sampled_from(["a", "queue", "link"]), max_size=2)),
    "retry": st.booleans(),
}


@st.composite
def _leaves(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.sets(st.sampled_from(sorted(_OPTIONS)), max_size=2))
    return {
        "task": draw(_mostly(st.sampled_from(_TASKS), st.sampled_from(_BUILT_IN))),
        "args": draw(st.lists(st.integers(), max_size=2)),
        "kwargs": draw(st.dictionaries(st.just("a"), _mostly(fuzz.TEXTS, JUNK), max_size=1)),
        "options": {name: draw(_OPTIONS[name]) for name in sorted(names)},
        "subtask_type": None,
        "immutable": draw(st.booleans()),
    }


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Canvases of signatures, and signatures with links."""
    many = st.lists(inner, min_size=1, max_size=3)

    def canvas(kind: str) -> st.SearchStrategy[Any]:
        kwargs = st.fixed_dictionaries({"header": many, "body": inner} if kind == "chord" else {"tasks": many})
        plain = {"args": [], "options": {}, "subtask_type": kind, "immutable": False}
        return kwargs.map(lambda chosen: {"task": f"celery.{kind}", "kwargs": chosen, **plain})

    linked = st.tuples(_leaves(), st.sampled_from(["link", "link_error"]), many)
    return st.one_of(
        *map(canvas, ("chain", "group", "chord")),
        linked.map(lambda parts: {**parts[0], "options": {**parts[0]["options"], parts[1]: parts[2]}}),
    )


SIGNATURES = st.recursive(_leaves(), _nested, max_leaves=6)
LINKS = st.one_of(st.none(), st.none(), st.none(), st.lists(SIGNATURES, max_size=3))

_HEADERS: dict[str, st.SearchStrategy[Any]] = {
    "eta": _mostly(st.sampled_from([None, "2020-01-01T00:00:00+00:00"]), st.just("2099-01-01T00:00:00")),
    "expires": st.sampled_from([None, "2020-01-01T00:00:00+00:00", "2099-01-01T00:00:00"]),
    "group": st.uuids().map(str),
    "group_index": st.integers(0, 5),
    "shadow": fuzz.TEXTS,
    "root_id": st.uuids().map(str),
    "timelimit": _mostly(st.sampled_from([[None, None], [60, 30], [0.001, None]]), st.sampled_from([[1], ["1", 2]])),
    "stamped_headers": st.just(["a"]),
    "stamps": st.just({"a": "b"}),
    "headers": st.dictionaries(fuzz.TEXTS, JUNK, max_size=2),
    "compression": _mostly(st.none(), st.sampled_from(["gzip", "bzip2", "xz", "application/x-gzip"])),
    "redelivered": st.booleans(),
    "idefics_submitted_at": st.just(time.time()),
    "x-trace": JUNK,
    **{name: _mostly(st.none(), JUNK) for name in ("chain", "chord", "callbacks", "_children", "is_eager")},
}


@st.composite
def _plain(draw: st.DrawFn) -> dict[str, Any]:
    """A message whose parts are each in something like their form, its body not encoded yet."""
    # Not drawn: hypothesis likes the same ones.
    id = MARK + uuid.uuid4().hex + "x" * draw(st.sampled_from([0, 0, 0, 200, 900]))
    names = draw(st.sets(st.sampled_from(sorted(_HEADERS)), max_size=3))
    task, kwargs = draw(_mostly(st.just(("idefics.complete", {"prompt": ["Hello"], "max_new_tokens": 2})), fuzz.jobs()))
    task = draw(_mostly(st.just(task), st.sampled_from(_BUILT_IN)))
    # The fake model's prompts are texts: no job of these waits for a network.
    embed: dict[str, Any] = {name: draw(LINKS) for name in ("callbacks", "errbacks", "chain")}
    embed["chord"] = draw(st.one_of(st.none(), st.none(), st.none(), SIGNATURES))
    headers: dict[str, Any] = {"lang": "py", "task": task, "id": id, "retries": 0, "timelimit": [None, None]}
    body: Any = [[], kwargs, embed]
    if draw(st.integers(0, 30)) == 7:
        body = {"task": task, "id": id, "args": [], "kwargs": kwargs, **embed}
        headers = {}
    return {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {**headers, **{name: draw(_HEADERS[name]) for name in sorted(names)}},
        "properties": {
            "body_encoding": "base64",
            "priority": draw(st.integers(0, 9)),
            "delivery_tag": "tag",
            "delivery_info": {"exchange": "", "routing_key": draw(st.sampled_from(["idefics", "unacked"]))},
        },
    }


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Each container of a message with each of its keys."""
    if depth > 12 or not isinstance(value, dict | list):
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        yield from _places(value[key], depth + 1)


def _change(draw: st.DrawFn, message: dict[str, Any]) -> None:
    """Exchange, remove or add a value anywhere."""
    places = list(_places(message))
    if not places:
        return
    container, key = places[draw(st.integers(0, len(places) - 1))]
    how = draw(st.integers(0, 5))
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[draw(fuzz.TEXTS | st.sampled_from(sorted(_HEADERS)))] = draw(JUNK)
    else:
        container[key] = draw(JUNK)


_BYTES = [b"", b"{", b"[" * 5_000, b"[[], {}, " + b"9" * 5_000 + b"]", b"\xff\xfe", b'"\\ud800"', bytes(2**20)]
_CONTENT = ["application/x-python-serialize", "application/json; x", "text/plain", None, 7]
_ENCODINGS: list[Any] = ["zlib_codec", "rot13", "utf-16", "ascii", "binary", None, []]


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message as it would lie in Redis."""
    message = copy.deepcopy(draw(_plain()))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        _change(draw, message)
    if draw(st.integers(0, 30)) == 7:
        message["content-type"] = draw(st.sampled_from(_CONTENT))
    if draw(st.integers(0, 30)) == 7:
        message["content-encoding"] = draw(st.sampled_from(_ENCODINGS))
    body = json.dumps(message.get("body"), default=str).encode()
    if draw(st.integers(0, 30)) == 7:
        body = draw(st.sampled_from(_BYTES))
    if draw(st.integers(0, 30)) == 7:
        body = zlib.compress(body) if draw(st.booleans()) else bz2.compress(body)
    if "body" in message and draw(st.integers(0, 30)) != 7:
        message["body"] = base64.b64encode(body).decode()
    raw = json.dumps(message).encode()
    if draw(st.integers(0, 30)) == 7:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.sampled_from([b"", b"\xff", b'"', b"[" * 2_000, b"{}", raw[:at]]))
    return raw


def own_id(raw: bytes) -> str | None:
    """A message's id, where it is still one of ours and its sender can expect a result."""
    try:
        message = json.loads(raw)
        headers = message["headers"] or {}
        id = headers.get("id")
        if id is None and "task" not in headers:
            if (message["content-type"], message["content-encoding"]) != ("application/json", "utf-8"):
                return None
            if message["properties"]["body_encoding"] != "base64" or headers.get("compression"):
                return None
            id = json.loads(base64.b64decode(message["body"]))["id"]
        if headers.get("ignore_result"):
            return None
        return id if isinstance(id, str) and id.startswith(MARK) and len(id) <= 1_024 else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, binascii.Error):
        return None


# --- The campaign ---------------------------------------------------------------------------------


@dataclass
class Site:
    """A worker, and who writes into its queue."""

    server: stack.Broker
    pid: int
    ends: Counter[str] = field(default_factory=Counter)
    tried: int = 0
    slowest_s: float = 0.0
    most_mb: float = 0.0

    def __post_init__(self) -> None:
        self.queues, self.results = self.server.connect(0), self.server.connect(1)
        self._client = Client(self.server.url)
        self.started_mb = self.most_mb = self._mb()

    def try_batch(self, batch: list[bytes]) -> None:
        """Raises AssertionError where the worker does not bear it."""
        started = time.monotonic()
        ids = {id: raw for raw in batch if (id := own_id(raw))}
        self.queues.lpush(QUEUE, *batch)
        assert self._client.submit(Complete(prompt=["Hello"], max_new_tokens=3)).result(timeout=PATIENCE_S).text
        self._await_ends(ids)
        self._await_nothing_left()
        # What the links became is not read by anybody here.
        self.queues.delete(
            "celery", "shop", *(f"{queue}\x06\x16{step}" for queue in ("celery", "shop") for step in range(10))
        )
        self.tried += len(batch)
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        self.most_mb = max(self.most_mb, self._mb())
        assert self.most_mb - self.started_mb < MOST_GROWTH_MB, f"{self.most_mb:.0f} MB"

    def _await_ends(self, ids: dict[str, bytes]) -> None:
        left, end = set(ids), time.monotonic() + PATIENCE_S
        while left:
            known = list(left)
            for id, record in zip(known, self.results.mget([f"celery-task-meta-{id}" for id in known]), strict=True):
                meta = json.loads(record) if record else {"status": states.PENDING}
                if meta["status"] in states.READY_STATES:
                    self.ends[_end(meta)] += 1
                    left.discard(id)
            assert time.monotonic() < end, f"{len(left)} have not ended: {ids[min(left)][:3_000]!r}"
            time.sleep(0.02)

    def _await_nothing_left(self) -> None:
        end = time.monotonic() + PATIENCE_S
        lists = [QUEUE, *(f"{QUEUE}\x06\x16{step}" for step in range(1, 10))]
        while left := sum(map(self.queues.llen, lists)) + self.queues.hlen("unacked"):
            assert time.monotonic() < end, f"{left} messages go round"
            time.sleep(0.02)

    def _mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def figures(self) -> dict[str, Any]:
        kept = redis.Redis.zcard(self.results, "idefics:failed")
        return {
            "tried": self.tried,
            "ends": dict(self.ends.most_common()),
            "dead_letters": kept,
            "slowest_batch_s": round(self.slowest_s, 1),
            "parent_mb": [round(self.started_mb), round(self.most_mb)],
        }


def _end(meta: dict[str, Any]) -> str:
    if meta["status"] != states.FAILURE:
        return str(meta["status"]).lower()
    arguments = meta["result"].get("exc_message") or ["none"]
    return str(arguments[0])


@contextmanager
def site(**worker: str) -> Iterator[Site]:
    """A worker with the fake model, alone on its Redis."""
    chosen = {"MODEL": "fake", "MAX_RETRIES": "0", **worker}
    with stack.broker() as server, stack.worker(server, settings=chosen) as process:
        yield Site(server, process.pid)


def drawn(count: int, number: int) -> list[bytes]:
    """Different messages for each number."""
    raws: list[bytes] = []

    # Without shrinking, so that all of them are tried, and each once.
    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(messages())
    def keep(raw: bytes) -> None:
        raws.append(raw)

    keep()
    return raws


def campaign(count: int = ENVELOPES, size: int = BATCH) -> dict[str, Any]:
    """Raises AssertionError at the first batch that a worker does not bear."""
    with site() as tried:
        for number in range(-(-count // size)):
            tried.try_batch(drawn(size, number))
        return tried.figures()


if __name__ == "__main__":
    measures.run(__doc__, {"envelopes": campaign})
