"""Connections that are used again: when, for whom, and what a server cannot do with one."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from tasks.errors import ImageInvalid, ImageTooLarge, ImageUnreachable, JobError
from tests.support.waiting import eventually
from tests.unit.web.servers import BODY, CHUNKED, GOOD, LEAVES_S, Server, chunk, response, tls_server, within
from worker.images.fetch import Fetcher, FetchPolicy
from worker.net import idle
from worker.net.idle import IdleConnection, IdleConnections, Origin

#: Answers the request for a path.
Answer = Callable[[socket.socket, str], None]
ORIGIN = Origin("http", "good.test", 80)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take seconds between two requests."""
    monkeypatch.setattr(idle, "MAX_IDLE_S", 30.0)
    monkeypatch.setattr(idle, "MAX_AGE_S", 60.0)


class Site(Server):
    """A server that keeps connections open, and a fetcher that may read from it."""

    fetcher: Fetcher

    def url(self, path: str, host: str = "good.test") -> str:
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{path}"

    def fetch(self, path: str, host: str = "good.test") -> bytes:
        return self.fetcher.fetch(self.url(path, host))


@pytest.fixture
def site(policy: FetchPolicy) -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:

        def opened(answer: Answer, **changes: object) -> Site:
            site = stack.enter_context(Site(GOOD, answer=answer, keeps_open=True))
            site.fetcher = Fetcher(replace(policy, ports=(site.port,), **changes))
            return site

        yield opened


def picture(path: str) -> bytes:
    """Each path's own picture."""
    return BODY + path.encode()


def good(connection: socket.socket, path: str) -> None:
    connection.sendall(response(picture(path)))


def first(answer: Callable[[socket.socket], None]) -> Answer:
    """`answer` for `/first`, and the good one for other paths."""
    return lambda connection, path: answer(connection) if path == "/first" else good(connection, path)


def test_a_connection_is_used_for_the_next_picture_of_the_server(site: Callable[..., Site]) -> None:
    server = site(good)
    for path in ("/a", "/b", "/c"):
        assert server.fetch(path) == picture(path)
    assert (server.hits, len(server.heads)) == (1, 3)


def test_a_tls_connection_is_used_again(policy: FetchPolicy, tmp_path: Path) -> None:
    with Site(GOOD, answer=good, keeps_open=True, tls=tls_server(tmp_path, "good.test")) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,), ca_file=tmp_path / "crt"))
        for path in ("/a", "/b", "/c"):
            assert fetcher.fetch(f"https://good.test:{server.port}{path}") == picture(path)
        assert (server.hits, len(server.heads)) == (1, 3)
        # The certificate is not of this name, though the address is the same.
        with pytest.raises(ImageUnreachable, match="certificate"):
            fetcher.fetch(f"https://www.good.test:{server.port}/a")


def test_another_name_has_a_connection_of_its_own(site: Callable[..., Site]) -> None:
    server = site(good)
    for host in ("good.test", "www.good.test", "good.test", "www.good.test"):
        assert server.fetch("/a", host) == picture("/a")
    assert server.hits == 2


def test_threads_never_share_a_connection(site: Callable[..., Site]) -> None:
    server = site(good)
    paths = [f"/{number}" for number in range(200)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(server.fetch, paths)) == [picture(path) for path in paths]
    # A connection more where a thread came before another one had given its connection back.
    assert server.hits <= 16


