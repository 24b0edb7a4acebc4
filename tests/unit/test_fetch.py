"""Threats to the fetching of images.

All traffic stays on loopback: 127.0.0.2 plays the allowed public server, 127.0.0.1 and ::1 the canaries that must
never be reached.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import itertools
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from config.settings import Settings
from tasks.errors import ImageBlocked, ImageInvalid, ImageTooLarge, ImageUnreachable, JobError
from tasks.payloads import ImagePath
from worker.images import fetch
from worker.images.decode import FORMATS
from worker.images.fetch import (
    Fetcher,
    FetchPolicy,
    is_allowed_address,
    is_public,
    retry_after_s,
    tls_context,
    user_agent,
)
from worker.net.deadline import Deadline

GOOD = "127.0.0.2"
BODY = b"\x89PNG\r\n\x1a\n" + b"the bytes of an image" * 100
MAX_BYTES = 100_000
SECRET = "s3cr3t-token"
#: Seconds. Much more than the tests' deadline, for a busy machine, and much less than the hostile servers last.
LEAVES_S = 3.0
#: Bytes while a hostile server is read, both ends together: the cap some times over, for buffers and copies.
MOST_MEMORY = 10 * MAX_BYTES

HOSTILE_URLS = r"""
http://127.0.0.1:{port}/x
http://LOCALHOST:{port}/x
http://127.1:{port}/x
http://2130706433:{port}/x
http://017700000001:{port}/x
http://0x7f.1:{port}/x
http://127.0.0.1.:{port}/x
http://0.0.0.0:{port}/x
http://[::1]:{port}/x
http://[0:0:0:0:0:0:0:1]:{port}/x
http://[::ffff:7f00:1]:{port}/x
http://[::ffff:0:127.0.0.1]:{port}/x
http://[64:ff9b:1::7f00:1]:{port}/x
http://[2001:0:7f00:1::]:{port}/x
http://[fe80::1%25lo]:{port}/x
http://[fd00:ec2::254]:{port}/x
http://[ff02::1]:{port}/x
http://169.254.169.254:{port}/x
http://0xA9FEA9FE:{port}/x
http://[::ffff:169.254.169.254]:{port}/x
http://169.254.170.2:{port}/x
http://168.63.129.16:{port}/x
http://metadata.google.internal:{port}/x
http://172.16.0.1:{port}/x
http://192.168.1.1:{port}/x
http://192.0.2.1:{port}/x
http://198.51.100.1:{port}/x
http://224.0.0.1:{port}/x
http://255.255.255.255:{port}/x
http://localtest.test:{port}/x
http://multi2.test:{port}/x
http://cgnat.test:{port}/x
http://①②⑦.⓪.⓪.①:{port}/x
http://%31%32%37.0.0.1:{port}/x
http://good.test:{port}@127.0.0.1:{port}/x
http://127.0.0.1:{port}\@good.test:{port}/
http://good.test:{port}#@127.0.0.1:{port}/
http://127.0.0.1:{port}?@good.test:{port}/
http:127.0.0.1:{port}/
http://127.0.0.1:{port} .good.test/
http://127.0.0.1:{port}%00.good.test/
HTTP://127.0.0.1:{port}/
http://[good.test]:{port}/
http://2130706433.:{port}/x
http://0x7f000001:{port}/x
http://0x7F.0x0.0x0.0x1:{port}/x
http://0177.0.0.1:{port}/x
http://00000177.0.0.1:{port}/x
http://0177.0x0.0.1:{port}/x
http://127.0.1:{port}/x
http://127.65793:{port}/x
http://127.00.00.01:{port}/x
http://127.0.0.1..:{port}/x
http://0.0.0.1:{port}/x
http://0x0:{port}/x
http://00:{port}/x
http://localhost.:{port}/x
http://LocalHost..:{port}/x
http://localhost.localdomain:{port}/x
http://ip6-localhost:{port}/x
http://ip6-loopback:{port}/x
http://foo.localhost:{port}/x
http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/x
http://ｌｏｃａｌｈｏｓｔ:{port}/x
http://loc%61lhost:{port}/x
http://loc{hyphen}alhost:{port}/x
http://１２７.０.０.１:{port}/x
http://127．0．0．1:{port}/x
http://127｡0｡0｡1:{port}/x
http://²¹³⁰⁷⁰⁶⁴³³:{port}/x
http://𝟙𝟚𝟟.𝟘.𝟘.𝟙:{port}/x
http://[::ffff:127.0.0.1]:{port}/x
http://[::FFFF:7F00:0001]:{port}/x
http://[0000:0000:0000:0000:0000:ffff:7f00:0001]:{port}/x
http://[::ffff:0.0.0.0]:{port}/x
http://[::7f00:1]:{port}/x
http://[0::1]:{port}/x
http://[::0001]:{port}/x
http://[::1%251]:{port}/x
http://[::1%eth0]:{port}/x
http://[::1].:{port}/x
http://[[::1]]:{port}/x
http://[2001:db8::1]:{port}/x
http://[fe80::a9fe:a9fe]:{port}/x
http://[::ffff:a9fe:a9fe]:{port}/x
http://[64:ff9b::a9fe:a9fe]:{port}/x
http://[2002:a9fe:a9fe::]:{port}/x
http://[fd20:ce::254]:{port}/x
http://2852039166:{port}/latest/meta-data/
http://0251.0376.0251.0376:{port}/x
http://0251.254.169.254:{port}/x
http://169.254.43518:{port}/x
http://169.254.169.254.:{port}/x
http://metadata:{port}/x
http://metadata.google.internal.:{port}/x
http://METADATA.google.INTERNAL:{port}/computeMetadata/v1/
http://instance-data.ec2.internal:{port}/x
http://169.254.169.254.nip.test:{port}/x
http://169.254.170.23:{port}/x
http://169.254.0.23:{port}/x
http://100.88.222.5:{port}/x
http://127.0.0.1:{port}@good.test:{port}/ok
http://good.test@127.0.0.1:{port}/x
http://good.test%40127.0.0.1:{port}/x
http://user:good.test@[::1]:{port}/x
http://127.0.0.1:{port}#good.test
http://127.0.0.1:{port}#@good.test/
http://127.0.0.1:{port}/#http://good.test:{port}/ok
http://127.0.0.1:{port}%23@good.test:{port}/
http://127.0.0.1:{port}%2f.good.test:{port}/
http://127.0.0.1:{port};good.test/
http://127.0.0.1\t:{port}/x
http://127.0.0.1:{port}:{port}/x
http://127.0.0.1:0{port}/x
http://127.0.0.1:+{port}/x
http://127.0.0.1: {port}/x
http:/127.0.0.1:{port}/x
http:///127.0.0.1:{port}/x
http:\\127.0.0.1:{port}\x
hTTp://127.0.0.1:{port}/x
FILE:///etc/passwd
gopher://127.0.0.1:6379/_INFO
data:text/plain,hi
unix:///var/run/x
ldap://127.0.0.1/
http://good.test:22/
http://good.test:0/
http://good.test:-1/
http:///
http://good.test:{port}/redir/687474703a2f2f3132372e302e302e313a383030302f72
http://good.test:{port}/redir/66696c653a2f2f2f6574632f706173737764
http://good.test:{port}/redir/687474703a2f2f676f6f642e746573743a38303030403132372e302e302e313a383030302f
http://good.test:{port}/redir/687474703a2f2f676f6f642e746573743a32322f
http://good.test:{port}/loop

