"""The HTTP server of the review page: on loopback, for the one person who has its address."""

from __future__ import annotations

import json
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ..errors import IdeficsError, InvalidRequest, from_broker
from ..page import document, part, policy
from .guard import PAGE, Guard, Refusal, body_length, split_target
from .session import Session

#: Seconds that a connection may take in all; each has one request.
CONNECTION_S = 30.0
#: Connections at once: a browser keeps up to six.
CONNECTIONS = 32
#: The page's pictures are `blob:` URLs that its script makes; `data:` is its empty icon.
_SOURCES = "img-src blob: data:; connect-src 'self'"
_STYLES = (part("base.css"), part("page.css", __package__))
_SCRIPTS = (part("dom.js"), part("pictures.js", __package__), part("page.js", __package__))
#: What no other page may do with this one, and what its script may never do: make HTML of a text.
_CLOSED = "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Reply:
    """A response."""

    body: bytes
    content_type: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK
    policy: str = "default-src 'none'"


class ReviewServer(ThreadingHTTPServer):
    """Serves the page on a port of 127.0.0.1; 0 takes a free one. Raises OSError if the port is taken.

    Call `handle_request` until the end, which returns after `timeout` seconds without one; then `server_close`, which
    waits for decisions that are being saved.
    """

    daemon_threads = False
    timeout = 0.2

    def __init__(self, session: Session, port: int, connection_s: float = CONNECTION_S) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.session = session
        self.guard = Guard(self.server_port, secrets.token_urlsafe(24))
        self._connection_s = connection_s
        self.connections: set[socket.socket] = set()
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """The page's address, with the token."""
        return f"http://127.0.0.1:{self.server_port}{PAGE}?token={self.guard.token}"

    @cached_property
    def page(self) -> Reply:
        """The page, which has no item in it: its script asks for them."""
        body = part("page.html", __package__)
        html = document("Review", body, {"token": self.guard.token}, _STYLES, _SCRIPTS, _SOURCES)
        allowed = policy(_STYLES, _SCRIPTS, _SOURCES)
        return Reply(html.encode(), "text/html; charset=utf-8", policy=allowed)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection within the time that it may take; beyond the number of connections, close it."""
        with self._counted(request) as has_room:
            if has_room:
                super().process_request_thread(request, client_address)
            else:
                self.shutdown_request(request)

    def server_close(self) -> None:
        """Close the port, end connections without a request, and wait for those that have one."""
        with self._lock:
            for connection in self.connections:
                _shut(connection, socket.SHUT_RD)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless the browser has closed its connection early."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @contextmanager
    def _counted(self, connection: socket.socket) -> Iterator[bool]:
        with self._lock:
            has_room = len(self.connections) < CONNECTIONS
            if has_room:
                self.connections.add(connection)
        timer = threading.Timer(self._connection_s, _shut, (connection, socket.SHUT_RDWR))
        timer.daemon = True
        timer.start()
        try:
            yield has_room
        finally:
            timer.cancel()
            with self._lock:
                self.connections.discard(connection)


def _shut(connection: socket.socket, how: int) -> None:
    try:
        connection.shutdown(how)
    except OSError:
        # It is closed already.
        return


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    server_version, sys_version = "idefics-jobs", ""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the page's address has the token."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replaces http.server's page for what is no request, or of another method."""
        self.close_connection = True
        self._send(_json({"error": "This is no request of the page."}, HTTPStatus(code)))

    def _answer(self, method: str) -> None:
        try:
            reply = self._reply(method)
        except Refusal as refusal:
            reply = _json({"error": str(refusal)}, refusal.status)
        except InvalidRequest as error:
            reply = _json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (IdeficsError, RedisError, OperationalError) as error:
            reply = _json({"error": str(from_broker(error))}, HTTPStatus.SERVICE_UNAVAILABLE)
        self._send(reply)

    def _reply(self, method: str) -> Reply:
        path, parameters = split_target(self.path)
        self.server.guard.check(method, path, parameters, self.headers)
        session = self.server.session
        match method, path:
            case "GET", "/":
                return self.server.page
            case "GET", "/items":
                return _json(session.items(parameters))
            case "GET", "/picture":
                return Reply(session.picture(parameters), "image/jpeg")
            case "POST", "/decide":
                return _json(session.decide(self._body()))
            case "POST", "/undo":
                return _json(session.undo(self._body()))
            case _:
                raise Refusal(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _body(self) -> dict[str, Any]:
        length = body_length(self.headers)
        content = self.rfile.read(length)
        try:
            # A connection that ended before the whole body came has not asked for anything.
            asked = json.loads(content) if len(content) == length else None
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "The body must be a JSON object.")
        return asked

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        headers = {"Content-Type": reply.content_type, "Content-Length": str(len(reply.body)), **_HEADERS}
        headers["Content-Security-Policy"] = f"{reply.policy}; {_CLOSED}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)


def _json(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Reply:
    return Reply(json.dumps(value).encode(), status=status)