LENGTH = f"Content-Length: {len(picture('/first'))}\r\n"
#: Answers with a picture after which the connection is closed.
LAST_ANSWERS: dict[str, bytes] = {
    "close": response(picture("/first"), Connection="close"),
    "close among other options": response(picture("/first"), Connection="Keep-Alive, Close"),
    "close in a second header": response(picture("/first"), Connection="keep-alive\r\nConnection: close"),
    "HTTP/1.0": response(picture("/first"), Connection="keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "chunks": CHUNKED + chunk(picture("/first")) + b"0\r\n\r\n",
    "chunks beside a length": (CHUNKED + chunk(picture("/first")) + b"0\r\n\r\n").replace(
        b"\r\nTransfer", b"\r\n" + LENGTH.encode() + b"Transfer", 1
    ),
    "two lengths that agree": response(picture("/first"), Server=f"x\r\n{LENGTH.strip()}"),
    "a length with a sign": response(picture("/first"), Content_Length=f"+{len(picture('/first'))}"),
    "a header that parsers read differently": response(picture("/first"), Server="x\r\nTransfer-Encoding : chunked"),
    "a byte too many": response(picture("/first")) + b"x",
    "another answer": response(picture("/first")) + response(picture("/another")),
}


@pytest.mark.parametrize("name", LAST_ANSWERS)
def test_an_answer_whose_end_is_in_doubt_is_the_connections_last(name: str, site: Callable[..., Site]) -> None:
    server = site(first(lambda connection: connection.sendall(LAST_ANSWERS[name])))
    assert server.fetch("/first") == picture("/first")
    assert server.fetch("/second") == picture("/second")
    assert server.hits == 2


#: Answers with an error after which the connection is closed.
BROKEN_ANSWERS: dict[str, tuple[bytes, type[JobError]]] = {
    "too large": (response(BODY, Content_Length=10**9), ImageTooLarge),
    "no picture": (response(b"<html>" * 9_000), ImageInvalid),
    "a chunk without a size": (CHUNKED + b"x\r\n", ImageUnreachable),
    "no content": (response(b"", "204 No Content"), ImageInvalid),
    "no content with a body": (response(BODY, "204 No Content"), ImageInvalid),
    "not modified, with the picture's length": (response(b"", "304 Not Modified", Content_Length=5), ImageInvalid),
    "an error that is not all there": (response(b"no", "404 Not Found", Content_Length=9_000), ImageInvalid),
    "a redirect to nowhere": (response(b"", "302 Found"), ImageInvalid),
    "another protocol": (response(b"", "101 Switching Protocols", Upgrade="h2c"), ImageInvalid),
}


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_broken_answer_is_the_connections_last(name: str, site: Callable[..., Site]) -> None:
    answer, error = BROKEN_ANSWERS[name]
    server = site(first(lambda connection: connection.sendall(answer)))
    with within(LEAVES_S), pytest.raises(error):
        server.fetch("/first")
    assert server.fetch("/second") == picture("/second")
    assert server.hits == 2


@pytest.mark.parametrize("status", ["404 Not Found", "503 Service Unavailable"])
def test_a_short_error_leaves_the_connection_open(status: str, site: Callable[..., Site]) -> None:
    server = site(first(lambda connection: connection.sendall(response(b"<html>no</html>", status))))
    with pytest.raises(JobError):
        server.fetch("/first")
    assert server.fetch("/second") == picture("/second")
    assert server.hits == 1


@pytest.mark.parametrize("body", [b"", b"<html>elsewhere</html>"])
def test_a_redirect_leaves_the_connection_open(body: bytes, site: Callable[..., Site]) -> None:
    server = site(first(lambda connection: connection.sendall(response(body, "302 Found", Location="/second"))))
    assert server.fetch("/first") == picture("/second")
    assert (server.hits, len(server.heads)) == (1, 2)


def test_a_server_that_sends_the_headers_first_is_not_slower_on_a_kept_connection(site: Callable[..., Site]) -> None:
    def in_two_packets(connection: socket.socket, path: str) -> None:
        head, _, body = response(picture(path)).partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        connection.sendall(body)

    server = site(in_two_packets)
    server.fetch("/a")
    # Linux delays an acknowledgement by 40 ms; a busy machine may delay one picture or another, too.
    eventually(lambda: _seconds(lambda: server.fetch("/a")) < 0.035, 10.0)
    assert server.hits == 1


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def test_what_a_server_sends_unasked_answers_no_request(site: Callable[..., Site]) -> None:
    connections: list[socket.socket] = []

    def noted(connection: socket.socket, path: str) -> None:
        connections.append(connection)
        good(connection, path)

    server = site(noted)
    assert server.fetch("/first") == picture("/first")
    connections[0].sendall(response(picture("/another")))
    assert server.fetch("/second") == picture("/second")
    assert server.hits == 2


def test_a_connection_that_the_server_has_closed_is_replaced(site: Callable[..., Site]) -> None:
    server = site(good)
    server.keeps_open = False
    for path in ("/a", "/b", "/c"):
        assert server.fetch(path) == picture(path)
    assert server.hits == 3


class Changing:
    """Answers the first request of all, and leaves later ones to `then` if they come on the same connection."""

    def __init__(self, then: Answer, new: Answer = good) -> None:
        self._first: socket.socket | None = None
        self._then, self._new = then, new

    def __call__(self, connection: socket.socket, path: str) -> None:
        if self._first is None:
            self._first = connection
            good(connection, path)
        elif connection is self._first:
            self._then(connection, path)
        else:
            self._new(connection, path)


def hang_up(connection: socket.socket, path: str) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def stay_silent(connection: socket.socket, path: str) -> None:
    """The next request never comes."""


@pytest.mark.parametrize("then", [hang_up, stay_silent])
def test_a_kept_connection_that_answers_nothing_is_replaced(then: Answer, site: Callable[..., Site]) -> None:
    server = site(Changing(then), read_s=0.3)
    for path in ("/a", "/b", "/c"):
        assert server.fetch(path) == picture(path)
    assert (server.hits, len(server.heads)) == (2, 4)


def test_a_request_is_repeated_once(site: Callable[..., Site]) -> None:
    server = site(Changing(hang_up, new=hang_up))
    assert server.fetch("/a") == picture("/a")
    with pytest.raises(ImageUnreachable):
        server.fetch("/b")
    assert (server.hits, len(server.heads)) == (2, 3)


@pytest.mark.parametrize("start", [b"H", response(BODY)[:-9]])
def test_a_request_with_the_beginning_of_an_answer_is_not_repeated(start: bytes, site: Callable[..., Site]) -> None:
    def begin(connection: socket.socket, path: str) -> None:
        connection.sendall(start)
        hang_up(connection, path)

    server = site(Changing(begin))
    assert server.fetch("/a") == picture("/a")
    with pytest.raises(ImageUnreachable):
        server.fetch("/b")
    assert (server.hits, len(server.heads)) == (1, 2)


def test_the_deadline_holds_on_a_kept_connection(site: Callable[..., Site]) -> None:
    server = site(Changing(stay_silent, new=stay_silent), read_s=60.0, total_s=0.6)
    assert server.fetch("/a") == picture("/a")
    with within(LEAVES_S), pytest.raises(ImageUnreachable, match="within"):
        server.fetch("/b")


def test_a_kept_connection_has_left_its_first_deadline_behind(site: Callable[..., Site]) -> None:
    server = site(good, total_s=0.4)
    assert server.fetch("/a") == picture("/a")
    # Beyond the deadline, and the interval of its watchdog.
    time.sleep(1.1)
    assert server.fetch("/b") == picture("/b")
    assert server.hits == 1


def test_a_connection_is_not_used_under_another_policy(policy: FetchPolicy, site: Callable[..., Site]) -> None:
    server, kept = site(good), IdleConnections()
    connection = socket.create_connection((GOOD, server.port))
    policy = replace(policy, ports=(80,))
    kept.keep(ORIGIN, policy, connection, time.monotonic())
    for other in (replace(policy, max_bytes=1), replace(policy, allow_networks=(ip_network("10.0.0.0/8"),))):
        assert kept.take(ORIGIN, other) is None
    taken = kept.take(ORIGIN, replace(policy))
    assert taken is not None
    assert taken.socket is connection
    assert kept.take(ORIGIN, policy) is None
    connection.close()


def test_the_policy_of_each_request_must_allow_the_address(policy: FetchPolicy, site: Callable[..., Site]) -> None:
    server = site(good)
    with socket.create_connection((GOOD, server.port)) as connection:
        now = time.monotonic()
        kept = IdleConnection(ORIGIN, policy, connection, now, now + 9)
        assert kept.is_usable(replace(policy, ports=(80,)))
        for changes in ({"allow_networks": ()}, {"allow_domains": ("other.test",)}, {"ports": (443,)}):
            assert not kept.is_usable(replace(policy, **{"ports": (80,), **changes}))


def _keep(kept: IdleConnections, server: Site, origin: Origin, opened: float | None = None) -> socket.socket:
    connection = socket.create_connection((GOOD, server.port))
    policy = FetchPolicy(allow_networks=(ip_network(GOOD),))
    kept.keep(origin, policy, connection, time.monotonic() if opened is None else opened)
    return connection


def _is_closed(connection: socket.socket) -> bool:
    return connection.fileno() == -1


def test_the_number_of_idle_connections_is_bounded(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    server, kept = site(good), IdleConnections()
    monkeypatch.setattr(idle, "MAX_IDLE", 12)
    one = [_keep(kept, server, ORIGIN) for _ in range(idle.MAX_IDLE_PER_ORIGIN + 2)]
    assert [_is_closed(each) for each in one] == [True] * 2 + [False] * idle.MAX_IDLE_PER_ORIGIN
    others = [_keep(kept, server, Origin("http", "good.test", port)) for port in range(6)]
    assert len(kept) == 12
    assert [_is_closed(each) for each in one] == [True] * 4 + [False] * 6
    assert not any(map(_is_closed, others))


def test_an_idle_connection_is_closed_in_time(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    server, kept = site(good), IdleConnections()
    monkeypatch.setattr(idle, "MAX_IDLE_S", 0.1)
    connection = _keep(kept, server, ORIGIN)
    eventually(lambda: _is_closed(connection))
    assert len(kept) == 0
    assert _is_closed(_keep(kept, server, ORIGIN, opened=time.monotonic() - idle.MAX_AGE_S))


def test_an_idle_connection_that_the_server_closes_is_closed(site: Callable[..., Site]) -> None:
    connections: list[socket.socket] = []
    server, kept = site(good), IdleConnections()
    server.greeting = connections.append
    connection = _keep(kept, server, ORIGIN)
    eventually(lambda: connections)
    connections[0].shutdown(socket.SHUT_RDWR)
    eventually(lambda: _is_closed(connection))


def test_a_child_process_has_no_kept_connection(site: Callable[..., Site]) -> None:
    kept = IdleConnections()
    connection = _keep(kept, site(good), ORIGIN)
    number = connection.fileno()
    child = os.fork()
    if not child:
        try:
            os.fstat(number)
            os._exit(1)
        except OSError:
            os._exit(2 if len(kept) else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(kept) == 1
    connection.sendall(b"GET /a HTTP/1.1\r\n\r\n")
    assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_no_thread_stays_when_no_connection_is_idle(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "MAX_IDLE_S", 0.1)
    others = set(threading.enumerate())
    kept = IdleConnections()
    connection = _keep(kept, site(good), ORIGIN)
    eventually(lambda: not any(each.name == "idle-connections" for each in set(threading.enumerate()) - others))
    assert (len(kept), _is_closed(connection)) == (0, True)
