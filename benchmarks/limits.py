"""A worker's overhead, latency and memory: `python -m benchmarks.limits [--save limits] [NAME ...]`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import measures
from benchmarks.checkpoints import CHECKPOINTS
from benchmarks.contenders import Queued
from benchmarks.pictures import Drawings
from config.settings import Settings
from tasks import Caption, Client, Complete, ImagePath, Job
from worker.demo import stack
from worker.engine.decoder import SlotDecoder
from worker.engine.interfaces import PendingPrompt
from worker.engine.pauses import without_pauses
from worker.engine.row import Picture
from worker.models.idefics1.decoder import IdeficsSegment
from worker.models.loading import load

ROUNDS = 3
#: Rows of a decode step.
ROWS = 16
#: Seconds that a download takes.
DOWNLOAD_S = 0.2


@contextlib.contextmanager
def worker(root: Path, **settings: str) -> Iterator[Queued]:
    node = "limits@localhost"
    with stack.broker() as broker:
        named = {"IMAGE_ROOT": str(root), "TORCH_THREADS": "1", **settings}
        with stack.worker(broker, "-n", node, settings=named) as process:
            client = Client(broker.url)
            yield Queued("ours", "idefics", node, client.app, psutil.Process(process.pid), broker, client)


def queue(root: Path) -> dict[str, Any]:
    """A model that does nothing: what the queue, the two processes and the storing of results cost."""
    jobs = [Complete(prompt=["hello"], max_new_tokens=1) for _ in range(2000)]
    with worker(root, MODEL="fake") as ours:
        turns = [ours.run(jobs) for _ in range(ROUNDS + 1)][1:]
    return {
        "jobs_per_s": [round(len(jobs) / turn.seconds) for turn in turns],
        "cpu_ms_per_job": [round(1000 * turn.cpu_s / len(jobs), 2) for turn in turns],
    }


def steps(root: Path) -> dict[str, Any]:
    """A decode step of 16 rows whose prompts show one or eight images."""
    torch.set_num_threads(1)
    model: Any = load(Settings(model=str(CHECKPOINTS["mid-size"].make(root))))
    adapter = model.stock.adapter
    size = adapter.model.config.vision_config.image_size
    pictures = [Picture(bytes([number]), torch.randn(3, size, size)) for number in range(8)]
    with torch.inference_mode():
        features = torch.stack(list(without_pauses(adapter.encode(pictures)).values()))
        # Prompts of the same length: the text between images is not what is compared.
        prompted = {count: _prompted(model, features[:count]) for count in (1, 8)}
        taken: dict[int, list[float]] = {count: [] for count in prompted}
        for _ in range(40):
            for count, decoder in prompted.items():
                taken[count].append(_step_ms(decoder))
    times = {count: statistics.median(each[10:]) for count, each in taken.items()}
    return {
        "ms_by_images": {count: round(ms, 2) for count, ms in times.items()},
        "growth": round(times[8] / times[1] - 1, 3),
    }


def _prompted(model: Any, images: torch.Tensor) -> SlotDecoder:
    """A decoder with prefilled prompts that show `images` (images, width, size)."""
    decoder: SlotDecoder = model.decoder.empty_like(2**16)
    ids = [1, *[model.codec.image_id] * len(images), *[5] * (16 - len(images))]
    places = list(range(1, 1 + len(images)))
    decoder.prefill([PendingPrompt(IdeficsSegment(ids, list(images), places)) for _ in range(ROWS)])
    return decoder


def _step_ms(decoder: SlotDecoder) -> float:
    started = time.perf_counter()
    decoder.step([5] * ROWS)
    return 1000 * (time.perf_counter() - started)


def short(root: Path) -> dict[str, Any]:
    """A job of ten tokens, alone and beside 31 of 200: seconds from its submission to its answer."""
    book = Drawings(root)
    # Random weights hardly ever end a text early.
    with worker(root, MODEL=str(CHECKPOINTS["mid-size"].make(root)), IMAGE_ROOT=str(root)) as ours:
        client = Client(ours.broker.url)

        def once() -> float:
            started = time.monotonic()
            client.submit(Caption(image=book.new(), max_new_tokens=10)).result(600)
            return time.monotonic() - started

        once()
        solo = [once() for _ in range(5)]
        long = client.submit_many(Caption(image=book.new(), max_new_tokens=200) for _ in range(31))
        while sum(job.status == "processing" for job in long) < len(long):
            time.sleep(0.1)
        time.sleep(8)  # Their images are encoded and their prompts read.
        beside = [once() for _ in range(5)]
        running = sum(job.status == "processing" for job in long)
    ratio = statistics.median(beside) / statistics.median(solo)
    return {"solo_s": _rounded(solo), "beside_s": _rounded(beside), "still_running": running, "ratio": round(ratio, 2)}


def downloads(root: Path) -> dict[str, Any]:
    """Pictures that take 200 ms to come, against the same from a folder: how much of the throughput stays."""
    with _image_server(root) as port:
        mid_size = str(CHECKPOINTS["mid-size"].make(root))
        return {
            name: _remote_to_local(root, port, model, count)
            for name, model, count in (("shipped", "demo", 960), ("mid-size", mid_size, 96))
        }


def _remote_to_local(root: Path, port: int, model: str, count: int) -> dict[str, Any]:
    book = Drawings(root)
    # One server stands for many: the limit of a single host would bound it.
    network = {"IMAGE_ALLOW_NETWORKS": "127.0.0.0/8", "IMAGE_PORTS": str(port), "IMAGE_HOST_CONCURRENCY": "1000"}
    with worker(root, MODEL=model, **network) as ours:
        ratios = []
        for number in range(ROUNDS + 1):
            jobs = [[_caption(book.new(), port if by_url else None) for _ in range(count)] for by_url in (False, True)]
            local, remote = (ours.run(each) for each in jobs)
            if number:
                ratios.append(local.seconds / remote.seconds)
    return {"remote_to_local": _rounded(ratios), "median": round(statistics.median(ratios), 2)}


def _caption(picture: ImagePath, port: int | None) -> Job:
    return Caption(image=f"http://127.0.0.1:{port}/{picture.path}" if port else picture, max_new_tokens=20)


@contextlib.contextmanager
def _image_server(root: Path) -> Iterator[int]:
    """It stands for other machines, so it takes as little of this one as it can."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(DOWNLOAD_S)
        body = (root / request.split()[1].decode().lstrip("/")).read_bytes()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0, backlog=1000))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