http://[::]:{port}/x
http://[::127.0.0.1]:{port}/x
http://[64:ff9b::127.0.0.1]:{port}/x
http://[2002:7f00:1::]:{port}/x
http://[fec0::1]:{port}/x
http://[::1%25lo]:{port}/x
http://127.0.0.1
http://0177.0.0.01:{port}/x
http://0:{port}/x
http://127.255.255.254:{port}/x
http://10.0.0.1:{port}/x
http://100.100.100.200:{port}/x
http://192.0.0.192:{port}/x
http://mapped.test:{port}/x
http://sixth.test:{port}/x
http://user@good.test:{port}/ok
http://user:password@good.test:{port}/ok
http://@good.test:{port}/ok
http://good.test:{port}\ok
http://good.test:{port}/ok{tab}
http://good.test{colon}{port}/ok
http://127。0。0。1:{port}/x
http://[::1]@good.test:{port}/ok
http://a..b:{port}/x
//good.test:{port}/ok
good.test:{port}/ok
ftp://good.test:{port}/ok
javascript:alert(1)
blob:http://good.test:{port}/ok
view-source:http://127.0.0.1:{port}/
data:image/svg+xml,<svg/>
data:image/png,hi
""".strip().splitlines()  # noqa: RUF001 - digits and letters that only look like others

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
    hits: int = 0
    heads: list[str] = field(default_factory=list)

    def __enter__(self) -> Server:
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
            head = b""
            while b"\r\n\r\n" not in head and (chunk := plain.recv(4096)):
                head += chunk
            self.heads.append(head.decode("latin-1"))
            if self.answer and head:
                self.answer(plain, self.heads[-1].split(" ")[1])

    def _plain(self, connection: socket.socket) -> socket.socket:
        return self.tls.wrap_socket(connection, server_side=True) if self.tls else connection


def response(body: bytes = BODY, status: str = "200 OK", **headers: object) -> bytes:
    fields: dict[str, object] = {"Content-Length": len(body)} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def _trickle(connection: socket.socket, start: bytes, piece: bytes) -> None:
    connection.sendall(start)
    for _ in range(200):
        connection.sendall(piece)
        time.sleep(0.05)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _flood(connection: socket.socket, start: bytes, piece: bytes) -> None:
    connection.sendall(start)
    while True:
        connection.sendall(piece)


@functools.cache
def _bomb() -> bytes:
    """Less than the cap, and 600 times the cap once it is inflated."""
    return gzip.compress(bytes(600 * MAX_BYTES))


HOSTILE_ANSWERS: dict[str, tuple[Callable[[socket.socket], None], type[JobError]]] = {
    "a trickled body": (
        lambda c: _trickle(c, b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", b"x"),
        ImageUnreachable,
    ),
    "a trickled header": (lambda c: _trickle(c, b"HTTP/1.1 200 OK\r\nX-A: ", b"x"), ImageUnreachable),
    "trickled 1xx answers": (lambda c: _trickle(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n"), ImageUnreachable),
    "a trickled chunk size": (
        lambda c: _trickle(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        ImageUnreachable,
    ),
    "trickled trailers": (
        lambda c: _trickle(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
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
        lambda c: _flood(c, b"", b"HTTP/1.1 100 Continue\r\nX-A: " + b"x" * 9999 + b"\r\n\r\n"),
        ImageTooLarge,
    ),
    "endless headers": (lambda c: _flood(c, b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 99), ImageUnreachable),
    "an endless header": (lambda c: _flood(c, b"HTTP/1.1 200 OK\r\nX-A: ", b"x" * 9999), ImageUnreachable),
    "an endless body": (lambda c: _flood(c, b"HTTP/1.1 200 OK\r\n\r\n" + BODY, b"x" * 9999), ImageTooLarge),
    "an endless body of no picture": (lambda c: _flood(c, b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 9999), ImageInvalid),
    "endless chunks": (
        lambda c: _flood(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", _chunk(BODY[:100])),
        ImageTooLarge,
    ),
    "an endless chunk size": (
        lambda c: _flood(c, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 9999),
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
    "a gzip bomb": (lambda c: c.sendall(response(_bomb(), Content_Encoding="gzip")), ImageInvalid),
    "an encoding beside a label": (lambda c: c.sendall(response(Content_Encoding="utf-8, BR")), ImageInvalid),
    "a redirect to nowhere": (lambda c: c.sendall(response(status="302 Found")), ImageInvalid),
    "a redirect with an endless body": (
        lambda c: _flood(c, b"HTTP/1.1 302 Found\r\nLocation: /ok\r\n\r\n", b"x" * 9999),
        ImageBlocked,
    ),
    "early hints only": (lambda c: c.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n"), ImageUnreachable),
    "trickled early hints": (lambda c: _trickle(c, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), ImageUnreachable),
    "endless early hints": (lambda c: _flood(c, b"", b"HTTP/1.1 103 Early Hints\r\nX-A: b\r\n\r\n"), ImageTooLarge),
    "early hints without end": (
        lambda c: _flood(c, b"HTTP/1.1 103 Early Hints\r\nX-A: ", b"x" * 9999),
        ImageTooLarge,
    ),
    "another protocol": (
        lambda c: c.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n" + BODY),
        ImageInvalid,
    ),
}


def _script(connection: socket.socket, path: str) -> None:
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
    """socket.getaddrinfo for the names above. Numbers go to the real one, which then asks nobody."""

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


@pytest.fixture(autouse=True)
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    stub = Resolver(socket.getaddrinfo)
    monkeypatch.setattr(socket, "getaddrinfo", stub)
    return stub


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A guard that fails must not let a test's packet out of this machine."""
    strangers: list[str] = []
    real = socket.socket.connect

    def connect(self: socket.socket, target: Any) -> None:
        address = ip_address(str(target[0]).partition("%")[0])
        if not address.is_loopback and str(address) != "0.0.0.0":
            strangers.append(str(address))
            raise OSError("not loopback")
        real(self, target)

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield strangers
    assert strangers == []


