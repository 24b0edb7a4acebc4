"""The review page's server answers its own page and nothing else."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPConnection, HTTPMessage
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from tasks.errors import InvalidRequest
from tasks.review.guard import MAX_BODY_BYTES, Guard, Refusal, body_length
from tasks.review.items import RankedAnswer, ReviewItem
from tasks.review.server import CONNECTIONS, ReviewServer
from tasks.review.session import Session
from tests.support.hostile_text import HOSTILE
from tests.support.waiting import SOON_S, eventually

JPEG = b"\xff\xd8\xff\xe0 and so on"


class Reviews:
    """A review list in memory."""

    def __init__(self) -> None:
        self.items = {name: _item(name) for name in ("a", "b", "c")}
        self.decided: dict[str, str | None] = {}
        self.pictures = {"a": JPEG, "b": b"<svg onload=alert(1)>"}
        self.error: Exception | None = None
        self.held: threading.Event | None = None

    def waiting(self, limit: int = 100) -> list[ReviewItem]:
        self._work()
        return [item for id, item in self.items.items() if id not in self.decided][:limit]

    def count(self) -> int:
        return len(self.items) - len(self.decided)

    def picture(self, id: str, index: int) -> bytes | None:
        return self.pictures.get(id) if index == 0 else None

    def decide(self, id: str, answer: str | None) -> bool:
        self._work()
        if id in self.decided or id not in self.items:
            return False
        self.decided[id] = answer
        return True

    def undo(self, id: str) -> bool:
        return self.decided.pop(id, ...) is not ...

    def _work(self) -> None:
        if self.held is not None:
            assert self.held.wait(SOON_S)
        if self.error is not None:
            raise self.error


def _item(id: str) -> ReviewItem:
    answers = (RankedAnswer(f"cat {HOSTILE}", 0.4), RankedAnswer("dog", None))
    return ReviewItem(id, "idefics.answer", "What is it?", answers, 0.4, 0.6, 1, 1.5, {"sku": "7"})


@contextmanager
def _serving(reviews: Reviews, **options: Any) -> Iterator[ReviewServer]:
    server = ReviewServer(Session(reviews), 0, **options)  # type: ignore[arg-type]
    server.timeout = 0.02
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            server.handle_request()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server
    finally:
        ended.set()
        thread.join()
        server.server_close()


@pytest.fixture
def reviews() -> Reviews:
    return Reviews()


@pytest.fixture
def server(reviews: Reviews) -> Iterator[ReviewServer]:
    with _serving(reviews) as server:
        yield server


def _ask(
    server: ReviewServer, method: str, target: str, body: Any = None, **changed: str | None
) -> tuple[int, HTTPMessage, bytes]:
    """A request as the page sends it, but for headers that are changed, or left out with None."""
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    place = f"127.0.0.1:{server.server_port}"
    headers: dict[str, str | None] = {
        "Host": place,
        "Authorization": f"Bearer {server.guard.token}",
        "Sec-Fetch-Site": "same-origin",
    }
    if content is not None:
        headers |= {
            "Origin": f"http://{place}",
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
        }
    headers |= {name.replace("_", "-"): value for name, value in changed.items()}
    connection = HTTPConnection(place, timeout=SOON_S)
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(content)
    with connection.getresponse() as response:
        return response.status, response.headers, response.read()


def _decide(server: ReviewServer, body: Any = None, **changed: str | None) -> int:
    return _ask(server, "POST", "/decide", {"id": "a", "answer": "dog"} if body is None else body, **changed)[0]


def _told(server: ReviewServer, method: str, target: str, body: Any = None) -> Any:
    status, _, content = _ask(server, method, target, body)
    assert status == 200, content
    return json.loads(content)


def test_an_item_is_listed_decided_and_undone(server: ReviewServer, reviews: Reviews) -> None:
    told = _told(server, "GET", "/items?limit=2")
    assert told["left"] == 3
    assert [item["id"] for item in told["items"]] == ["a", "b"]
    assert told["items"][0]["answers"][0] == {"text": f"cat {HOSTILE}", "confidence": 0.4}
    assert _told(server, "POST", "/decide", {"id": "a", "answer": "dog"}) == {"saved": True, "left": 2}
    assert _told(server, "POST", "/decide", {"id": "a", "answer": "cat"}) == {"saved": False, "left": 2}
    assert _told(server, "POST", "/decide", {"id": "b", "answer": None}) == {"saved": True, "left": 1}
    assert reviews.decided == {"a": "dog", "b": None}
    assert server.session.summary() == "2 decisions, 1 of them “cannot tell”."
    assert _told(server, "POST", "/undo", {"id": "b"}) == {"undone": True, "left": 2}
    assert _told(server, "POST", "/undo", {"id": "b"}) == {"undone": False, "left": 2}
    assert reviews.decided == {"a": "dog"}
    assert server.session.summary() == "1 decision."


def test_the_address_opens_a_page_that_runs_its_own_script_alone(server: ReviewServer) -> None:
    target = server.address.partition(str(server.server_port))[2]
    status, headers, content = _ask(server, "GET", target, Authorization=None, Sec_Fetch_Site="none")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    rules = dict(rule.strip().partition(" ")[::2] for rule in headers["Content-Security-Policy"].split(";"))
    assert re.fullmatch(r"'sha256-[^']+'", rules.pop("script-src"))
    assert re.fullmatch(r"'sha256-[^']+'", rules.pop("style-src"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    # Items come later, as JSON.
    assert b"What is it?" not in content


@pytest.mark.parametrize("target", ["/items?limit=1", "/picture?id=a&index=0", "/nothing", "/items?limit=x"])
def test_every_reply_is_kept_by_nobody_and_shown_in_no_frame(server: ReviewServer, target: str) -> None:
    _, headers, _ = _ask(server, "GET", target)
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; frame-ancestors 'none'")
    assert "Access-Control-Allow-Origin" not in headers
    assert "Python" not in headers["Server"]


@pytest.mark.parametrize("token", [None, "", "Bearer ", "Bearer wrong", "Bearer \xe9", "Basic eDp5"])
@pytest.mark.parametrize("target", ["/items?limit=1", "/picture?id=a&index=0", "/no-such-page"])
def test_nothing_is_told_without_the_token(server: ReviewServer, target: str, token: str | None) -> None:
    assert _ask(server, "GET", target, Authorization=token)[0] == 403
    # Only the page has it in its address.
    assert _ask(server, "GET", f"{target}&token={server.guard.token}", Authorization=None)[0] == 403


def test_nothing_is_decided_without_the_token(server: ReviewServer, reviews: Reviews) -> None:
    assert _decide(server, Authorization=None) == 403
    assert _decide(server, Authorization=f"Bearer {server.guard.token}x") == 403
    assert _ask(server, "GET", "/?token=wrong")[0] == 403
    assert _ask(server, "GET", "/")[0] == 403
    assert reviews.decided == {}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", "", None])
def test_a_foreign_name_that_resolves_to_loopback_is_refused(
    server: ReviewServer, reviews: Reviews, host: str | None
) -> None:
    named = host and host.format(port=server.server_port)
    assert _ask(server, "GET", "/items?limit=1", Host=named)[0] == 403
    assert _decide(server, Host=named, Origin=f"http://{named}") == 403
    assert reviews.decided == {}


def test_localhost_is_this_server_too(server: ReviewServer) -> None:
    name = f"localhost:{server.server_port}"
    assert _decide(server, Host=name, Origin=f"http://{name}") == 200


@pytest.mark.parametrize(
    "changed",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": None},
        {"Origin": "http://localhost"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "none"},
    ],
)
def test_another_sites_page_decides_nothing(
    server: ReviewServer, reviews: Reviews, changed: dict[str, str | None]
) -> None:
    assert _decide(server, **changed) == 403
    assert reviews.decided == {}


@pytest.mark.parametrize(
    "type", ["text/plain", "application/x-www-form-urlencoded", "text/plain; application/json", "multipart/form-data"]
)
def test_what_a_form_can_send_decides_nothing(server: ReviewServer, reviews: Reviews, type: str) -> None:
    assert _decide(server, Content_Type=type) == 415
    assert reviews.decided == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"id": "a", "answer": "\\ud800"}',
        [],
        {"answer": "dog"},
        {"id": "a"},
        {"id": 1, "answer": "dog"},
        {"id": "a" * 2_000, "answer": "dog"},
        {"id": "", "answer": "dog"},
        {"id": "a", "answer": ["dog"]},
    ],
)
def test_a_body_of_another_form_decides_nothing(server: ReviewServer, reviews: Reviews, body: Any) -> None:
    assert _decide(server, body) == 400
    assert reviews.decided == {}


def test_a_body_is_bounded(server: ReviewServer, reviews: Reviews) -> None:
    assert _decide(server, Content_Length=str(MAX_BODY_BYTES + 1)) == 413
    assert _decide(server, Content_Length="9" * 5_000) == 413
    assert _decide(server, Content_Length=None) == 411
    assert _decide(server, Content_Length="-1") == 411
    assert _decide(server, Content_Length=None, Transfer_Encoding="chunked") == 411
    assert reviews.decided == {}


@pytest.mark.parametrize("name", ["Host", "Origin", "Content-Length", "Authorization"])
def test_a_header_that_is_there_twice_is_refused(name: str) -> None:
    headers = Message()
    told = {"Host": "127.0.0.1:8600", "Origin": "http://127.0.0.1:8600", "Authorization": "Bearer t"}
    for each, value in {**told, "Content-Length": "2", "Content-Type": "application/json"}.items():
        headers[each] = value
    assert _checked_length(headers) == 2
    headers[name] = headers[name]
    with pytest.raises(Refusal):
        _checked_length(headers)


def _checked_length(headers: Message) -> int:
    Guard(8600, "t").check("POST", "/decide", {}, headers)
    return body_length(headers)


@pytest.mark.parametrize(
    "target",
    [
        "/../../etc/passwd",
        "/%2e%2e/etc/passwd",
        "/page.py",
        "/items/",
        "/decide",
        "/picture?id=zz&index=0",
        "/picture?id=a&index=1",
    ],
)
def test_nothing_else_is_there(server: ReviewServer, target: str) -> None:
    assert _ask(server, "GET", target)[0] == 404


@pytest.mark.parametrize(
    "target",
    ["/picture", "/picture?id=a&index=-1", "/picture?id=a&id=b&index=0", "/items?limit=-1", "/items?a=&b=&c=&d=&e="],
)
def test_a_parameter_of_another_form_is_refused(server: ReviewServer, target: str) -> None:
    assert _ask(server, "GET", target)[0] == 400


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"])
def test_another_method_is_refused(server: ReviewServer, method: str) -> None:
    status, headers, _ = _ask(server, method, "/items?limit=1")
    assert status == 501
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_a_picture_is_served_only_if_it_begins_as_jpeg(server: ReviewServer) -> None:
    status, headers, content = _ask(server, "GET", "/picture?id=a&index=0")
    assert (status, headers["Content-Type"], content) == (200, "image/jpeg", JPEG)
    assert _ask(server, "GET", "/picture?id=b&index=0")[0] == 404


def test_a_redis_that_is_away_is_told_and_nothing_is_counted(server: ReviewServer, reviews: Reviews) -> None:
    reviews.error = RedisConnectionError("refused")
    status, _, content = _ask(server, "POST", "/decide", {"id": "a", "answer": "dog"})
    assert status == 503
    assert json.loads(content) == {"error": "Redis does not answer (refused): is it up, and its URL right?"}
    assert server.session.summary() == "0 decisions."
    reviews.error = InvalidRequest("The answer is too long.")
    status, _, content = _ask(server, "POST", "/decide", {"id": "a", "answer": "dog"})
    assert (status, json.loads(content)) == (400, {"error": "The answer is too long."})


def test_a_slow_request_is_cut_off(reviews: Reviews) -> None:
    with _serving(reviews, connection_s=0.3) as server, socket.create_connection(server.server_address[:2]) as slow:
        slow.settimeout(SOON_S)
        # A byte now and then keeps no connection open.
        slow.sendall(b"GET / HTTP/1.1\r\nHost: ")
        eventually(lambda: _is_closed(slow), SOON_S)


def _is_closed(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"1")
        connection.settimeout(0.05)
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_connections_are_bounded(server: ReviewServer) -> None:
    place = server.server_address[:2]
    idle = [socket.create_connection(place) for _ in range(CONNECTIONS)]
    try:
        with socket.create_connection(place) as one_more:
            one_more.settimeout(SOON_S)
            assert one_more.recv(1) == b""
    finally:
        for each in idle:
            each.close()
    eventually(lambda: _is_answered(server), SOON_S)


def _is_answered(server: ReviewServer) -> bool:
    try:
        return _ask(server, "GET", "/items?limit=1")[0] == 200
    except OSError:
        return False


def test_the_end_waits_for_a_decision_and_for_no_idle_connection(reviews: Reviews) -> None:
    reviews.held = threading.Event()
    with _serving(reviews) as server, socket.create_connection(server.server_address[:2]):
        told: list[int] = []
        asking = threading.Thread(target=lambda: told.append(_decide(server)))
        asking.start()
        eventually(lambda: len(server.connections) == 2, SOON_S)
        threading.Timer(0.3, reviews.held.set).start()
        began = time.monotonic()
    assert time.monotonic() - began < SOON_S
    asking.join()
    assert (told, reviews.decided) == ([200], {"a": "dog"})


def test_it_listens_on_loopback_alone(server: ReviewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/?token={server.guard.token}"
    assert len(server.guard.token) >= 32
