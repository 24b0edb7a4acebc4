"""A cache of answers: identical jobs that run at the same time share one row, and a finished answer is kept in Redis.

Only for answers that the model would repeat: greedy, with beams, labels or a seed. Identical means the same pixels,
token ids, labels, sampling, stop strings and model; tasks and URLs may differ. Redis keeps the tokens, under
`idefics:answer:<digest>`; text, usage, timing and metadata are computed for each job.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from tasks.redis_keys import ANSWER
from tasks.results import ModelInfo
from worker.engine.row import Output, Row, TokenScore
from worker.observability.metrics import ANSWER_CACHE

logger = logging.getLogger(__name__)

#: Seconds between two checks of a job that waits for another's row: was it canceled, has its deadline passed?
POLL_INTERVAL_S = 0.1

Compute = Callable[[Row], Output]


class AnswerCache:
    """Shares answers among identical jobs (single flight). Without Redis every job is computed. Thread-safe."""

    def __init__(self, redis: Redis, ttl_s: int, weights: str = "", prefix: str = "") -> None:
        """`weights` is the checkpoint's fingerprint, since an id and revision may get other weights later.

        `prefix` stands before all keys.
        """
        self._redis = redis
        self._ttl_s = ttl_s
        self._prefix = prefix + ANSWER.prefix + weights
        #: Running rows by digest. Each resolves to its output, or to None if that must not be shared.
        self._running: dict[str, Future[Output | None]] = {}
        self._lock = threading.Lock()

    def output(self, row: Row, model: ModelInfo, compute: Compute) -> Output:
        """The output of an identical row, running or kept; otherwise the output of `compute`."""
        key = digest(row, model)
        if key is None:
            return compute(row)
        ANSWER_CACHE.queries.inc()
        while True:
            mine: Future[Output | None] = Future()
            with self._lock:
                running = self._running.setdefault(key, mine)
            if running is mine:
                return self._lead(key, mine, row, compute)
            output = _follow(running, row)
            if output is not None:
                return _reused(row, output)
            if row.abort_reason(time.monotonic()):
                # CancellationError or late: the engine ends such a row as it ends any other.
                return compute(row)

    def _lead(self, key: str, mine: Future[Output | None], row: Row, compute: Compute) -> Output:
        shared: Output | None = None
        try:
            shared = self._kept(key)
            if shared is not None:
                return _reused(row, shared)
            output = compute(row)
            if not any(each.is_interrupted for each in (output, *output.others)):
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


def digest(row: Row, model: ModelInfo) -> str | None:
    """Hash of everything that an answer depends on; None if it also depends on chance."""
    sampling = row.sampling
    if sampling.temperature > 0 and sampling.seed is None:
        return None
    asked = {
        "model": model.model_dump(mode="json"),
        "ids": row.tokens.ids,
        "pictures": [picture.key.hex() for picture in row.tokens.pictures],
        "labels": row.labels,
        "sampling": {**asdict(sampling), "eos_ids": sorted(sampling.eos_ids)},
    }
    if row.grammar:
        asked["grammar"] = row.grammar.definition
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _follow(running: Future[Output | None], row: Row) -> Output | None:
    """Wait for the other row's output; None if it has none to share, or if `row` is interrupted first."""
    while not row.abort_reason(time.monotonic()):
        if wait([running], POLL_INTERVAL_S).done:
            return running.result()
    return None


def _reused(row: Row, output: Output) -> Output:
    """Account for a shared output: the row only waited, and its images were not encoded."""
    ANSWER_CACHE.hits.inc()
    row.started = time.monotonic()
    row.cached_images = len(row.tokens.pictures)
    row.is_reused = True
    return output


def _read(kept: bytes) -> Output:
    return _output(json.loads(kept))


def _output(content: Mapping[str, Any]) -> Output:
    scores = (TokenScore(id, logprob, tuple(map(tuple, top))) for id, logprob, top in content["scores"])
    return Output(
        tuple(content["ids"]),
        content["finish_reason"],
        tuple(content["probabilities"]),
        content["confidence"],
        tuple(scores),
        tuple(map(_output, content["others"])),
    )