@pytest.fixture(scope="module")
def good() -> Iterator[Server]:
    with Server(GOOD, answer=_script) as server:
        yield server


@pytest.fixture(scope="module")
def canaries(good: Server) -> Iterator[list[Server]]:
    with Server("127.0.0.1", port=good.port, answer=_script) as fourth:
        try:
            with Server("::1", port=good.port, answer=_script) as sixth:
                yield [fourth, sixth]
        except OSError:
            yield [fourth]


_TLS = tls_context()


@pytest.fixture(autouse=True)
def one_tls_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the authorities takes most of a plain test's time."""
    monkeypatch.setattr("worker.images.fetch.tls_context", lambda *_: _TLS)


@pytest.fixture
def policy(good: Server) -> FetchPolicy:
    return FetchPolicy(
        allow_networks=(ip_network(GOOD),),
        ports=(good.port, 80),
        max_bytes=MAX_BYTES,
    )


@pytest.fixture
def hasty(policy: FetchPolicy) -> FetchPolicy:
    return replace(policy, connect_s=0.5, read_s=0.4, total_s=0.6)


@pytest.fixture
def fetcher(policy: FetchPolicy) -> Fetcher:
    return Fetcher(policy)


def _redirect(target: str) -> str:
    return f"/redir/{target.encode().hex()}"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@contextmanager
