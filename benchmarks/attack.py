"""Good jobs beside an attack: `python -m benchmarks.attack [--save attack] [KIND ...]`.

One hostile job is mixed in for each four good ones. A fifth of the jobs may use a fifth of the worker, so the good jobs
should keep 80 % of their throughput. The time runs from the first job until the last good job's answer is stored;
hostile jobs run, are retried and return to the queue meanwhile, as in production.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import os
import random
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from celery import Celery
from PIL import Image

from benchmarks import fuzz, measures
from benchmarks.contenders import await_results
from benchmarks.pictures import Drawings, PictureBook
from tasks import Caption, Client
from worker.demo import stack

ROUNDS = 2
GOOD, HOSTILE = 400, 100
#: Seconds between two bytes of a server that trickles: less than what a read waits.
DRIP_S = 1.0
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

#: A hostile job's arguments, from its number and the hostile servers' port.
Attack = Callable[[int, int], dict[str, Any]]


# --- Hostile servers: every address in 127/8 is another host of theirs ---


def _trickle(connection: socket.socket, start: bytes, piece: bytes) -> None:
    connection.sendall(start)
    while True:
        time.sleep(DRIP_S)
        connection.sendall(piece)


def _flood(connection: socket.socket, start: bytes, piece: bytes) -> None:
    connection.sendall(start)
    while True:
        connection.sendall(piece * 1_000)


#: A scan's header, and none of its pixels.
SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS: dict[str, Callable[[socket.socket], None]] = {
    "hang": lambda connection: time.sleep(60),
    "trickle": lambda connection: _trickle(connection, OK + b"Content-Length: 5000\r\n\r\n", b"x"),
    "headers": lambda connection: _trickle(connection, OK, b"X-Patience: please\r\n"),
    "interim": lambda connection: _flood(connection, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunks": lambda connection: _flood(connection, CHUNKED, b"1\r\nx\r\n"),
    "body": lambda connection: _flood(connection, OK + b"\r\n", b"x" * 100),
    "picture": lambda connection: _flood(connection, OK + b"\r\n\xff\xd8\xff", b"x" * 100),
}


def _serve(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        path = connection.recv(65_536).split(b" ")[1].decode()
        ANSWERS[path.split("/")[1]](connection)


@contextlib.contextmanager
def hostile_servers() -> Iterator[int]:
    """The port of them all; which one answers, its path says."""

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=_serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("", 0), backlog=1_024) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


# --- Attacks ---


def _show(source: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": [{"image": source}, "What is this?"], "max_new_tokens": 20, **more}


def _by_url(*answers: str) -> Attack:
    def attack(number: int, port: int) -> dict[str, Any]:
        return _show(
            f"http://127.1.{number // 250}.{number % 250 + 1}:{port}/{answers[number % len(answers)]}/{number}"
        )

    return attack


REFUSED = (
    "http://10.0.0.1/x.png",
    "http://169.254.169.254/latest/meta-data",
    "http://[::ffff:10.0.0.1]/x.png",
    "http://0x0a000001/x.png",
    "http://user@example.com/x.png",
    "http://127.0.0.1:6379/",
    "ftp://example.com/x.png",
    {"path": "../../etc/passwd"},
    {"path": "nothing.png"},
)


def _refused(number: int, port: int) -> dict[str, Any]:
    return _show(REFUSED[number % len(REFUSED)])


@functools.cache
def _bombs() -> list[bytes]:
    """Small files that declare far more pixels than are decoded, a strip, and a JPEG of endless scans."""
    pixel, strip, jpeg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "PNG")
    Image.new("1", (16_000, 2)).save(strip, "PNG")
    Image.new("RGB", (4_000, 4_000)).save(jpeg, "JPEG", progressive=True)
    sizes = [struct.pack(">II", edge, edge) for edge in (7_000, 20_000, 2**31 - 1)]
    giants = [fuzz.with_checksums(pixel.getvalue()[:16] + size + pixel.getvalue()[24:]) for size in sizes]
    return [*giants, strip.getvalue(), jpeg.getvalue()[:-2] + SCAN * 2_000]


def _picture(number: int, port: int) -> dict[str, Any]:
    """Bombs, garbage, and pictures that are cut or mutated."""
    chance = random.Random(number)
    data: bytes = (
        chance.choice(_bombs()),
        chance.randbytes(20_000),
        (good := chance.choice(_seeds()))[: len(good) // 2],
        fuzz.mutated(_seeds(), chance),
    )[number % 4]
    return _show(f"data:image/png;base64,{base64.b64encode(data).decode()}")


@functools.cache
def _seeds() -> list[bytes]:
    return fuzz.seeds()


BAD: tuple[dict[str, Any], ...] = (
    {"prompt": []},
    {"prompt": ["x" * 3_000_000]},
    {"prompt": ["x y " * 50_000], "max_new_tokens": 20},
    {"prompt": ["x"], "max_new_tokens": 10**400},
    {"prompt": ["x"], "nonsense": [[[[[[1]]]]]]},
    {"prompt": ["x"] * 20_000},
    {"prompt": [{"image": 1}], "temperature": "hot"},
    {"prompt": ["<image>" * 1_000]},
    {"prompt": ["x"], "metadata": {str(number): "x" * 100 for number in range(5_000)}},
)


def _payload(number: int, port: int) -> dict[str, Any]:
    return BAD[number % len(BAD)]


def _callback(number: int, port: int) -> dict[str, Any]:
    """The smallest of jobs, whose callback is forbidden or goes to a receiver that hangs."""
    urls = ("http://10.0.0.1/", "https://user@example.com/", f"http://127.2.0.{number % 250 + 1}:{port}/hang/x")
    return {
        "prompt": ["x"],
        "max_new_tokens": 1,
        "callback": {"url": urls[number % 3], "key_id": "main" if number % 5 else "none"},
    }


ATTACKS: dict[str, Attack] = {
    "refused": _refused,
    "hang": _by_url("hang"),
    "trickle": _by_url("trickle", "headers"),
    "flood": _by_url("interim", "chunks", "body"),
    # What begins like a picture is read up to IDEFICS_IMAGE_MAX_BYTES, as a sound one of that size is.
    "large": _by_url("picture"),
    "pictures": _picture,
    "payloads": _payload,
    "callbacks": _callback,
}


# --- The measure ---


@contextlib.contextmanager
def _workers(server: stack.Broker, root: Path, port: int) -> Iterator[None]:
    """A worker with its defaults, which may read the hostile servers, and a callbacks worker beside it."""
    settings = {
        "MODEL": "demo",
        "IMAGE_ROOT": str(root),
        "IMAGE_ALLOW_NETWORKS": "127.1.0.0/16",
        "IMAGE_PORTS": str(port),
        "CALLBACK_KEYS": f"main={SECRET}",
        "CALLBACK_ALLOW_HTTP": "true",
        "CALLBACK_ALLOW_NETWORKS": "127.2.0.0/16",
        "CALLBACK_PORTS": str(port),
        "BROKER_URL": server.url,
        "RESULT_BACKEND": server.results,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    environment |= {f"IDEFICS_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "celery", "-A", "worker.callbacks", "worker", "-n", "callbacks@attack"]
    with (
        stack.worker(server, "-n", "attacked@attack", settings=settings),
        stack.started(command, log=root / "callbacks.log", environment=environment),
    ):
        yield


class Site:
    """A worker, and the two that send it jobs."""

    def __init__(self, server: stack.Broker, book: PictureBook, port: int) -> None:
        self._client, self._book, self._port = Client(server.url), book, port
        self._results = server.connect(1)
        self._control = self._client.app.control
        # The attacker checks nothing before it sends.
        self._attacker = Celery("attacker", broker=server.url, backend=server.results, set_as_current=False)

    def rate(self, attack: Attack | None, good: int = GOOD) -> tuple[float, Counter[str]]:
        """Good jobs a second, and how the hostile ones had ended by then. All wait in the queue at the start."""
        pictures = [self._book.new() for _ in range(good)]
        arguments = [attack(number, self._port) for number in range(HOSTILE)] if attack else []
        self._control.cancel_consumer("idefics", destination=["attacked@attack"], reply=True)
        ids, hostile = [], []
        for number, picture in enumerate(pictures):
            if number % (GOOD // HOSTILE) == 0 and arguments:
                hostile.append(self._attack(arguments.pop()))
            ids.append(self._client.submit(Caption(image=picture, max_new_tokens=20)).id)
        started = time.monotonic()
        self._control.add_consumer("idefics", destination=["attacked@attack"], reply=True)
        await_results(self._results, ids)
        seconds = time.monotonic() - started
        return good / seconds, Counter(self._attacker.AsyncResult(id).state for id in hostile)

    def _attack(self, arguments: dict[str, Any]) -> str:
        return str(self._attacker.send_task("idefics.complete", kwargs=arguments, queue="idefics").id)


def measured(attack: Attack) -> dict[str, Any]:
    """In each round a worker of its own: the hostile jobs of the one before would go on."""
    rates: list[tuple[float, float]] = []
    ends: Counter[str] = Counter()
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder, hostile_servers() as port, stack.broker() as server:
            root = Path(folder)
            with _workers(server, root, port):
                site = Site(server, Drawings(root), port)
                site.rate(None, GOOD // 3)
                alone, _ = site.rate(None)
                beside, ended = site.rate(attack)
                rates.append((alone, beside))
                ends += ended
    ratios = [beside / alone for alone, beside in rates]
    return {
        "alone_per_s": [round(alone, 1) for alone, _ in rates],
        "beside_per_s": [round(beside, 1) for _, beside in rates],
        "hostile_ends": dict(ends),
        "ratio": round(statistics.median(ratios), 2),
    }


if __name__ == "__main__":
    measures.run(__doc__, {name: functools.partial(measured, attack) for name, attack in ATTACKS.items()})