def memory(root: Path) -> dict[str, Any]:
    """Megabytes of Celery's process and of the model's after each thousand of 10,000 jobs, with small caches."""
    return _memory(root, lambda picture: _caption(picture, None))


def memory_by_url(root: Path) -> dict[str, Any]:
    """The same for pictures that come from a server."""
    with _image_server(root) as port:
        network = {"IMAGE_ALLOW_NETWORKS": "127.0.0.0/8", "IMAGE_PORTS": str(port), "IMAGE_HOST_CONCURRENCY": "1000"}
        return _memory(root, lambda picture: _caption(picture, port), **network)


def _memory(root: Path, job: Callable[[ImagePath], Job], **settings: str) -> dict[str, Any]:
    book = Drawings(root)
    caches = {"IMAGE_CACHE_BYTES": "8000000", "FEATURE_CACHE_BYTES": "8000000"}
    megabytes: list[list[int]] = []
    with worker(root, MODEL="demo", **caches, **settings) as ours:
        for _ in range(10):
            ours.run([job(book.new()) for _ in range(1000)])
            both = [ours.process, *ours.process.children()]
            megabytes.append([process.memory_info().rss // 2**20 for process in both])
    return {"parent_mb": [row[0] for row in megabytes], "model_mb": [row[1] for row in megabytes]}


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, 3) for number in numbers]


MEASURES = (queue, steps, short, downloads, memory, memory_by_url)


def _in_a_folder(measure: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


if __name__ == "__main__":
    named = {measure.__name__: functools.partial(_in_a_folder, measure) for measure in MEASURES}
    measures.run(__doc__, named)
