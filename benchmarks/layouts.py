"""Keys and values in slots against blocks, in one process: `python -m benchmarks.layouts --checkpoint smolvlm`.

Two engines on the same checkpoint run the same jobs by turns, without a broker. Printed are the seconds that slots take
for each second of blocks, as the median of the rounds: above 1, blocks are faster.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.checkpoints import CHECKPOINTS
from benchmarks.pictures import Drawings
from benchmarks.workloads import WORKLOADS
from config.settings import Settings
from tasks import Job
from worker.engine.engine import Engine
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.loading import load
from worker.models.start import batch_limits

Layout = Literal["slots", "blocks"]
LAYOUTS: tuple[Layout, ...] = ("slots", "blocks")
#: Those whose figures are in README.md.
WORKLOAD_NAMES = ("plain", "few-shot", "mixed length", "16 questions", "10 labels")


@contextmanager
def service(model: Path, root: Path, layout: Layout) -> Iterator[Service]:
    """A running engine with its own copy of the checkpoint."""
    settings = Settings(model=str(model), image_root=root, kv_layout=layout, dtype="float32")
    loaded = load(settings)
    engine = Engine(loaded, batch_limits(loaded, settings))
    engine.start()
    try:
        yield Service(settings, loaded.info, loaded.codec, engine, None, loaded.rules)
    finally:
        engine.stop()


def seconds(running: Service, jobs: Sequence[Job]) -> tuple[float, list[str]]:
    """The seconds that the jobs take together, and their texts."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(jobs)) as threads:
        results = list(threads.map(lambda job: running.run(job, JobContext(job.task)), jobs))
    return time.perf_counter() - started, [result.text for result in results]


def measure(checkpoint: str, workloads: Sequence[str], jobs: int, rounds: int) -> dict[str, Any]:
    """The ratios of each workload."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        chosen = CHECKPOINTS[checkpoint]
        model, book = chosen.make(root), Drawings(root, chosen.picture_size)
        with service(model, root, "slots") as slots, service(model, root, "blocks") as blocks:
            for name in workloads:
                ratios = []
                for number in range(rounds + 1):
                    batch = WORKLOADS[name].make(math.ceil(jobs * WORKLOADS[name].part), book)
                    # Each goes first as often as the other.
                    order = (slots, blocks) if number % 2 else (blocks, slots)
                    taken = {running: seconds(running, batch) for running in order}
                    assert taken[slots][1] == taken[blocks][1], "the texts differ"
                    ratios.append(taken[slots][0] / taken[blocks][0])
                # The first round is warming up.
                figures[name] = {
                    "slots_to_blocks": round(statistics.median(ratios[1:]), 3),
                    "rounds": [round(ratio, 3) for ratio in ratios[1:]],
                }
                print(name, figures[name], flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="shipped")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOAD_NAMES))
    parser.add_argument("--jobs", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print(json.dumps(measure(asked.checkpoint, asked.workloads, asked.jobs, asked.rounds), indent=2))


if __name__ == "__main__":
    main()
