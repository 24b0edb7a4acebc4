"""Pictures of slow and fast hosts, with two workers: `python -m benchmarks.hosts [--save hosts] [NAME ...]`.

`slow`: 1,500 pictures of one host that takes 200 ms for each, with SLOTS downloads at once. The ideal time is that of a
host whose slots are never idle. `slots_used` is the share of its slots' time in which the host had a request, from the
first one to the last. `sent_again` are messages that were published anew, `returned` those that went back to the
queue as they were.
`many`: 6,000 of them, more than wait in the workers.
`mixed`: jobs without pictures behind 600 of those; they should not wait for the host.
`fast`: pictures of a host that answers at once, one worker, with and without slots that all workers share, in turns.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from benchmarks import measures
from benchmarks.contenders import await_results
from tasks import Caption, Client, Complete, Job
from tests.support.pictures import png
from tests.support.web import Quiet, serving
from worker.demo import stack

PICTURES, MANY_PICTURES = 1_500, 6_000
#: Downloads at once from the slow host, and seconds of each.
SLOTS, DOWNLOAD_S = 8, 0.2
FAST_PICTURES, ROUNDS = 1_000, 5


class Host:
    """A web server whose every picture takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.most_at_once = 0
        #: Seconds of all requests, and when the first began and the last ended.
        self._busy_s = 0.0
        self._began, self._ended = math.inf, 0.0
        self._now = 0
        self._lock = threading.Lock()
        self._picture = png("teal")

    def used(self, slots: int) -> float:
        """The share of the slots' time in which they had a request."""
        return self._busy_s / (slots * (self._ended - self._began))

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """Serve on a free port."""
        host = self

        class Handler(Quiet, BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                began = time.monotonic()
                # Not until the response is sent: the worker may ask for the next one before this thread goes on.
                with host._counted():
                    time.sleep(host.seconds)
                self.send_response(200)
                self.send_header("Content-Length", str(len(host._picture)))
                self.end_headers()
                self.wfile.write(host._picture)
                host._note_request(began)

        with serving(Handler) as port:
            yield port

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def _note_request(self, began: float) -> None:
        with self._lock:
            self._began, self._ended = min(self._began, began), time.monotonic()
            self._busy_s += self._ended - began


@contextlib.contextmanager
def _workers(broker: stack.Broker, count: int, port: int, **settings: str) -> Iterator[None]:
    chosen = {"MODEL": "fake", "IMAGE_ALLOW_NETWORKS": "127.0.0.0/8", "IMAGE_PORTS": str(port), **settings}
    with contextlib.ExitStack() as opened:
        for number in range(count):
            opened.enter_context(stack.worker(broker, "-n", f"worker-{number}@bench", settings=chosen))
        yield


def _captions(port: int, count: int) -> list[Job]:
    return [Caption(image=f"http://127.0.0.1:{port}/{number}.png", max_new_tokens=4) for number in range(count)]


def _pushes(broker: stack.Broker) -> tuple[int, int]:
    """Messages that were published, and that were put back, until now."""
    stats: Any = broker.connect().info("commandstats")
    published, returned = (stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("lpush", "rpush"))
    return published, returned


def slow(pictures: int = PICTURES) -> dict[str, Any]:
    host = Host(DOWNLOAD_S)
    with host.open() as port, stack.broker() as broker, _workers(broker, 2, port, **_slots()):
        client = Client(broker.url)
        published, returned = _pushes(broker)
        started = time.monotonic()
        ids = [job.id for job in client.submit_many(_captions(port, pictures))]
        await_results(broker.connect(1), ids)
        seconds = time.monotonic() - started
        published, returned = (now - before for now, before in zip(_pushes(broker), (published, returned), strict=True))
    ideal_s = pictures * DOWNLOAD_S / SLOTS
    return {
        "seconds": round(seconds, 1),
        "ideal_s": ideal_s,
        "slots_used": round(host.used(SLOTS), 3),
        "sent_again": published - pictures,
        "sent_again_share": round((published - pictures) / pictures, 4),
        "returned": returned,
        "most_at_once": host.most_at_once,
    }


def many() -> dict[str, Any]:
    return slow(MANY_PICTURES)


def _slots() -> dict[str, str]:
    """Two workers share SLOTS. `HOSTS_EACH=1`: each has half of them, for code that cannot share."""
    if os.environ.get("HOSTS_EACH"):
        return {"IMAGE_HOST_CONCURRENCY": str(SLOTS // 2)}
    return {"IMAGE_HOST_CONCURRENCY": str(SLOTS), "IMAGE_HOST_SHARED": str(SLOTS)}


def mixed() -> dict[str, Any]:
    host = Host(DOWNLOAD_S)
    with host.open() as port, stack.broker() as broker, _workers(broker, 2, port, **_slots()):
        client, results = Client(broker.url), broker.connect(1)
        started = time.monotonic()
        slow_ids = [job.id for job in client.submit_many(_captions(port, 600))]
        texts = [Complete(prompt=[f"hello {number}"], max_new_tokens=4) for number in range(200)]
        await_results(results, [job.id for job in client.submit_many(texts)])
        texts_s = time.monotonic() - started
        await_results(results, slow_ids)
        return {"texts_s": round(texts_s, 2), "pictures_s": round(time.monotonic() - started, 1)}


def fast() -> dict[str, Any]:
    rates: dict[str, list[float]] = {"shared": [], "not_shared": []}
    with Host(0.0).open() as port:
        for _ in range(ROUNDS):
            for name, total in (("shared", "32"), ("not_shared", "0")):
                rates[name].append(_rate(port, total))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "jobs_per_s": {name: [round(rate) for rate in each] for name, each in rates.items()},
        "cost": round(1 - medians["shared"] / medians["not_shared"], 3),
    }


def _rate(port: int, total: str) -> float:
    """Jobs a second of one worker, after a warm-up."""
    with stack.broker() as broker, _workers(broker, 1, port, IMAGE_HOST_SHARED=total):
        client, results = Client(broker.url), broker.connect(1)
        for count in (100, FAST_PICTURES):
            started = time.monotonic()
            await_results(results, [job.id for job in client.submit_many(_captions(port, count))])
        return FAST_PICTURES / (time.monotonic() - started)


MEASURES = {"slow": slow, "many": many, "mixed": mixed, "fast": fast}


if __name__ == "__main__":
    measures.run(__doc__, MEASURES)
