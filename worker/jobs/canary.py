"""The canary: a share of the jobs runs again, each alone, while the engine has nothing else to do (IDEFICS_CANARY).

An answer must not depend on the jobs beside it, nor on what the caches have. Where the second answer differs from the
first one, the batch is not to be trusted: the metric counts it, and the log has the answer's receipt.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from tasks.results import Receipt
from tasks.verification import tolerance
from worker.engine.row import Output, Row
from worker.jobs.receipts import output_hash
from worker.jobs.row_builder import joined, others
from worker.observability.metrics import CANARY
from worker.observability.redaction import without_message

logger = logging.getLogger(__name__)

#: Maximum jobs that wait to run again, and bytes of their pictures.
MAX_KEPT, MAX_BYTES = 32, 2**26
#: Seconds between two looks at the engine, and how many in a row must find it idle: between two jobs it is idle, too.
CHECK_S, IDLE_CHECKS = 0.1, 3
#: Runs of a job that may be interrupted by others.
MAX_TRIES = 3
#: After all others.
LAST_PRIORITY = 10


class IdleEngine(Protocol):
    """An engine that says when it has nothing to do."""

    @property
    def is_idle(self) -> bool: ...

    def submit(self, row: Row) -> Future[Output]: ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """A job that waits to run again."""

    id: str
    row: Row
    output: Output
    receipt: Receipt
    nbytes: int


class Canary:
    """Runs some jobs again. `offer` is called from many threads, and never waits."""

    def __init__(self, share: float, engine: IdleEngine) -> None:
        """`share`: of all jobs, 0 to 1."""
        self._share = share
        self._engine = engine
        self._kept: queue.SimpleQueue[_Kept] = queue.SimpleQueue()
        #: Of the jobs that wait or run.
        self._count = self._bytes = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._loop, name="canary", daemon=True).start()

    def offer(self, id: str, row: Row, output: Output, receipt: Receipt) -> None:
        """Keep a finished job to run it again, if it is chosen and there is room. One that was interrupted is not."""
        if not is_chosen(id, self._share) or any(each.is_interrupted for each in (output, *output.others)):
            return
        nbytes = sum(picture.nbytes for picture in row.tokens.pictures)
        with self._lock:
            has_room = self._count < MAX_KEPT and self._bytes + nbytes <= MAX_BYTES
            if has_room:
                self._count += 1
                self._bytes += nbytes
        if has_room:
            self._kept.put(_Kept(id, row, output, receipt, nbytes))
        else:
            CANARY["dropped"].inc()

    def _loop(self) -> None:
        while True:
            kept = self._kept.get()
            try:
                outcome = self._outcome(kept)
            except Exception as error:
                outcome = "failed"
                logger.warning("Job %s failed when it ran again alone.", kept.id, exc_info=without_message(error))
            CANARY[outcome].inc()
            with self._lock:
                self._count -= 1
                self._bytes -= kept.nbytes

    def _outcome(self, kept: _Kept) -> str:
        """Run a job again, and say how that went: see the metric. Raises the row's error."""
        for _ in range(MAX_TRIES):
            self._await_idle()
            again = self._again(kept.row)
            if again is not None:
                break
        else:
            return "dropped"
        where = difference(kept.output, again, tolerance(kept.receipt.dtype, kept.receipt.quantization))
        if where is None:
            return "identical"
        logger.warning(
            "Job %s has another answer than it gets alone: they differ in %s. Receipt: %s; output alone: %s.",
            kept.id, where, kept.receipt.model_dump_json(), output_hash(again),
        )  # fmt: skip
        return "diverged"

    def _again(self, row: Row) -> Output | None:
        """The output of a row alone, with its job's further samples, each alone. None if another job interrupted it."""
        outputs: list[Output] = []
        for each in (row, *others(row)):
            outputs.append(self._engine.submit(_alone(each)).result())
            if outputs[-1].finish_reason == "canceled":
                return None
        return joined(outputs)

    def _await_idle(self) -> None:
        idle = 0
        while idle < IDLE_CHECKS:
            time.sleep(CHECK_S)
            idle = idle + 1 if self._engine.is_idle else 0


def is_chosen(id: str, share: float) -> bool:
    """Whether the job with this id is one of a share of all jobs (0 to 1). The same for each of its runs."""
    digest = hashlib.blake2b(id.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def difference(first: Output, again: Output, tolerance: float) -> str | None:
    """What differs first between two outputs of a row; None if nothing does.

    `tolerance`: how far off a label's probability may be.
    """
    if first.probabilities and again.probabilities:
        pairs = list(zip(first.probabilities, again.probabilities, strict=True))
        if first.label != again.label:
            return "the label"
        return None if all(abs(one - other) <= tolerance for one, other in pairs) else "the probabilities"
    if len(first.others) != len(again.others):
        return "the number of answers"
    answers = enumerate(zip((first, *first.others), (again, *again.others), strict=True))
    found = ((number, _place(*pair)) for number, pair in answers)
    number, place = next(((number, place) for number, place in found if place), (0, None))
    return f"{place} of answer {number + 1}" if place and number else place


def _place(first: Output, again: Output) -> str | None:
    """Where two texts differ first."""
    same = next((n for n, (one, other) in enumerate(zip(first.ids, again.ids, strict=False)) if one != other), None)
    if same is None and len(first.ids) != len(again.ids):
        same = min(len(first.ids), len(again.ids))
    if same is not None:
        return f"token {same + 1}"
    return None if first.finish_reason == again.finish_reason else "the finish reason"


def _alone(row: Row) -> Row:
    """A row that runs alone, gives way to others, and finds nothing of its own in the caches."""
    tokens = row.tokens.apart(os.urandom(8))
    return Row(tokens, row.sampling, row.labels, LAST_PRIORITY, grammar=row.grammar, alone=True, gives_way=True)