def within_memory(most: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


# --- Addresses ---


def test_the_good_server_is_read(fetcher: Fetcher, good: Server) -> None:
    for path in ("/ok", "/ok?a=b@c", "/chunked", "/ok#fragment", "/ok/x@y/z"):
        assert fetcher.fetch(f"http://good.test:{good.port}{path}") == BODY


def test_no_hostile_url_and_no_redirect_to_one_reaches_a_canary(
    fetcher: Fetcher, good: Server, canaries: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    for canary in canaries:
        canary.hits = 0
    signs = {"port": good.port, "tab": "\t", "colon": "\uff1a", "hyphen": "\u00ad"}
    direct = [url.format(**signs) for url in HOSTILE_URLS if url]
    targets = [url for url in direct if "good.test" not in url]
    redirected = [f"http://good.test:{good.port}{_redirect(target)}" for target in targets]
    wrong = [(url, end) for url in direct if (end := _end(fetcher, url)) != "image_blocked"]
    # A redirect that names no URL at all is the server's fault.
    wrong += [
        (target, end)
        for target, url in zip(targets, redirected, strict=True)
        if (end := _end(fetcher, url)) not in ("image_blocked", "image_invalid")
    ]
    hits = {canary.address: canary.hits for canary in canaries}
    with capsys.disabled():
        print(f"\n{len(direct)} hostile URLs and {len(redirected)} redirects to such tried, canaries reached: {hits}")
    assert wrong == []
    assert set(hits.values()) == {0}
    assert len(set(direct)) > 110


def _end(fetcher: Fetcher, url: str) -> str:
    try:
        fetcher.fetch(url)
    except JobError as error:
        return error.code
    return "read"


def test_the_canary_can_be_reached_when_its_network_is_allowed(
    policy: FetchPolicy, good: Server, canaries: list[Server]
) -> None:
    open_to_all = replace(policy, allow_networks=(ip_network("127.0.0.0/8"), ip_network("::1")))
    for canary, host in zip(canaries, ("127.0.0.1", "[::1]"), strict=False):
        hits = canary.hits
        assert Fetcher(open_to_all).fetch(f"http://{host}:{good.port}/ok") == BODY
        assert canary.hits == hits + 1


def test_a_name_is_looked_up_once_so_it_cannot_be_rebound(
    fetcher: Fetcher, good: Server, canaries: list[Server], resolver: Resolver
) -> None:
    hits = [canary.hits for canary in canaries]
    assert fetcher.fetch(f"http://rebind.test:{good.port}/ok") == BODY
    assert resolver.asked.count("rebind.test") == 1
    with pytest.raises(ImageBlocked):
        fetcher.fetch(f"http://rebind.test:{good.port}/ok")
    assert [canary.hits for canary in canaries] == hits


def test_a_name_rebound_between_redirects_is_refused(fetcher: Fetcher, good: Server, canaries: list[Server]) -> None:
    hits = [canary.hits for canary in canaries]
    with pytest.raises(ImageBlocked):
        fetcher.fetch(f"http://rebind.test:{good.port}/hops/1")
    assert [canary.hits for canary in canaries] == hits


def test_an_unknown_or_empty_name_is_retryable(fetcher: Fetcher, good: Server) -> None:
    for host in ("unknown.test", "empty.test"):
        with pytest.raises(ImageUnreachable, match=f"{host} has no address"):
            fetcher.fetch(f"http://{host}:{good.port}/ok")


def test_a_link_local_answer_with_a_zone_is_refused(fetcher: Fetcher, good: Server) -> None:
    with pytest.raises(ImageBlocked):
        fetcher.fetch(f"http://linklocal.test:{good.port}/ok")


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8", "168.63.129.17"],
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "0.1.2.3",
        "10.9.8.7",
        "100.64.0.1",
        "100.127.255.255",
        "127.9.9.9",
        "169.254.0.1",
        "172.31.255.255",
        "192.0.0.8",
        "192.0.0.170",
        "192.0.2.9",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.168.255.1",
        "192.175.48.1",
        "198.19.255.255",
        "198.51.100.9",
        "203.0.113.9",
        "168.63.129.16",
        "224.0.0.251",
        "233.252.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::8.8.8.8",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:0:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:10::1",
        "2001:1ff::1",
        "2001:db8::1",
        "2002:808:808::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "feff::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_other_addresses_are_not(address: str) -> None:
    assert not is_public(ip_address(address))


def test_an_operator_can_allow_a_network(policy: FetchPolicy) -> None:
    inner = replace(policy, allow_networks=(ip_network("10.1.0.0/16"), ip_network("fd00::/8")))
    assert is_allowed_address(ip_address("10.1.2.3"), inner)
    assert is_allowed_address(ip_address("::ffff:10.1.2.3"), inner)
    assert is_allowed_address(ip_address("fd00::1"), inner)
    assert not is_allowed_address(ip_address("10.2.0.1"), inner)
    assert not is_allowed_address(ip_address("127.0.0.1"), inner)


# --- Domains, ports, redirects ---


def test_only_allowed_domains_and_their_sub_domains_are_read(policy: FetchPolicy, good: Server) -> None:
    fetcher = Fetcher(replace(policy, allow_domains=("Good.test", "other.test")))
    for host in ("good.test", "WWW.good.test", "good.test."):
        assert fetcher.fetch(f"http://{host}:{good.port}/ok") == BODY
    for host in ("notgood.test", GOOD, "test", "good.test.evil.test"):
        with pytest.raises(ImageBlocked, match="domain"):
            fetcher.fetch(f"http://{host}:{good.port}/ok")


def test_a_redirect_out_of_the_allowed_domains_is_refused(policy: FetchPolicy, good: Server) -> None:
    fetcher = Fetcher(replace(policy, allow_domains=("good.test",)))
    with pytest.raises(ImageBlocked, match="domain"):
        fetcher.fetch(f"http://good.test:{good.port}{_redirect(f'http://notgood.test:{good.port}/ok')}")


def test_port_zero_does_not_become_the_default_port(policy: FetchPolicy) -> None:
    with pytest.raises(ImageBlocked, match="port"):
        Fetcher(policy).fetch("http://good.test:0/")


@pytest.mark.parametrize("most", [0, 3, 5])
def test_so_many_redirects_are_followed_and_no_more(most: int, policy: FetchPolicy, good: Server) -> None:
    fetcher = Fetcher(replace(policy, max_redirects=most))
    assert fetcher.fetch(f"http://good.test:{good.port}/hops/{most}") == BODY
    with pytest.raises(ImageBlocked, match=f"more than {most} redirects"):
        fetcher.fetch(f"http://good.test:{good.port}/hops/{most + 1}")


def test_five_redirects_are_the_default() -> None:
    assert FetchPolicy().max_redirects == Settings().image_max_redirects == 5


@pytest.mark.parametrize("before", [b"100 Continue", b"102 Processing", b"103 Early Hints", b"199 Whatever"])
def test_informational_answers_are_read_past(before: bytes, policy: FetchPolicy) -> None:
    start = b"HTTP/1.1 %s\r\nLink: </style.css>; rel=preload\r\n\r\n" % before
    with Server(GOOD, answer=lambda connection, _: connection.sendall(start * 3 + response())) as server:
        assert _alone(policy, server).fetch(f"http://good.test:{server.port}/") == BODY


@pytest.mark.parametrize(
    "answer",
    [
        response(status="203 Non-Authoritative Information"),
        *(
            response(Content_Encoding=label)
            for label in ("utf-8", "UTF-8", "binary", "none", "", "identity", "8bit", "base64")
        ),
    ],
)
def test_labels_that_change_no_byte_are_left_aside(answer: bytes, policy: FetchPolicy) -> None:
    with Server(GOOD, answer=lambda connection, _: connection.sendall(answer)) as server:
        assert _alone(policy, server).fetch(f"http://good.test:{server.port}/") == BODY


def _alone(policy: FetchPolicy, server: Server) -> Fetcher:
    return Fetcher(replace(policy, ports=(server.port,)))


def test_a_redirect_may_hold_spaces_and_change_the_host(fetcher: Fetcher, good: Server) -> None:
    target = f"http://www.good.test:{good.port}/ok/a b"
    assert fetcher.fetch(f"http://good.test:{good.port}{_redirect(target)}") == BODY
    assert "GET /ok/a%20b " in good.heads[-1]


def test_the_request_carries_nothing_but_what_it_needs(
    fetcher: Fetcher, good: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine good.test login me password pw\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1")
    fetcher.fetch(f"http://good.test:{good.port}{_redirect('/ok')}")
    for head in good.heads[-2:]:
        names = {line.partition(":")[0].lower() for line in head.strip().splitlines()[1:]}
        assert names == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert "Accept-Encoding: identity\r\n" in good.heads[-1]
    assert f"User-Agent: {user_agent()}\r\n" in good.heads[-1]


def test_a_redirects_target_is_read_as_utf_8(fetcher: Fetcher, good: Server) -> None:
    assert fetcher.fetch(f"http://good.test:{good.port}{_redirect('/ok/café')}") == BODY
    assert "GET /ok/caf%C3%A9 " in good.heads[-1]


# --- TLS ---


def _certificate(folder: Path, name: str) -> ssl.SSLContext:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl makes the certificate")
    command = f"{program} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
    files = [
        "-addext",
        f"subjectAltName=DNS:{name}",
        "-keyout",
        str(folder / "key"),
        "-out",
        str(folder / "crt"),
    ]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=20)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    return context


@pytest.fixture
def secure(tmp_path: Path, policy: FetchPolicy, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Fetcher, Server]]:
    monkeypatch.setattr("worker.images.fetch.tls_context", tls_context)
    with Server(GOOD, answer=_script, tls=_certificate(tmp_path, "good.test")) as server:
        fetcher = Fetcher(replace(policy, ports=(*policy.ports, server.port)))
        yield fetcher, server


def test_a_certificate_must_be_trusted_and_of_that_name(secure: tuple[Fetcher, Server], tmp_path: Path) -> None:
    fetcher, server = secure
    with pytest.raises(ImageUnreachable, match="certificate"):
        fetcher.fetch(f"https://good.test:{server.port}/ok")
    fetcher._tls.load_verify_locations(tmp_path / "crt")
    assert fetcher.fetch(f"https://good.test:{server.port}/ok") == BODY
    with pytest.raises(ImageUnreachable, match="certificate"):
        fetcher.fetch(f"https://notgood.test:{server.port}/ok")


def test_an_operators_own_authority_is_trusted_beside_the_public_ones(
    secure: tuple[Fetcher, Server], tmp_path: Path, policy: FetchPolicy
) -> None:
    _, server = secure
    policy = replace(policy, ports=(server.port,), ca_file=tmp_path / "crt")
    fetcher = Fetcher(policy)
    assert fetcher.fetch(f"https://good.test:{server.port}/ok") == BODY
    assert len(fetcher._tls.get_ca_certs()) > 50
    with pytest.raises(ImageUnreachable, match="certificate"):
        fetcher.fetch(f"https://notgood.test:{server.port}/ok")


def test_https_does_not_redirect_to_http(secure: tuple[Fetcher, Server], tmp_path: Path, good: Server) -> None:
    fetcher, server = secure
    fetcher._tls.load_verify_locations(tmp_path / "crt")
    hits = good.hits
    with pytest.raises(ImageBlocked, match="https"):
        fetcher.fetch(f"https://good.test:{server.port}{_redirect(f'http://good.test:{good.port}/ok')}")
    assert good.hits == hits
    assert fetcher.fetch(f"https://good.test:{server.port}{_redirect('/ok')}") == BODY


def test_trickled_tls_leaves_within_the_deadline(
    secure: tuple[Fetcher, Server], tmp_path: Path, hasty: FetchPolicy
) -> None:
    fetcher = Fetcher(replace(hasty, ports=(secure[1].port,)))
    assert fetcher._tls is not _TLS
    fetcher._tls.load_verify_locations(tmp_path / "crt")
    with within(LEAVES_S), pytest.raises(ImageUnreachable, match="seconds"):
        fetcher.fetch(f"https://good.test:{secure[1].port}/hostile/0")


def test_a_trickled_handshake_leaves_within_the_deadline(hasty: FetchPolicy) -> None:
    # A record that announces 16 kB of handshake and lets them drip.
    record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"
    with Server(GOOD, greeting=lambda c: _trickle(c, record, b"\0")) as server:
        fetcher = Fetcher(replace(hasty, ports=(server.port,)))
        with within(LEAVES_S), pytest.raises(ImageUnreachable):
            fetcher.fetch(f"https://good.test:{server.port}/ok")


# --- Hostile servers ---


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n\r\n" + BODY])
def test_what_no_timeout_ends_is_cut_off_at_the_deadline(
    hasty: FetchPolicy, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As TLS tickets without end do: they are read within one call.
    monkeypatch.setattr(Deadline, "left", lambda deadline, at_most: 60.0)

    def stall(connection: socket.socket, path: str) -> None:
        connection.sendall(start)
        time.sleep(LEAVES_S)

    with Server(GOOD, answer=stall) as server:
        fetcher = Fetcher(replace(hasty, ports=(server.port,)))
        with within(LEAVES_S), pytest.raises(ImageUnreachable, match="seconds"):
            fetcher.fetch(f"http://good.test:{server.port}/")


@pytest.mark.parametrize(("number", "name"), list(enumerate(HOSTILE_ANSWERS)))
def test_a_hostile_server_is_left_within_the_deadline_and_the_cap_on_memory(
    number: int, name: str, policy: FetchPolicy, hasty: FetchPolicy, good: Server
) -> None:
    slow = "trickled" in name or name == "silence"
    fetcher = Fetcher(hasty if slow else replace(policy, max_redirects=0))
    assert len(_bomb()) < MAX_BYTES
    with within(LEAVES_S), within_memory(MOST_MEMORY), pytest.raises(HOSTILE_ANSWERS[name][1]):
        fetcher.fetch(f"http://good.test:{good.port}/hostile/{number}")


_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        pytest.param(b"", b"HTTP/1.1 100 Continue\r\n\r\n", id="1xx answers"),
        pytest.param(_CHUNKED + _chunk(BODY[:20]), _chunk(b"x"), id="chunks of one byte"),
    ],
)
def test_what_is_parsed_piece_by_piece_costs_no_seconds_under_a_large_cap(
    start: bytes, piece: bytes, policy: FetchPolicy
) -> None:
    with Server(GOOD, answer=lambda c, _: _flood(c, start, piece * 999)) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,), max_bytes=20_000_000))
        began = time.thread_time()
        with pytest.raises(ImageTooLarge):
            fetcher.fetch(f"http://good.test:{server.port}/x")
    assert time.thread_time() - began < 0.6


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_that_is_opened_is_read(form: str, policy: FetchPolicy) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, form)
    body = picture.getvalue()
    with Server(GOOD, answer=lambda c, _: c.sendall(response(body))) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,)))
        assert fetcher.fetch(f"http://good.test:{server.port}/x") == body


