"""Jobs in a slow worker while others are idle: `python -m benchmarks.hoarding [--save hoarding] [NAME ...]`.

Three workers share a broker, and one is ten times slower. The time runs from the moment when all may take jobs until
the last job has ended. The ideal time is the shortest possible with whole batches, if each batch takes as long as in
that worker alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

from benchmarks import measures
from benchmarks.contenders import Queued, await_results
from tasks import Client, Complete, Job
from worker.demo import stack

ROUNDS = 3
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


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, 2) for number in numbers]


MEASURES: dict[str, Callable[[], Any]] = {
    "1200": functools.partial(tail, 1_200),
    "300": functools.partial(tail, 300),
}


if __name__ == "__main__":
    measures.run(__doc__, MEASURES)
