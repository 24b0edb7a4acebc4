"""Who receives callbacks: a real HTTP server on loopback that keeps what it gets and answers as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from standardwebhooks import Webhook

from tests.support.web import Quiet, serving

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NEW_SECRET = "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"


@dataclass(frozen=True)
class Call:
    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str = SECRET) -> Any:
        """By the library's own verifier."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass
class Receiver:
    port: int = 0
    calls: list[Call] = field(default_factory=list)
    #: Statuses of the next answers; then 204.
    answers: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    #: What each answer waits for, while it is not set.
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def called(self, path: str = "/hook") -> list[Call]:
        return [call for call in self.calls if call.path == path]

    @contextmanager
    def open(self) -> Iterator[Receiver]:
        """Listen, on the same port each time."""
        with serving(_handler(self), self.port) as self.port:
            try:
                yield self
            finally:
                self.gate.set()


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.calls.append(Call(self.path, headers, body, time.time()))
            receiver.gate.wait(20)
            try:
                self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()
            except OSError:
                """The caller did not wait."""

    return Handler
