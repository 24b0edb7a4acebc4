"""The contenders: on the same checkpoint, with the same number of torch threads, warm, and idle between their runs."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import redis
from celery import Celery

from benchmarks.stock import Request, Stock
from tasks import Client, ImagePath, Job
from worker.demo import stack
from worker.jobs.prompts import ImageRef, build

#: Requests that the HTTP client has under way: enough for two full batches.
HTTP_THREADS = 64
#: Seconds for one round.
ROUND_S = 900.0
#: Results.
ASKED_AT_ONCE = 32
#: Seconds between two looks for them, and for the last ones: until those are there the time runs.
LOOK_S, LAST_LOOK_S = 0.05, 0.01


class Contender(Protocol):
    name: str

    def run(self, jobs: Sequence[Job]) -> Turn:
        """All the jobs' texts, in order, as fast as it can."""


@dataclass(frozen=True)
class Turn:
    """What a contender did in one round. CPU is that of its processes, in seconds."""

    seconds: float
    cpu_s: float
    texts: list[str]


def request_of(job: Job) -> Request:
    """A job as the stock engine takes it."""
    prompt = [_named(part) if isinstance(part, ImageRef) else part for part in build(job)]
    return {"prompt": prompt, "max_new_tokens": job.max_new_tokens}


def _named(reference: ImageRef) -> dict[str, str]:
    assert isinstance(reference.source, ImagePath)
    return {"path": reference.source.path}


@dataclass
class StockLoop:
    """The offline bound: batches in a loop, no queue at all."""

    stock: Stock
    batch_size: int
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or f"stock loop, batch {self.batch_size}"

    def run(self, jobs: Sequence[Job]) -> Turn:
        requests = [request_of(job) for job in jobs]
        started, cpu = time.monotonic(), time.process_time()
        texts: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            texts += self.stock.answer(requests[start : start + self.batch_size])
        return Turn(time.monotonic() - started, time.process_time() - cpu, texts)


@dataclass
class Queued:
    """A Celery worker. Its queue is filled while it does not listen; the time runs until the last result is stored."""

    name: str
    queue: str
    #: Celery's name of the worker: control commands are for it alone.
    node: str
    app: Celery
    process: psutil.Process
    broker: stack.Broker
    client: Client | None = None

    def run(self, jobs: Sequence[Job]) -> Turn:
        self.app.control.cancel_consumer(self.queue, destination=[self.node], reply=True)
        ids = [self._submit(job) for job in jobs]
        cpu, started = cpu_s(self.process), time.monotonic()
        self.app.control.add_consumer(self.queue, destination=[self.node], reply=True)
        texts = [result["text"] for result in await_results(self.broker.connect(1), ids)]
        return Turn(time.monotonic() - started, cpu_s(self.process) - cpu, texts)

    def _submit(self, job: Job) -> str:
        if self.client is not None:
            return self.client.submit(job).id
        return str(self.app.send_task("naive.answer", (request_of(job),), queue=self.queue).id)


def await_results(results: redis.Redis, ids: Sequence[str]) -> list[Any]:
    """What these jobs returned, in order, once it is stored. Raises RuntimeError where one failed or none came."""
    found: list[Any] = []
    end = time.monotonic() + ROUND_S
    while len(found) < len(ids):
        # Those that come next only: to ask for all takes much of a processor from the worker.
        asked = [f"celery-task-meta-{id}" for id in ids[len(found) : len(found) + ASKED_AT_ONCE]]
        metas: list[dict[str, Any]] = [json.loads(stored or "{}") for stored in results.mget(asked)]
        ended = list(itertools.takewhile(lambda meta: meta.get("status") == "SUCCESS", metas))
        found += [meta["result"] for meta in ended]
        if len(ended) == len(metas):
            continue
        if metas[len(ended)].get("status") == "FAILURE" or time.monotonic() > end:
            raise RuntimeError(f"job {len(found)} failed or never ended: {metas[len(ended)]}")
        time.sleep(LOOK_S if len(ids) - len(found) > ASKED_AT_ONCE else LAST_LOOK_S)
    return found


