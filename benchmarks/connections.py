"""A picture's download on a kept connection and on a new one: `python -m benchmarks.connections [--save connections]`.

One thread downloads, without a worker; both kinds take turns. The servers run in processes of their own, and one closes
each connection after a picture. `ratio` is the new one's time for each of the kept one's. `far` simulates a round trip
of 30 ms: one for a connection, one for its TLS handshake, and one for each picture.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import ssl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import ip_network
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import measures
from tests.support.pictures import png
from tests.support.tls import server_context
from worker.images.fetch import Fetcher, FetchPolicy

NEAR_PICTURES, FAR_PICTURES, WARM_UP = 500, 60, 3
ROUND_TRIP_S = 0.03


def _serve(port: Connection, folder: Path, is_tls: bool, round_trip_s: float, keeps_open: bool) -> None:
    """Serve one client."""
    context = server_context(folder, "localhost") if is_tls else None
    picture = png("teal")
    option = "keep-alive" if keeps_open else "close"
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(picture)}\r\nConnection: {option}\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            time.sleep(round_trip_s)
            with contextlib.suppress(OSError), _wrapped(connection, context, round_trip_s) as stream:
                while stream.recv(65_536):
                    time.sleep(round_trip_s)
                    stream.sendall(head.encode() + picture)
                    if not keeps_open:
                        break


def _wrapped(connection: socket.socket, context: ssl.SSLContext | None, round_trip_s: float) -> socket.socket:
    if context is None:
        return connection
    time.sleep(round_trip_s)
    return context.wrap_socket(connection, server_side=True)


@contextlib.contextmanager
def _server(is_tls: bool, round_trip_s: float, keeps_open: bool) -> Iterator[Callable[[], bytes]]:
    """Serve; gives the function that downloads a picture."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        server = processes.Process(target=_serve, args=(theirs, Path(folder), is_tls, round_trip_s, keeps_open))
        server.start()
        try:
            port = ours.recv()
            certificate = Path(folder, "crt") if is_tls else None
            policy = FetchPolicy(allow_networks=(ip_network("127.0.0.0/8"),), ports=(port,), ca_file=certificate)
            yield partial(Fetcher(policy).fetch, f"http{'s' if is_tls else ''}://localhost:{port}/picture.png")
        finally:
            server.kill()
            server.join()


def _compared(is_tls: bool, round_trip_s: float = 0.0) -> dict[str, Any]:
    """Milliseconds of a picture, and of those the processor's in this process: medians."""
    wall: dict[str, list[float]] = {"kept": [], "new": []}
    cpu: dict[str, list[float]] = {"kept": [], "new": []}
    with _server(is_tls, round_trip_s, True) as kept, _server(is_tls, round_trip_s, False) as new:
        for number in range(-WARM_UP, FAR_PICTURES if round_trip_s else NEAR_PICTURES):
            for name, fetch in (("kept", kept), ("new", new)):
                began, cpu_began = time.monotonic(), time.process_time()
                fetch()
                if number >= 0:
                    cpu[name].append(time.process_time() - cpu_began)
                    wall[name].append(time.monotonic() - began)
    return {
        "ms": {name: round(1_000 * statistics.median(each), 2) for name, each in wall.items()},
        "cpu_ms": {name: round(1_000 * statistics.median(each), 2) for name, each in cpu.items()},
        "ratio": round(statistics.median(wall["new"]) / statistics.median(wall["kept"]), 2),
    }


MEASURES = {
    "plain": partial(_compared, False),
    "tls": partial(_compared, True),
    "plain_far": partial(_compared, False, ROUND_TRIP_S),
    "tls_far": partial(_compared, True, ROUND_TRIP_S),
}


if __name__ == "__main__":
    measures.run(__doc__, MEASURES)