def test_a_large_image_in_small_chunks_arrives(policy: FetchPolicy) -> None:
    body = BODY[:100] * 20_000
    with Server(GOOD, answer=lambda c, _: c.sendall(_CHUNKED + _chunk(BODY[:100]) * 20_000 + b"0\r\n\r\n")) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,), max_bytes=len(body)))
        assert fetcher.fetch(f"http://good.test:{server.port}/x") == body


def test_large_bodies_keep_a_pace_together_and_arrive(policy: FetchPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LARGE_BYTES", 50_000)
    monkeypatch.setattr(fetch, "LARGE_BYTES_PER_S", 200_000 / (os.cpu_count() or 1))
    body = BODY.ljust(MAX_BYTES, b"x")
    with Server(GOOD, answer=lambda c, _: c.sendall(response(body))) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,), total_s=0.5))
        began = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            bodies = list(threads.map(fetcher.fetch, [f"http://good.test:{server.port}/x"] * 4))
    assert bodies == [body] * 4
    # The half of each that is beyond, which counts for no server's deadline.
    assert time.monotonic() - began > 0.8


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_status_that_may_pass_is_retryable_and_asked_for_once(status: int, fetcher: Fetcher, good: Server) -> None:
    hits = good.hits
    with pytest.raises(ImageUnreachable) as failure:
        fetcher.fetch(f"http://good.test:{good.port}/status/{status}")
    assert failure.value.retryable
    assert good.hits == hits + 1


@pytest.mark.parametrize("status", [503, 429])
def test_a_server_that_asks_for_time_is_heard(status: int, fetcher: Fetcher, good: Server) -> None:
    with pytest.raises(ImageUnreachable) as failure:
        fetcher.fetch(f"http://good.test:{good.port}/status/{status}")
    assert failure.value.retry_after_s == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        (" 0 ", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 100),
        ("Wed, 21 Oct 2015 07:26:00 GMT", 0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("٣", None),
        ("9" * 5_000, 999_999_999),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str, seconds: float | None) -> None:
    assert retry_after_s(header, 1_445_412_380) == seconds


def test_the_operators_address_is_in_the_user_agent(policy: FetchPolicy, good: Server) -> None:
    Fetcher(replace(policy, contact="https://me.test/bot")).fetch(f"http://good.test:{good.port}/ok")
    assert "(+image fetcher; https://me.test/bot)\r\n" in good.heads[-1]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 204, 206, 300, 304])
def test_a_status_that_stays_is_not_retryable(status: int, fetcher: Fetcher, good: Server) -> None:
    with pytest.raises(ImageInvalid, match=str(status)) as failure:
        fetcher.fetch(f"http://good.test:{good.port}/status/{status}")
    assert not failure.value.retryable
    assert failure.value.args[2:] == (f"http_{status}",)


def test_a_failures_detail_says_what_it_was(policy: FetchPolicy, good: Server, root: Path) -> None:
    fetcher = Fetcher(replace(policy, root=root, max_bytes=100))
    base = f"http://good.test:{good.port}"
    with Server(GOOD) as gone:
        pass
    sources: dict[str, Any] = {
        "http_404": f"{base}/status/404",
        "http_410": f"{base}/status/410",
        "http_503": f"{base}/status/503",
        "redirects": f"{base}/hops/9",
        "port": "http://good.test:25/",
        "dns": f"http://unknown.test:{good.port}/",
        "url": "http://user@good.test/",
        "data_uri": "data:image/png;base64,*",
        "path": ImagePath(path="../a"),
        "no_file": ImagePath(path="none.jpg"),
        "bytes": f"data:image/png;base64,{'A' * 1_000}",
        "network": f"http://127.0.0.1:{good.port}/",
    }
    for detail, source in sources.items():
        with pytest.raises(JobError) as failure:
            fetcher.fetch(source)
        assert failure.value.detail == detail
    with pytest.raises(ImageUnreachable) as failure:
        Fetcher(replace(policy, ports=(gone.port,))).fetch(f"http://good.test:{gone.port}/ok")
    assert failure.value.detail == "connection"


def test_a_refusal_names_the_setting_that_would_allow_it_and_nothing_of_the_url(
    policy: FetchPolicy, good: Server, root: Path
) -> None:
    base = f"http://good.test:{good.port}/s3cret"
    for setting, source, changed in [
        ("IDEFICS_IMAGE_PORTS", "http://good.test:25/s3cret", policy),
        ("IDEFICS_IMAGE_ALLOW_DOMAINS", base, replace(policy, allow_domains=("a.test",))),
        ("IDEFICS_IMAGE_ALLOW_NETWORKS", f"http://127.0.0.1:{good.port}/s3cret", policy),
        ("IDEFICS_IMAGE_ROOT", ImagePath(path="s3cret"), policy),
        ("IDEFICS_IMAGE_ROOT", ImagePath(path="../s3cret"), replace(policy, root=root)),
        ("IDEFICS_IMAGE_MAX_BYTES", f"data:image/png;base64,{'A' * 100}", replace(policy, max_bytes=10)),
    ]:
        with pytest.raises(JobError, match=setting) as refused:
            Fetcher(changed).fetch(source)
        assert "s3cret" not in str(refused.value)


def test_a_refused_connection_is_retryable(policy: FetchPolicy) -> None:
    with Server(GOOD) as gone:
        pass
    with pytest.raises(ImageUnreachable, match="could not be reached"):
        Fetcher(replace(policy, ports=(gone.port,))).fetch(f"http://good.test:{gone.port}/ok")


def test_a_full_backlog_leaves_within_the_deadline(hasty: FetchPolicy) -> None:
    with socket.create_server((GOOD, 0), backlog=0) as listener:
        target = listener.getsockname()
        with socket.create_connection(target), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(target)
            with within(LEAVES_S), pytest.raises(ImageUnreachable, match="did not"):
                Fetcher(replace(hasty, ports=(target[1],))).fetch(f"http://good.test:{target[1]}/ok")


def test_a_slow_look_up_leaves_within_the_deadline(
    hasty: FetchPolicy, good: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(6))
    with within(LEAVES_S), pytest.raises(ImageUnreachable):
        Fetcher(hasty).fetch(f"http://good.test:{good.port}/ok")


def test_an_image_of_exactly_the_cap_is_read(policy: FetchPolicy, good: Server) -> None:
    url = f"http://good.test:{good.port}"
    exact, less = (Fetcher(replace(policy, max_bytes=len(BODY) - spare)) for spare in (0, 1))
    for path in ("/ok", "/chunked"):
        assert exact.fetch(url + path) == BODY
        with pytest.raises(ImageTooLarge):
            less.fetch(url + path)


def test_many_threads_share_a_fetcher(fetcher: Fetcher, good: Server) -> None:
    with ThreadPoolExecutor(16) as threads:
        bodies = list(threads.map(fetcher.fetch, [f"http://good.test:{good.port}/ok"] * 64))
    assert bodies == [BODY] * 64


def test_no_thread_and_no_descriptor_stays_behind(fetcher: Fetcher, good: Server) -> None:
    urls = [
        f"http://good.test:{good.port}{path}" for path in ("/ok", "/status/404", "/loop", "/hostile/11", "/hostile/17")
    ]
    for count in itertools.count():
        before = _descriptors()
        for url in urls:
            _outcome(fetcher, url)
        time.sleep(0.1)
        if _descriptors() <= before:
            return
        assert count < 10


def _open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def _descriptors() -> int:
    return _open_files() + threading.active_count()


def _outcome(fetcher: Fetcher, url: str) -> bytes | JobError:
    try:
        return fetcher.fetch(url)
    except JobError as error:
        return error


# --- Secrets ---

LEAKS = [
    "/status/404?t={secret}",
    "/status/503/{secret}",
    "/hostile/5?t={secret}",
    "/hostile/7?t={secret}",
    "/hostile/16?t={secret}",
    "/hostile/17?t={secret}",
    "/hostile/19?t={secret}",
    "/loop?t={secret}",
    "/redir/not-hex?t={secret}",
]


@pytest.mark.parametrize("path", LEAKS)
def test_no_message_traceback_or_log_holds_the_rest_of_a_url(
    path: str, hasty: FetchPolicy, good: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    error = _outcome(Fetcher(hasty), f"http://good.test:{good.port}{path.format(secret=SECRET)}")
    assert isinstance(error, JobError)
    assert "good.test" in str(error)
    assert str(error).endswith(".")
    assert SECRET not in "".join(traceback.format_exception(error)) + caplog.text


@pytest.mark.parametrize(
    "url",
    [
        f"http://{SECRET}@good.test/",
        f"http://me:{SECRET}@good.test/",
        f"http://127.0.0.1/{SECRET}",
        f"ftp://good.test/{SECRET}",
        f"http://unknown.test/?{SECRET}",
        f"http://good.test:99999/?{SECRET}",
        f"http://[{SECRET}]/",
        f"http://good.test/{SECRET} ",
        "http://good.test/" + SECRET * 1000,
        f"data:image/png;base64,{SECRET}",
        f"data:text/plain,{SECRET}",
    ],
)
def test_no_refusal_holds_a_secret(url: str, fetcher: Fetcher) -> None:
    error = _outcome(fetcher, url)
    assert isinstance(error, JobError)
    assert SECRET not in "".join(traceback.format_exception(error))


# --- data: URIs ---


def _data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_a_data_uri_is_decoded(size: int, fetcher: Fetcher) -> None:
    assert fetcher.fetch(_data_uri(BODY[:size])) == BODY[:size]
    assert fetcher.fetch(_data_uri(BODY[:size]).replace("data:image", "DATA:Image")) == BODY[:size]


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64,YWJj",
        "DATA:IMAGE/PNG;BASE64,YWJj",
        "data:image/png;base64,YWJj\n",
        "data:image/png;base64,YW\r\nJj",
        "data:image/png;base64, Y W J j ",
        "data:image/png;base64,%59WJj",
        "data:image/png;base64,YWJj%0A",
        "data:image/png;charset=utf-8;base64,YWJj",
        'data:image/jpeg;name="a b.jpg";base64,YWJj',
        "data:image/svg+xml;charset=utf-8; base64,YWJj",
        "data:application/octet-stream;base64,YWJj",
    ],
)
def test_a_data_uri_is_read_as_url_readers_take_it(uri: str, fetcher: Fetcher) -> None:
    assert fetcher.fetch(uri) == b"abc"


@pytest.mark.parametrize(
    ("text", "data"), [("YQ", b"a"), ("YWI", b"ab"), ("YQ%3D%3D", b"a"), ("YWI%3d", b"ab"), ("", b"")]
)
def test_base64_may_lack_its_padding(text: str, data: bytes, fetcher: Fetcher) -> None:
    assert fetcher.fetch(f"data:image/png;base64,{text}") == data


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png,hi",
        "data:image/png;base64",
        "data:;base64,YQ==",
        "data:text/plain;base64,YQ==",
        "data:image/png;base64;x=1,YQ==",
        f"data:image/png;{'a' * 2_000};base64,YQ==",
    ],
)
def test_other_data_uris_are_refused(uri: str, fetcher: Fetcher) -> None:
    with pytest.raises(ImageBlocked, match="base64"):
        fetcher.fetch(uri)


@pytest.mark.parametrize("text", ["YQ=", "Y", "YQ==YQ==", "Y Q=", "YW-_", "YWJé", "=", "====", "%", "YQ===", "Y%ZZQ"])
def test_loose_base64_is_refused(text: str, fetcher: Fetcher) -> None:
    with pytest.raises(ImageInvalid):
        fetcher.fetch(f"data:image/png;base64,{text}")


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_a_data_uri_beyond_the_cap_is_refused_before_it_is_decoded(
    spare: int, policy: FetchPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Fetcher(replace(policy, max_bytes=100 + spare))
    assert len(exact.fetch(_data_uri(b"x" * (100 + spare)))) == 100 + spare
    monkeypatch.setattr("binascii.a2b_base64", None)
    with pytest.raises(ImageTooLarge):
        exact.fetch(_data_uri(b"x" * (101 + spare)))


# --- Paths ---


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "images-of-others").mkdir()
    (tmp_path / "images-of-others" / "x.jpg").write_bytes(b"secret")
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b.jpg").write_bytes(BODY)
    return root


@pytest.fixture
def reader(root: Path, policy: FetchPolicy) -> Fetcher:
    return Fetcher(replace(policy, root=root))


def test_a_path_below_the_root_is_read(reader: Fetcher, root: Path) -> None:
    (root / "link.jpg").symlink_to("a/b.jpg")
    (root / "linked").symlink_to(root / "a")
    for path in ("a/b.jpg", "./a//b.jpg", "link.jpg", "linked/b.jpg"):
        assert reader.fetch(ImagePath(path=path)) == BODY


def test_a_root_that_is_itself_a_link_works(root: Path, policy: FetchPolicy, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(root)
    assert Fetcher(replace(policy, root=tmp_path / "current")).fetch(ImagePath(path="a/b.jpg")) == BODY


def test_without_a_root_no_path_is_read(fetcher: Fetcher) -> None:
    with pytest.raises(ImageBlocked, match="IDEFICS_IMAGE_ROOT"):
        fetcher.fetch(ImagePath(path="a/b.jpg"))


@pytest.mark.parametrize(
    "path",
    [
        "../secret.jpg",
        "a/../../secret.jpg",
        "a/../a/b.jpg",
        "../images/a/b.jpg",
        "../images-of-others/x.jpg",
        "/etc/passwd",
        "//etc/passwd",
        "..",
        ".",
        "a/b.jpg\0.png",
    ],
)
def test_a_path_out_of_the_root_is_refused(path: str, reader: Fetcher) -> None:
    with pytest.raises(ImageBlocked):
        reader.fetch(ImagePath(path=path))


def test_an_absolute_path_into_the_root_is_refused(reader: Fetcher, root: Path) -> None:
    with pytest.raises(ImageBlocked):
        reader.fetch(ImagePath(path=str(root / "a" / "b.jpg")))


def test_a_link_out_of_the_root_is_refused(reader: Fetcher, root: Path, tmp_path: Path) -> None:
    (root / "file.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "folder").symlink_to(tmp_path)
    (root / "relative.jpg").symlink_to("../secret.jpg")
    (root / "process").symlink_to("/proc/self")
    for path in ("file.jpg", "folder/secret.jpg", "relative.jpg", "process/environ"):
        with pytest.raises(ImageBlocked):
            reader.fetch(ImagePath(path=path))


def test_a_folder_exchanged_for_a_link_meanwhile_is_not_followed(
    reader: Fetcher, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.jpg").write_bytes(b"secret")
    (root / "link").symlink_to("a")
    real = Path.relative_to

    def exchange(self: Path, *args: Any) -> Path:
        (root / "a").rename(root / "old")
        (root / "a").symlink_to(tmp_path)
        return real(self, *args)

    monkeypatch.setattr(Path, "relative_to", exchange)
    with pytest.raises(ImageInvalid):
        reader.fetch(ImagePath(path="link/b.jpg"))


def test_what_is_no_regular_file_is_refused_without_waiting(reader: Fetcher, root: Path) -> None:
    os.mkfifo(root / "fifo.jpg")
    (root / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        # Relative, since a socket's name is short.
        listener.bind(os.path.relpath(root / "socket"))
    for path in ("fifo.jpg", "a", "socket", "missing.jpg", "a/b.jpg/c", "loop", "x" * 300):
        with within(LEAVES_S), pytest.raises(ImageInvalid):
            reader.fetch(ImagePath(path=path))


def test_a_device_is_refused(policy: FetchPolicy) -> None:
    with pytest.raises(ImageInvalid):
        Fetcher(replace(policy, root=Path("/dev"))).fetch(ImagePath(path="zero"))


def test_a_file_beyond_the_cap_is_refused(root: Path, policy: FetchPolicy) -> None:
    source = ImagePath(path="a/b.jpg")
    assert Fetcher(replace(policy, root=root, max_bytes=len(BODY))).fetch(source) == BODY
    with pytest.raises(ImageTooLarge):
        Fetcher(replace(policy, root=root, max_bytes=len(BODY) - 1)).fetch(source)


def test_a_refused_path_is_not_repeated(reader: Fetcher) -> None:
    for path in (f"../{SECRET}", f"missing/{SECRET}", f"/{SECRET}"):
        with pytest.raises(JobError) as refusal:
            reader.fetch(ImagePath(path=path))
        assert SECRET not in "".join(traceback.format_exception(refusal.value))


def test_no_descriptor_stays_open_after_paths(reader: Fetcher) -> None:
    before = _open_files()
    for path in ("a/b.jpg", "a", "missing", "a/b.jpg/c"):
        with suppress(JobError):
            reader.fetch(ImagePath(path=path))
    assert _open_files() == before


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.com./a", "example.com"),
        ("https://b\u00fccher.example/a", "xn--bcher-kva.example"),
        ("http://ex%61mple.com/", "example.com"),
        ("http://[::1]:80/", "::1"),
        ("http://a b/", "the image's host"),
    ],
)
def test_a_turn_is_taken_at_the_host_that_will_be_asked(url: str, host: str) -> None:
    assert fetch._turn_of(url) == host
