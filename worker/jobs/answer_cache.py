"""Answers used again: identical jobs that run at the same time share one row, and a finished one is kept in Redis.

Only where the model would say the same again: greedy, beams, labels, or a seed. Identical means the same pixels, token
ids, labels, sampling, stop strings and model, whatever tasks and URLs they came from. Kept are tokens, under
`idefics:answer:<digest>`; text, usage, timing and metadata are each job's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from tasks.payloads import ModelInfo
from worker.engine.row import Output, Row

logger = logging.getLogger(__name__)

PREFIX = "idefics:answer:"
#: Seconds between two looks of a job that waits for another's row: has it been canceled, has its deadline passed?
LOOK_S = 0.1

Compute = Callable[[Row], Output]


class AnswerCache:
    """Used from many threads at once. Without Redis it computes."""

    def __init__(self, redis: Redis, ttl_s: int, weights: str = "", prefix: str = "") -> None:
        """`weights` tells apart what the model's id and revision do not (see fingerprint); `prefix` is of all keys."""
        self._redis = redis
        self._ttl_s = ttl_s
        self._prefix = prefix + PREFIX + weights
        #: What it resolves to: the output, or None where there is none to share.
        self._running: dict[str, Future[Output | None]] = {}
        self._lock = threading.Lock()

    def output(self, row: Row, model: ModelInfo, compute: Compute) -> Output:
        """A row's output: another's where one is or was the same, else its own."""
        key = digest(row, model)
        if key is None:
            return compute(row)
        while True:
            mine: Future[Output | None] = Future()
            with self._lock:
                running = self._running.setdefault(key, mine)
            if running is mine:
                return self._lead(key, mine, row, compute)
            output = _follow(running, row)
            if output is not None:
                return _reused(row, output)
            if row.interruption(time.monotonic()):
                # The engine knows what such a row gets.
                return compute(row)

    def _lead(self, key: str, mine: Future[Output | None], row: Row, compute: Compute) -> Output:
        shared: Output | None = None
        try:
            shared = self._kept(key)
            if shared is not None:
                return _reused(row, shared)
            output = compute(row)
            if output.finish_reason not in ("canceled", "deadline"):
                shared = output
                self._keep(key, output)
            return output
        finally:
            with self._lock:
                del self._running[key]
            mine.set_result(shared)

    def _kept(self, key: str) -> Output | None:
        try:
            kept: Any = self._redis.get(self._prefix + key)
        except RedisError as error:
            logger.warning("Kept answers cannot be read (%s): the job is computed.", error)
            return None
        return None if kept is None else _read(kept)

    def _keep(self, key: str, output: Output) -> None:
        try:
            self._redis.set(self._prefix + key, json.dumps(asdict(output)), ex=self._ttl_s)
        except RedisError as error:
            logger.warning("An answer is not kept for reuse: %s", error)


def fingerprint(folder: Path, cache: Path | None = None) -> str:
    """Hash of a checkpoint's files by content, 16 hexadecimal digits: an operator may put other weights in their place.

    Reading takes some seconds for each 10 GB. So each file's hash is kept in the folder `cache`, under the file's
    place, inode, size and times: no program can set the time of an inode's last change.
    """
    hashes = [(path.name, _content_hash(path, cache)) for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


def _content_hash(path: Path, cache: Path | None) -> str:
    kept = cache / hashlib.sha256(repr(_identity(path)).encode()).hexdigest() if cache else None
    with contextlib.suppress(OSError):
        if kept:
            return kept.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "blake2b").hexdigest()
    with contextlib.suppress(OSError):
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            # In one step: another worker may start at the same time.
            part = kept.with_suffix(f".{os.getpid()}")
            part.write_text(found)
            part.rename(kept)
    return found


def _identity(path: Path) -> tuple[str | int, ...]:
    state = path.stat()
    return str(path.resolve()), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def digest(row: Row, model: ModelInfo) -> str | None:
    """What an answer depends on; None where it depends on chance, too."""
    sampling = row.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        return None
    asked = {
        "model": model.model_dump(mode="json"),
        "ids": row.tokens.ids,
        "pictures": [picture.key.hex() for picture in row.tokens.pictures],
        "labels": row.labels,
        "sampling": {**asdict(sampling), "end_ids": sorted(sampling.end_ids)},
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _follow(running: Future[Output | None], row: Row) -> Output | None:
    """The other row's output; None where it gives none to share, or this one is interrupted before."""
    while not row.interruption(time.monotonic()):
        if wait([running], LOOK_S).done:
            return running.result()
    return None


def _reused(row: Row, output: Output) -> Output:
    """All of its time was waiting, and none of its images was encoded."""
    row.started = time.monotonic()
    row.cached_images = len(row.tokens.pictures)
    return output


def _read(kept: bytes) -> Output:
    content = json.loads(kept)
    return Output(tuple(content["ids"]), content["finish_reason"], tuple(content["probabilities"]))
