"""Servers and names on loopback for tests of what reads from the web.

127.0.0.2 plays the allowed public server, 127.0.0.1 and ::1 the canaries that must never be reached.
"""

from __future__ import annotations

import functools
import gzip
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from tasks.errors import ImageBlocked, ImageInvalid, ImageTooLarge, ImageUnreachable, JobError
from tests.support.tls import server_context

GOOD = "127.0.0.2"
BODY = b"\x89PNG\r\n\x1a\n" + b"the bytes of an image" * 100
MAX_BYTES = 100_000
#: Seconds. Much more than the tests' deadline, for a busy machine, and much less than the hostile servers last.
LEAVES_S = 3.0
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
#: By name: the answers of successive look-ups; the last one repeats.
NAMES: dict[str, list[list[str]]] = {
    "good.test": [[GOOD]],
    "www.good.test": [[GOOD]],
    "notgood.test": [[GOOD]],
    **{
        name: [["127.0.0.1", "::1"]]
        for name in ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback", "foo.localhost")
    },
    **{
        name: [["169.254.169.254"]]
        for name in ("metadata", "metadata.google.internal", "instance-data.ec2.internal", "169.254.169.254.nip.test")
    },
    "localtest.test": [["127.0.0.1"]],
    "multi2.test": [[GOOD, "127.0.0.1"]],
    "cgnat.test": [["100.64.0.1"]],
    "mapped.test": [["::ffff:127.0.0.1"]],
    "sixth.test": [["::1"]],
    "rebind.test": [[GOOD], ["127.0.0.1"]],
    "linklocal.test": [["fe80::1%lo"]],
    "empty.test": [[]],
}


@dataclass
class Server:
    """A listener that counts connections and answers each request's head with a script's bytes."""

    address: str
    port: int = 0
    answer: Callable[[socket.socket, str], None] | None = None
    #: Sent before any request.
    greeting: Callable[[socket.socket], None] | None = None
    tls: ssl.SSLContext | None = None
    #: Whether a connection stays open for further requests.
    keeps_open: bool = False
    hits: int = 0
    heads: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self._listener = socket.create_server((self.address, self.port), family=family)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.hits += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), self._plain(connection) as plain:
            if self.greeting:
                self.greeting(plain)
            while head := self._head(plain):
                self.heads.append(head)
                if self.answer:
                    self.answer(plain, head.split(" ")[1])
                if not self.keeps_open:
                    return

    @staticmethod
    def _head(plain: socket.socket) -> str:
        """The next request; empty at the connection's end."""
        head = b""
        while b"\r\n\r\n" not in head and (chunk := plain.recv(4096)):
            head += chunk
        return head.decode("latin-1")

    def _plain(self, connection: socket.socket) -> socket.socket:
        return self.tls.wrap_socket(connection, server_side=True) if self.tls else connection


