"""An image server that can be slow, or drop connections."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class Pictures:
    """`url` is a picture's address. `mood`: well, slow (it answers after `delay_s`), dead (it hangs up)."""

    def __init__(self) -> None:
        self.mood = "well"
        self.delay_s = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port: int = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/picture.png"

    @contextlib.contextmanager
    def open(self) -> Iterator[Pictures]:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="pictures", daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


def _handler(pictures: Pictures) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if pictures.mood == "dead":
                self.close_connection = True
                return
            if pictures.mood == "slow":
                time.sleep(pictures.delay_s)
            # The worker may have given up meanwhile, or died.
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.send_header("Content-Length", str(len(PNG)))
                self.end_headers()
                self.wfile.write(PNG)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(file, "PNG")
    return file.getvalue()


PNG = _png()
