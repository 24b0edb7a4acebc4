"""What live text costs: `python -m benchmarks.live [--save live]`.

The bundled model's captions, in rounds in which no job is streamed and in which each one is, in turns, on one worker.
`cost` is the median over pairs of neighbouring rounds: the part of the throughput that is lost. `cpu_cost` is what the
worker's processes need more of the processor for a job, which other work on the machine changes less.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import measures
from benchmarks.contenders import await_results
from benchmarks.pictures import Drawings
from benchmarks.workloads import WORKLOADS
from tasks import Client
from worker.demo import stack

JOBS, PAIRS = 200, 12


def captions() -> dict[str, Any]:
    rounds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder, stack.broker() as broker:
        book = Drawings(Path(folder))
        settings = {"MODEL": "demo", "IMAGE_ROOT": folder}
        with stack.worker(broker, settings=settings) as worker:
            _round(broker, worker.pid, book, is_streamed=True)
            for pair in range(PAIRS):
                # Which one is first changes, as the machine's speed does.
                for is_streamed in (False, True) if pair % 2 else (True, False):
                    rounds[is_streamed].append(_round(broker, worker.pid, book, is_streamed=is_streamed))
    pairs = list(zip(rounds[True], rounds[False], strict=True))
    return {
        "jobs_per_s": {
            name: [round(JOBS / seconds, 1) for seconds, _ in rounds[key]]
            for name, key in (("plain", False), ("live", True))
        },
        "cost": round(1 - statistics.median(plain[0] / live[0] for live, plain in pairs), 4),
        "cpu_cost": round(statistics.median(live[1] / plain[1] for live, plain in pairs) - 1, 4),
    }


def _round(broker: stack.Broker, worker: int, book: Drawings, *, is_streamed: bool) -> tuple[float, float]:
    """Seconds of a round, and of the processor's time in the worker."""
    jobs = [job.model_copy(update={"stream": is_streamed}) for job in WORKLOADS["plain"].make(JOBS, book)]
    client, results = Client(broker.url), broker.connect(1)
    started, cpu_s = time.monotonic(), _cpu_s(worker)
    await_results(results, [job.id for job in client.submit_many(jobs)])
    return time.monotonic() - started, _cpu_s(worker) - cpu_s


def _cpu_s(worker: int) -> float:
    """The processor's seconds of a worker's processes until now."""
    parent = psutil.Process(worker)
    return sum(sum(process.cpu_times()[:2]) for process in (parent, *parent.children(recursive=True)))


if __name__ == "__main__":
    measures.run(__doc__, {"captions": captions})