def tls_server(folder: Path, name: str) -> ssl.SSLContext:
    """As `server_context`; skips the test where openssl is not installed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    return server_context(folder, name)


def response(body: bytes = BODY, status: str = "200 OK", **headers: object) -> bytes:
    fields: dict[str, object] = {"Content-Length": len(body)} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def trickle(connection: socket.socket, start: bytes, piece: bytes) -> None:
    connection.sendall(start)
    for _ in range(200):
        connection.sendall(piece)
        time.sleep(0.05)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def flood(connection: socket.socket, start: bytes, piece: bytes) -> None:
    connection.sendall(start)
    while True:
        connection.sendall(piece)


@functools.cache
def bomb() -> bytes:
    """Less than the cap, and 600 times the cap once it is inflated."""
    return gzip.compress(bytes(600 * MAX_BYTES))


HOSTILE_ANSWERS: dict[str, tuple[Callable[[socket.socket], None], type[JobError]]] = {
    "a trickled body": (
        lambda c: trickle(c, b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", b"x"),
        ImageUnreachable,
    ),
    "a trickled header": (lambda c: trickle(c, b"HTTP/1.1 200 OK\r\nX-A: ", b"x"), ImageUnreachable),
    "trickled 1xx answers": (lambda c: trickle(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n"), ImageUnreachable),
    "a trickled chunk size": (
        lambda c: trickle(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        ImageUnreachable,
    ),
    "trickled trailers": (
        lambda c: trickle(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
        ImageUnreachable,
    ),
    "silence": (lambda c: time.sleep(6), ImageUnreachable),
    "no answer at all": (lambda c: None, ImageUnreachable),
    "garbage": (lambda c: c.sendall(b"\x00\xff garbage \r\n\r\n" * 50), ImageUnreachable),
    "headers that no parser expects": (
        lambda c: c.sendall(response(Content_Type="multipart/mixed; boundary*0=a; boundary*=b")),
        ImageUnreachable,
    ),
    "endless 1xx answers": (
        lambda c: flood(c, b"", b"HTTP/1.1 100 Continue\r\nX-A: " + b"x" * 9999 + b"\r\n\r\n"),
        ImageTooLarge,
    ),
    "endless headers": (lambda c: flood(c, b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 99), ImageUnreachable),
    "an endless header": (lambda c: flood(c, b"HTTP/1.1 200 OK\r\nX-A: ", b"x" * 9999), ImageUnreachable),
    "an endless body": (lambda c: flood(c, b"HTTP/1.1 200 OK\r\n\r\n" + BODY, b"x" * 9999), ImageTooLarge),
    "an endless body of no picture": (lambda c: flood(c, b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 9999), ImageInvalid),
    "endless chunks": (
        lambda c: flood(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(BODY[:100])),
        ImageTooLarge,
    ),
    "an endless chunk size": (
        lambda c: flood(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 9999),
        ImageUnreachable,
    ),
    "a giant announced": (lambda c: c.sendall(response(b"", Content_Length=10**15)), ImageTooLarge),
    "a giant's giant announced": (
        lambda c: c.sendall(response(b"", Content_Length="9" * 4999)),
        ImageTooLarge,
    ),
    "fewer bytes than announced": (lambda c: c.sendall(response(Content_Length=9999)), ImageUnreachable),
    "two lengths": (lambda c: c.sendall(response(Content_Length="5, 6")), ImageInvalid),
    "a cut chunk": (
        lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc"),
        ImageUnreachable,
    ),
    "gzip": (lambda c: c.sendall(response(Content_Encoding="gzip")), ImageInvalid),
    "a gzip bomb": (lambda c: c.sendall(response(bomb(), Content_Encoding="gzip")), ImageInvalid),
    "an encoding beside a label": (lambda c: c.sendall(response(Content_Encoding="utf-8, BR")), ImageInvalid),
    "a redirect to nowhere": (lambda c: c.sendall(response(status="302 Found")), ImageInvalid),
    "a redirect with an endless body": (
        lambda c: flood(c, b"HTTP/1.1 302 Found\r\nLocation: /ok\r\n\r\n", b"x" * 9999),
        ImageBlocked,
    ),
    "early hints only": (lambda c: c.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n"), ImageUnreachable),
    "trickled early hints": (lambda c: trickle(c, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), ImageUnreachable),
    "endless early hints": (lambda c: flood(c, b"", b"HTTP/1.1 103 Early Hints\r\nX-A: b\r\n\r\n"), ImageTooLarge),
    "early hints without end": (
        lambda c: flood(c, b"HTTP/1.1 103 Early Hints\r\nX-A: ", b"x" * 9999),
        ImageTooLarge,
    ),
    "another protocol": (
        lambda c: c.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n" + BODY),
        ImageInvalid,
    ),
}


def script(connection: socket.socket, path: str) -> None:
    _, kind, *rest = path.split("?")[0].split("/")
    if kind == "ok":
        connection.sendall(response())
    elif kind == "chunked":
        size = f"{len(BODY):x}".encode()
        start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(start + size + b"\r\n" + BODY + b"\r\n0\r\n\r\n")
    elif kind == "redir" and rest[0].isalnum():
        target = bytes.fromhex(rest[0]).decode()
        connection.sendall(response(b"", "302 Found", Location=target, Set_Cookie="a=b; Path=/"))
    elif kind == "loop":
        connection.sendall(response(b"", "302 Found", Location="/loop"))
    elif kind == "hops":
        left = int(rest[0])
        connection.sendall(response(b"", "307 Moved", Location=f"{left - 1}") if left else response())
    elif kind == "status":
        connection.sendall(response(b"no", f"{rest[0]} Sorry", Retry_After=1))
    elif kind == "hostile":
        HOSTILE_ANSWERS[list(HOSTILE_ANSWERS)[int(rest[0])]][0](connection)
    else:
        connection.sendall(response(b"", "404 Not Found"))


class Resolver:
    """socket.getaddrinfo for the names above. Numbers go to the real one, which then makes no query."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.asked: list[str] = []
        self._real = real

    def __call__(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        name = host.rstrip(".").lower()
        self.asked.append(name)
        if name not in NAMES:
            return self._real(host, port, *args, **kwargs, flags=socket.AI_NUMERICHOST)
        answers = NAMES[name]
        chosen = answers[min(self.asked.count(name), len(answers)) - 1]
        return [self._answer(address, port) for address in chosen]

    @staticmethod
    def _answer(address: str, port: int) -> tuple[Any, ...]:
        if ":" in address:
            return socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)
        return socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)


def redirect(target: str) -> str:
    return f"/redir/{target.encode().hex()}"


def open_files() -> int:
    """File descriptors that this process holds."""
    return sum(1 for _ in Path("/dev/fd").iterdir())


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds
