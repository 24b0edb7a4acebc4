"""A receiver of Sentry's events: a real HTTP server on loopback that reads the SDK's envelopes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.web import Quiet, serving


@dataclass
class SentryReceiver:
    dsn: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)

    def of(self, id: str) -> list[dict[str, Any]]:
        """The events about a job."""
        return [event for event in self.events if event["tags"].get("job_id") == id]

    @contextmanager
    def open(self) -> Iterator[SentryReceiver]:
        with serving(_handler(self)) as port:
            self.dsn = f"http://key@127.0.0.1:{port}/1"
            yield self


def _handler(receiver: SentryReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            envelope = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
            # A header, then for each item a header and a payload, a line each.
            lines = [json.loads(line) for line in envelope.splitlines()]
            receiver.events += [
                payload for header, payload in zip(lines[1::2], lines[2::2], strict=True) if header["type"] == "event"
            ]
            self.send_response(200)
            self.end_headers()

    return Handler