@dataclass
class Http:
    """A server that gets all requests at once. It is suspended between its runs, since an idle server polls."""

    name: str
    port: int
    process: psutil.Process

    def __post_init__(self) -> None:
        self.processes = [self.process, *self.process.children(recursive=True)]
        self._stand_still()

    def _stand_still(self) -> None:
        for process in self.processes:
            process.suspend()

    def run(self, jobs: Sequence[Job]) -> Turn:
        for process in self.processes:
            process.resume()
        turn = self._ask_all(jobs)
        self._stand_still()
        return turn

    def _ask_all(self, jobs: Sequence[Job]) -> Turn:
        requests = [json.dumps(request_of(job)) for job in jobs]
        cpu, started = cpu_s(self.process), time.monotonic()
        with ThreadPoolExecutor(HTTP_THREADS) as pool:
            texts = list(pool.map(self._ask, requests))
        return Turn(time.monotonic() - started, cpu_s(self.process) - cpu, texts)

    def _ask(self, body: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ROUND_S)
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        return str(json.loads(connection.getresponse().read())["text"])


def cpu_s(process: psutil.Process) -> float:
    """Seconds of a process and those below it."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


@contextlib.contextmanager
def contenders(names: Sequence[str], checkpoint: Path, root: Path, threads: int) -> Iterator[list[Contender]]:
    """Those of STARTS that are named, started and idle."""
    with contextlib.ExitStack() as opened:
        broker = opened.enter_context(stack.broker())
        environment = {
            **os.environ,
            "IDEFICS_BROKER_URL": broker.url,
            "IDEFICS_RESULT_BACKEND": broker.results,
            "BENCH_CHECKPOINT": str(checkpoint),
            "BENCH_ROOT": str(root),
            "BENCH_THREADS": str(threads),
        }
        yield [opened.enter_context(STARTS[name](broker, environment)) for name in names]


@contextlib.contextmanager
def _loop(broker: stack.Broker, environment: Mapping[str, str], batch_size: int = 32) -> Iterator[Contender]:
    stock = Stock(environment["BENCH_CHECKPOINT"], environment["BENCH_ROOT"], int(environment["BENCH_THREADS"]))
    yield StockLoop(stock, batch_size)


@contextlib.contextmanager
def _loop_of_one(broker: stack.Broker, environment: Mapping[str, str]) -> Iterator[Contender]:
    with _loop(broker, environment, batch_size=1) as contender:
        yield contender


@contextlib.contextmanager
def _naive(broker: stack.Broker, environment: Mapping[str, str]) -> Iterator[Contender]:
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.naive", "worker", "-n", "naive@%h", "-l", "INFO"]
    log = Path(environment["BENCH_ROOT"]) / "naive.log"
    with stack.started(command, log=log, environment=environment) as process:
        stack.await_line(process, log, " ready.", stack.WORKER_START_S)
        app = Celery("plain", broker=broker.url, backend=broker.results, set_as_current=False)
        yield Queued(
            "one generate per task", "naive", f"naive@{platform.node()}", app, psutil.Process(process.pid), broker
        )


@contextlib.contextmanager
def _ours(broker: stack.Broker, environment: Mapping[str, str]) -> Iterator[Contender]:
    settings = {
        "MODEL": environment["BENCH_CHECKPOINT"],
        "IMAGE_ROOT": environment["BENCH_ROOT"],
        "TORCH_THREADS": environment["BENCH_THREADS"],
        "DTYPE": "float32",
    }
    with stack.worker(broker, settings=settings) as process:
        client = Client(broker.url)
        yield Queued(
            "idefics-jobs",
            "idefics",
            f"celery@{platform.node()}",
            client.app,
            psutil.Process(process.pid),
            broker,
            client,
        )


@contextlib.contextmanager
def _litserve(broker: stack.Broker, environment: Mapping[str, str]) -> Iterator[Contender]:
    port = stack.free_port()
    log = Path(environment["BENCH_ROOT"]) / "litserve.log"
    command = [sys.executable, "-m", "benchmarks.litserver", str(port)]
    with stack.started(command, log=log, environment=environment) as process:
        _await_http(port)
        contender = Http("LitServe", port, psutil.Process(process.pid))
        try:
            yield contender
        finally:
            # It leaves its workers running when it is stopped.
            for child in contender.processes[1:]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def _await_http(port: int) -> None:
    end = time.monotonic() + stack.WORKER_START_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise TimeoutError("LitServe did not start.")


STARTS = {"stock": _loop, "stock-1": _loop_of_one, "naive": _naive, "litserve": _litserve, "ours": _ours}
