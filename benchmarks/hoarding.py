"""Jobs in a slow worker while others are idle: `python -m benchmarks.hoarding [--save hoarding] [NAME ...]`.

Three workers share a broker, and one is ten times slower. The time runs from the moment when all may take jobs until
the last job has ended. The ideal time is the shortest possible with whole batches, if each batch takes as long as in
that worker alone.

`alone` is one worker's throughput, alternating with that of another checkout of this project (BENCH_AGAINST); it
should be the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import measures
from benchmarks.contenders import Queued, await_results
from benchmarks.workloads import PictureBook
from tasks import Caption, Client, Complete, Job
from worker.demo import stack

AGAINST = "BENCH_AGAINST"
ROUNDS = 3
ROUNDS_ALONE = 6
#: Jobs that a worker runs at once.
SLOTS = 16
#: Seconds a token.
STEPS_S = {"fast-1": 0.01, "fast-2": 0.01, "slow": 0.1}
TOKENS = 24


def ideal_s(jobs: int, batches_s: Sequence[float], slots: int = SLOTS) -> float:
    """Seconds until all jobs can have ended, where each worker runs whole batches and each takes so long there."""
    ends = sorted(number * batch_s for batch_s in batches_s for number in range(1, math.ceil(jobs / slots) + 1))
    # A batch that ends right then counts, however its time was rounded.
    return next(end for end in ends if slots * sum(int(end / each + 1e-9) for each in batches_s) >= jobs)


def _jobs(count: int) -> list[Job]:
    return [Complete(prompt=["hello"], max_new_tokens=TOKENS) for _ in range(count)]


@contextlib.contextmanager
def _fleet() -> Iterator[dict[str, Queued]]:
    with contextlib.ExitStack() as opened:
        broker = opened.enter_context(stack.broker())
        client = Client(broker.url)
        fleet = {}
        for name, step_s in STEPS_S.items():
            settings = {"MODEL": f"fake:{step_s}", "MAX_BATCH_SIZE": str(SLOTS)}
            process = opened.enter_context(stack.worker(broker, "-n", f"{name}@bench", settings=settings))
            fleet[name] = Queued(
                name, "idefics", f"{name}@bench", client.app, psutil.Process(process.pid), broker, client
            )
        for worker in fleet.values():
            worker.app.control.cancel_consumer("idefics", destination=[worker.node], reply=True)
        yield fleet


def _batch_s(worker: Queued) -> float:
    """Seconds for a batch in this worker alone: as many as for a single job, whose batch is sure to be one."""
    seconds = statistics.median(worker.run(_jobs(1)).seconds for _ in range(3))
    worker.app.control.cancel_consumer("idefics", destination=[worker.node], reply=True)
    return seconds


def _together_s(fleet: dict[str, Queued], count: int) -> float:
    one, nodes = next(iter(fleet.values())), [worker.node for worker in fleet.values()]
    one.app.control.cancel_consumer("idefics", destination=nodes, reply=True)
    assert one.client is not None
    ids = [job.id for job in one.client.submit_many(_jobs(count))]
    started = time.monotonic()
    one.app.control.add_consumer("idefics", destination=nodes)
    await_results(one.broker.connect(1), ids)
    return time.monotonic() - started


def tail(count: int) -> dict[str, Any]:
    with _fleet() as fleet:
        batches_s = [_batch_s(worker) for worker in fleet.values()]
        ideal = ideal_s(count, batches_s)
        taken = [_together_s(fleet, count) for _ in range(ROUNDS)]
    by_rates = count / sum(SLOTS / batch_s for batch_s in batches_s)
    return {
        "batch_s": dict(zip(fleet, _rounded(batches_s), strict=True)),
        "seconds": _rounded(taken),
        "ideal_s": round(ideal, 2),
        "by_rates_alone_s": round(by_rates, 2),
        "ratios": _rounded([seconds / ideal for seconds in taken]),
        "ratio": round(statistics.median(taken) / ideal, 2),
    }


@contextlib.contextmanager
def _checkout(path: Path) -> Iterator[None]:
    """Workers are started from there."""
    ours, stack.CHECKOUT = stack.CHECKOUT, path
    try:
        yield
    finally:
        stack.CHECKOUT = ours


@contextlib.contextmanager
def _alone(name: str, checkout: Path, model: str, root: Path) -> Iterator[Queued]:
    with stack.broker() as broker, contextlib.ExitStack() as opened:
        with _checkout(checkout):
            settings = {"MODEL": model, "IMAGE_ROOT": str(root), "TORCH_THREADS": "1"}
            process = opened.enter_context(stack.worker(broker, "-n", f"{name}@bench", settings=settings))
        client = Client(broker.url)
        yield Queued(name, "idefics", f"{name}@bench", client.app, psutil.Process(process.pid), broker, client)


def alone(model: str, make: Callable[[PictureBook], Sequence[Job]]) -> dict[str, Any]:
    against = os.environ.get(AGAINST)
    if not against:
        return {"skipped": f"set {AGAINST} to a checkout of another commit"}
    rates: dict[str, list[float]] = {"this": [], "other": []}
    cpu_ms: dict[str, list[float]] = {"this": [], "other": []}
    with contextlib.ExitStack() as opened:
        root = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        book = PictureBook(root)
        both = [
            opened.enter_context(_alone(name, checkout, model, root))
            for name, checkout in (("this", stack.CHECKOUT), ("other", Path(against)))
        ]
        for number in range(ROUNDS_ALONE + 1):
            jobs = make(book)
            for worker in both if number % 2 else reversed(both):
                turn = worker.run(jobs)
                if number:  # The first warms up.
                    rates[worker.name].append(len(jobs) / turn.seconds)
                    cpu_ms[worker.name].append(1_000 * turn.cpu_s / len(jobs))
    ratios = [this / other for this, other in zip(*rates.values(), strict=True)]
    return {
        "jobs_per_s": {name: round(statistics.median(each), 1) for name, each in rates.items()},
        "cpu_ms_per_job": {name: round(statistics.median(each), 2) for name, each in cpu_ms.items()},
        "this_to_other": _rounded(ratios),
        "median": round(statistics.median(ratios), 3),
    }


def _words(book: PictureBook) -> Sequence[Job]:
    return [Complete(prompt=["hello"], max_new_tokens=1) for _ in range(1_000)]


def _captions(book: PictureBook) -> Sequence[Job]:
    return [Caption(image=book.new(), max_new_tokens=20) for _ in range(240)]


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, 2) for number in numbers]


MEASURES: dict[str, Callable[[], Any]] = {
    "1200": functools.partial(tail, 1_200),
    "300": functools.partial(tail, 300),
    "alone-fake": functools.partial(alone, "fake", _words),
    "alone-demo": functools.partial(alone, "demo", _captions),
}


if __name__ == "__main__":
    measures.run(__doc__, MEASURES)
