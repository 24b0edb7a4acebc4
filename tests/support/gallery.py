"""An image server whose pictures come when the test says so: a job that shows one runs until then."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

from tests.support.pictures import png
from tests.support.web import Quiet, serving

PNG = png("teal")

#: Seconds between two header lines while a picture is held: the worker gives up a silent server.
DRIP_S = 0.5
#: Seconds until a test that forgot to release a picture fails.
MOST_HELD_S = 40.0


class Gallery:
    """Serves `/NAME`. `asked` holds the names in the order of their requests, `asked_at` the time of the last one."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.asked_at = 0.0
        self._held: dict[str, threading.Event] = {}
        self._broken: Counter[str] = Counter()
        self._changed = threading.Condition()
        self.port = 0

    def picture(self, name: str) -> str:
        """The URL of a picture that is there at once."""
        return f"http://127.0.0.1:{self.port}/{name}"

    def held(self, name: str) -> str:
        """The URL of a picture that comes once it is released."""
        self._held.setdefault(name, threading.Event())
        return self.picture(name)

    def broken(self, name: str, times: int) -> str:
        """The URL of a picture that comes after so many answers of 503."""
        self._broken[name] = times
        return self.picture(name)

    def release(self, *names: str) -> None:
        """Let held pictures go; without names all of them."""
        for name in names or tuple(self._held):
            self._held[name].set()

    def await_requests(self, *names: str, timeout: float = 20.0) -> None:
        """Wait until each was asked for: jobs that show them run."""
        with self._changed:
            seen = self._changed.wait_for(lambda: set(names) <= set(self.asked), timeout)
        assert seen, f"asked for {self.asked}, not for all of {names}"

    def await_release(self, name: str, drip: Callable[[], None]) -> None:
        event = self._held.get(name)
        for _ in range(int(MOST_HELD_S / DRIP_S)):
            if event is None or event.wait(DRIP_S):
                return
            drip()

    def note(self, name: str) -> bool:
        """Write a request down. True for one that is to fail."""
        with self._changed:
            self.asked.append(name)
            self.asked_at = time.monotonic()
            self._changed.notify_all()
            self._broken[name] -= 1
            return self._broken[name] >= 0

    @contextlib.contextmanager
    def open(self) -> Iterator[Gallery]:
        with serving(_handler(self)) as self.port:
            try:
                yield self
            finally:
                self.release()


def _handler(gallery: Gallery) -> type[BaseHTTPRequestHandler]:
    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            if gallery.note(name):
                self.send_error(503)
                return
            # The worker may have died meanwhile, or ended the job.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._show(name)

        def _show(self, name: str) -> None:
            self.send_response(200)
            self.flush_headers()
            gallery.await_release(name, self._drip)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG)

        def _drip(self) -> None:
            self.send_header("X-Patience", "please")
            self.flush_headers()

    return Handler
