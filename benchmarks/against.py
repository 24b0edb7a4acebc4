"""This checkout's worker against another commit's: `python -m benchmarks.against CHECKOUT [--save against]`.

Three workers do the same jobs by turns: one of this checkout, one of the other, and another of the other as a control,
which shows what noise alone makes of two equal workers. Processes that run the same code differ in speed for as long as
they live, so all three are started several times, and each start counts as one sample. With `--save` the samples are
added to those that the file holds of the same two commits.

What a setting costs: `python -m benchmarks.against . --setting TRACES=otlp` gives it to this checkout's worker only.
Spans are sent to a receiver that drops them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from benchmarks.contenders import Queued, Turn
from benchmarks.measures import RESULTS
from benchmarks.pictures import PICTURES, PictureBook
from benchmarks.workloads import WORKLOADS
from tasks import Client, Complete, Job
from worker.demo import stack

WORKERS = ("this", "other", "control")
#: Each worker goes before and after each other one equally often.
ORDERS = tuple(itertools.permutations(range(len(WORKERS))))

MakeJobs = Callable[[int, PictureBook], Sequence[Job]]
#: Of each workload and figure, each worker's means over a start's rounds.
Samples = dict[str, dict[str, dict[str, list[float]]]]


def _words(count: int, book: PictureBook) -> Sequence[Job]:
    return [Complete(prompt=["hello"], max_new_tokens=1) for _ in range(count)]


#: Jobs of a round and how they are made, by model and workload: as many as take about a second.
COMPARED: dict[str, dict[str, tuple[int, MakeJobs]]] = {
    "demo": {
        name: (jobs, WORKLOADS[name].make)
        for name, jobs in {
            "plain": 128, "16 questions": 320, "mixed length": 128, "few-shot": 128, "10 labels": 128,
        }.items()
    },
    "fake": {"fake model": (500, _words)},
}  # fmt: skip


@contextlib.contextmanager
def _started_from(checkout: Path) -> Iterator[None]:
    ours, stack.CHECKOUT = stack.CHECKOUT, checkout
    try:
        yield
    finally:
        stack.CHECKOUT = ours


class _Dropping(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not into the figures."""


@contextlib.contextmanager
def receiver_of_spans() -> Iterator[None]:
    """Have OpenTelemetry's exporters of new processes send to a receiver that drops what it gets."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Dropping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        yield
        server.shutdown()


@contextlib.contextmanager
def _worker(name: str, checkout: Path, model: str, root: Path, extra: Mapping[str, str]) -> Iterator[Queued]:
    """A worker with a broker of its own. `extra`: settings beside the usual ones."""
    with stack.broker() as broker, contextlib.ExitStack() as opened:
        with _started_from(checkout):
            settings = {"MODEL": model, "IMAGE_ROOT": str(root), "TORCH_THREADS": "1", **extra}
            process = opened.enter_context(stack.worker(broker, "-n", f"{name}@bench", settings=settings))
        client = Client(broker.url)
        yield Queued(name, "idefics", f"{name}@bench", client.app, psutil.Process(process.pid), broker, client)


def sample(
    other: Path, model: str, order: Sequence[str], pictures: str, samples: Samples, extra: Mapping[str, str]
) -> None:
    """Start the three workers in this order, and add one sample of each of the model's workloads. `extra`: settings of
    this checkout's worker."""
    with contextlib.ExitStack() as opened:
        root = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        book = PICTURES[pictures](root, None)
        checkouts = {name: stack.CHECKOUT if name == "this" else other for name in order}
        workers = [
            opened.enter_context(_worker(name, path, model, root, extra if name == "this" else {}))
            for name, path in checkouts.items()
        ]
        for workload, (jobs, make) in COMPARED[model].items():
            turns = _rounds(workers, functools.partial(make, jobs, book))
            for name, figure in {"cpu_ms_per_job": _cpu_ms, "wall_ms_per_job": _wall_ms}.items():
                known = samples.setdefault(workload, {}).setdefault(name, {worker: [] for worker in WORKERS})
                for worker, each in turns.items():
                    known[worker].append(round(statistics.mean(map(figure, each)), 3))


def _rounds(workers: Sequence[Queued], make: Callable[[], Sequence[Job]]) -> dict[str, list[Turn]]:
    """The turns of each worker, after one that warms it up."""
    turns: dict[str, list[Turn]] = {worker.name: [] for worker in workers}
    for order in ORDERS[:1] + ORDERS:
        jobs = make()
        for place in order:
            turns[workers[place].name].append(workers[place].run(jobs))
    return {name: each[1:] for name, each in turns.items()}


def _cpu_ms(turn: Turn) -> float:
    return 1_000 * turn.cpu_s / len(turn.texts)


def _wall_ms(turn: Turn) -> float:
    return 1_000 * turn.seconds / len(turn.texts)


def ratios(samples: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """One figure's mean ratios with their standard errors: of this checkout's worker to the mean of the other two, and
    of the control to its equal."""
    starts = list(zip(*(samples[name] for name in WORKERS), strict=True))
    return {
        "this": _mean([2 * this / (other + control) for this, other, control in starts]),
        "control": _mean([control / other for _, other, control in starts]),
    }


def _mean(numbers: Sequence[float]) -> str:
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else float("nan")
    return f"{statistics.mean(numbers):.3f} +- {error:.3f}"


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="the other commit's working tree")
    parser.add_argument("--pictures", choices=PICTURES, default="drawn")
    parser.add_argument("--setting", action="append", default=[], help="NAME=VALUE, for this checkout's worker only")
    parser.add_argument("--model", choices=COMPARED, action="append", help="by default all")
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--save", help="the name of the file in results/")
    asked = parser.parse_args()
    extra = dict(setting.split("=", 1) for setting in asked.setting)
    commits = {"this": " ".join([_commit(stack.CHECKOUT), *asked.setting]), "other": _commit(asked.checkout)}
    path = RESULTS / f"{asked.save}.json"
    known = json.loads(path.read_text()) if asked.save and path.exists() else {}
    samples: Samples = known["samples"] if known.get("commits") == commits else {}
    with receiver_of_spans():
        for _, model in itertools.product(range(asked.starts), asked.model or COMPARED):
            sample(asked.checkout, model, random.sample(WORKERS, len(WORKERS)), asked.pictures, samples, extra)
    summary = {
        workload: {name: ratios(each) for name, each in figures.items()} for workload, figures in samples.items()
    }
    print(json.dumps(summary, indent=2))
    if asked.save:
        path.write_text(json.dumps({"commits": commits, "to_other": summary, "samples": samples}, indent=2) + "\n")


if __name__ == "__main__":
    main()
