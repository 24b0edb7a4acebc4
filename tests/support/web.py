"""HTTP servers on the loopback interface, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


class Quiet:
    """A handler of requests without a log."""

    def log_message(self, format: str, *args: object) -> None:
        """Not into the tests' output."""


@contextmanager
def serving(handler: Callable[..., Any], port: int = 0) -> Iterator[int]:
    """Answer requests with a handler; gives the server's port, by default a free one."""
    server = Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
