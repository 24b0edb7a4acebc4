"""Captions through the broker from a pre-filled queue: our worker against one `generate` per task.

`make bench`. Both workers hold the bundled checkpoint in float32 with one torch thread and wait; the rounds alternate
between them. Every job shows a picture of its own, so that no cache flatters. Texts must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from celery import Celery
from PIL import Image

from tasks import Caption, Client, ImagePath
from worker.demo import stack

PICTURES = stack.CHECKOUT / "worker" / "demo" / "pictures"
RESULTS = Path(__file__).parent / "results" / "throughput.json"
MAX_NEW_TOKENS = 20
TORCH_THREADS = 1

#: Submits one job for a picture's file and gives its id.
Submit = Callable[[str], str]


@dataclass(frozen=True)
class Contender:
    """A running worker, its queue, and how a job is sent to it."""

    name: str
    queue: str
    app: Celery
    process: psutil.Process
    submit: Submit


@dataclass(frozen=True)
class Round:
    """What one contender did once. CPU is that of all its processes."""

    jobs_per_s: float
    cpu_ms_per_job: float
    texts: list[str]


def distinct_pictures(folder: Path, count: int) -> list[str]:
    """Files of `count` pictures that all differ in a few pixels of a corner."""
    sources = [Image.open(path).convert("RGB") for path in sorted(PICTURES.glob("*.png"))]
    names = []
    for number in range(count):
        picture = sources[number % len(sources)].copy()
        for place in range(4):
            shade = number >> (4 * place) & 15
            red, green, blue = picture.getpixel((place, 0))  # type: ignore[misc]
            picture.putpixel((place, 0), (red ^ shade, green, blue))
        names.append(f"{number:05}.png")
        picture.save(folder / names[-1])
    return names


def measure(contender: Contender, files: Sequence[str], broker: stack.Broker) -> Round:
    """Fill the contender's queue while it does not listen, then time it until the last result is stored."""
    contender.app.control.cancel_consumer(contender.queue, reply=True)
    ids = [contender.submit(file) for file in files]
    before, started = _cpu_s(contender.process), time.monotonic()
    contender.app.control.add_consumer(contender.queue, reply=True)
    results = _await_results(broker, ids)
    seconds, cpu_s = time.monotonic() - started, _cpu_s(contender.process) - before
    return Round(len(ids) / seconds, 1000 * cpu_s / len(ids), [result["text"] for result in results])


def _await_results(broker: stack.Broker, ids: Sequence[str]) -> list[dict[str, str]]:
    connection = broker.connect(1)
    end = time.monotonic() + 600
    while time.monotonic() < end:
        stored = [json.loads(value) for value in connection.mget([f"celery-task-meta-{id}" for id in ids]) if value]
        failed = [meta["result"] for meta in stored if meta["status"] == "FAILURE"]
        if failed:
            raise RuntimeError(f"A job failed: {failed[0]}")
        if sum(meta["status"] == "SUCCESS" for meta in stored) == len(ids):
            return [meta["result"] for meta in stored]
        time.sleep(0.1)
    raise TimeoutError("The jobs did not end in 600 s.")


def _cpu_s(process: psutil.Process) -> float:
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


@contextlib.contextmanager
def contenders(broker: stack.Broker, root: Path) -> Iterator[list[Contender]]:
    """Both workers, loaded and idle."""
    settings = {"IMAGE_ROOT": str(root), "TORCH_THREADS": str(TORCH_THREADS), "DTYPE": "float32"}
    environment = {
        **os.environ,
        "IDEFICS_BROKER_URL": broker.url,
        "IDEFICS_RESULT_BACKEND": broker.results,
        "IDEFICS_IMAGE_ROOT": str(root),
        "NAIVE_TORCH_THREADS": str(TORCH_THREADS),
    }
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.naive", "worker", "-n", "naive@%h", "-l", "INFO"]
    log = root / "naive.log"
    with (
        stack.worker(broker, settings=settings) as ours,
        stack.started(command, log=log, environment=environment) as naive,
    ):
        stack.await_line(naive, log, " ready.", stack.WORKER_START_S)
        client = Client(broker.url)
        plain = Celery("plain", broker=broker.url, backend=broker.results)

        def submit_naive(file: str) -> str:
            return str(plain.send_task("naive.caption", (file, MAX_NEW_TOKENS), queue="naive").id)

        def submit_ours(file: str) -> str:
            return client.submit(Caption(image=ImagePath(path=file), max_new_tokens=MAX_NEW_TOKENS)).id

        yield [
            Contender("one generate per task", "naive", plain, psutil.Process(naive.pid), submit_naive),
            Contender("idefics-jobs", "idefics", client.app, psutil.Process(ours.pid), submit_ours),
        ]


def run(jobs: int, rounds: int) -> dict[str, object]:
    """The figures: medians over rounds, and their spread."""
    found: dict[str, list[Round]] = {}
    with tempfile.TemporaryDirectory() as folder, stack.broker() as broker:
        files = distinct_pictures(Path(folder), jobs * (rounds + 1))
        with contenders(broker, Path(folder)) as both:
            for number in range(rounds + 1):
                texts = []
                for contender in both:
                    result = measure(contender, files[number * jobs : (number + 1) * jobs], broker)
                    texts.append(result.texts)
                    if number:  # The first round warms up.
                        found.setdefault(contender.name, []).append(result)
                        print(f"round {number}: {contender.name}: {result.jobs_per_s:.1f} jobs/s", flush=True)
                if texts[0] != texts[1]:
                    raise RuntimeError("The contenders' texts differ: the comparison is void.")
    return _summary(found, jobs)


def _summary(found: dict[str, list[Round]], jobs: int) -> dict[str, object]:
    naive, ours = found.values()
    ratios = [
        ours_round.jobs_per_s / naive_round.jobs_per_s for naive_round, ours_round in zip(naive, ours, strict=True)
    ]
    return {
        "command": "make bench",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one torch thread a worker",
        "jobs_per_round": jobs,
        "contenders": {name: _figures(each) for name, each in found.items()},
        "ratio": {"median": round(statistics.median(ratios), 2), "all": [round(ratio, 2) for ratio in ratios]},
    }


def _figures(rounds: Sequence[Round]) -> dict[str, object]:
    return {
        "jobs_per_s": round(statistics.median(each.jobs_per_s for each in rounds), 2),
        "cpu_ms_per_job": round(statistics.median(each.cpu_ms_per_job for each in rounds), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    summary = run(arguments.jobs, arguments.rounds)
    print(json.dumps(summary, indent=2))
    RESULTS.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
