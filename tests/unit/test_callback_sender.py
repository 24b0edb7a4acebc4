"""Where a callback may go, one attempt at a real server, and the decision that follows."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_network
from typing import Any

import pytest

from config.settings import Settings
from tasks.errors import InvalidRequest
from tasks.outbox import Delivery
from tasks.payloads import Callback
from tests.support.receiver import NEW_SECRET, SECRET, Receiver
from worker.delivery.callback_policy import check
from worker.delivery.retry import AttemptResult, decide
from worker.delivery.sender import MAX_RETRY_AFTER_S, Sender, retry_after_s

SCHEDULE = (0, 5, 300)
HIDDEN = "s3cr3t-token"


def settings(**given: Any) -> Settings:
    return Settings(**{"callback_keys": f"main={SECRET}", "callback_timeout_s": 1.0, **given})


def local(port: int, **given: Any) -> Settings:
    networks = (ip_network("127.0.0.0/8"),)
    return settings(callback_allow_http=True, callback_allow_networks=networks, callback_ports=(port,), **given)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().open() as receiver:
        yield receiver


def delivery(url: str) -> Delivery:
    return Delivery("msg_1", "job-1", "job.succeeded", url, "main", '{"type":"job.succeeded"}')


# The policy


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://example.com:8443/",
        "https://127.0.0.1/",
        "https://0x7f.1/",
        "https://10.0.0.8/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://localhost/",
    ],
)
def test_a_forbidden_address_is_refused_with_a_cure(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"callback.url: .*(use|have|write)"):
        check(Callback(url=url, key_id="main"), settings())


def test_a_refusal_does_not_repeat_the_urls_path() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check(Callback(url=f"https://127.0.0.1/{HIDDEN}?a={HIDDEN}", key_id="main"), settings())
    assert HIDDEN not in str(refusal.value)


def test_a_name_of_a_private_address_is_refused_where_it_can_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    _resolve_to(monkeypatch, "10.1.2.3")
    callback = Callback(url="https://inside.test/", key_id="main")
    with pytest.raises(InvalidRequest, match=r"inside\.test"):
        check(callback, settings())
    check(callback, settings(), look_up=False)
    check(callback, settings(callback_allow_networks=(ip_network("10.0.0.0/8"),)))


def test_a_name_that_is_not_known_yet_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _no_name)
    check(Callback(url="https://later.test/", key_id="main"), settings())


def test_an_operator_allows_http_a_port_and_a_network() -> None:
    check(Callback(url="http://127.0.0.1:8080/", key_id="main"), local(8080))


def test_only_the_allowed_domains_are_called() -> None:
    chosen = settings(callback_allow_domains=("example.com",))
    check(Callback(url="https://hooks.example.com/", key_id="main"), chosen, look_up=False)
    with pytest.raises(InvalidRequest, match="allowed domains"):
        check(Callback(url="https://example.org/", key_id="main"), chosen)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="IDEFICS_CALLBACK_KEYS"):
        check(Callback(url="https://example.com/", key_id="other"), settings())


# An attempt


def test_an_attempt_posts_the_signed_body(receiver: Receiver) -> None:
    answer = Sender(local(receiver.port)).post(delivery(receiver.url))
    assert answer.status == 204
    (call,) = receiver.calls
    assert call.id == "msg_1"
    assert call.verified() == {"type": "job.succeeded"}
    assert call.headers["content-type"] == "application/json"
    assert call.headers["user-agent"].startswith("idefics-jobs/")


def test_a_rotating_key_signs_twice(receiver: Receiver) -> None:
    chosen = local(receiver.port, callback_keys=f"main={NEW_SECRET},main={SECRET}")
    Sender(chosen).post(delivery(receiver.url))
    (call,) = receiver.calls
    assert call.verified(SECRET) == call.verified(NEW_SECRET)


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    receiver.answers, receiver.headers = [302], {"Location": f"http://127.0.0.1:{receiver.port}/other"}
    assert Sender(local(receiver.port)).post(delivery(receiver.url)).status == 302
    assert [call.path for call in receiver.calls] == ["/hook"]


def test_the_environments_proxy_is_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert Sender(local(receiver.port)).post(delivery(receiver.url)).status == 204


@pytest.mark.parametrize(
    "given", [{"callback_allow_networks": ()}, {"callback_allow_http": False}, {"callback_ports": (443,)}]
)
def test_a_callback_that_the_policy_has_come_to_forbid_is_not_sent(receiver: Receiver, given: dict[str, Any]) -> None:
    allowed = local(receiver.port)
    answer = Sender(allowed.model_copy(update=given)).post(delivery(receiver.url))
    assert answer.is_refused
    assert answer.note.startswith("refused: ")
    assert receiver.calls == []


def test_a_name_that_has_come_to_resolve_to_loopback_is_not_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rebinding attack does: public when the job was submitted, loopback when it is delivered."""
    _resolve_to(monkeypatch, "127.0.0.1")
    chosen = settings(callback_allow_http=True, callback_ports=(receiver.port,))
    answer = Sender(chosen).post(delivery(f"http://rebound.test:{receiver.port}/"))
    assert answer.is_refused
    assert receiver.calls == []


def test_an_attempt_with_a_removed_key_fails_with_a_note(receiver: Receiver) -> None:
    answer = Sender(local(receiver.port, callback_keys=f"other={SECRET}")).post(delivery(receiver.url))
    assert answer == AttemptResult(note="no secret of its key_id in IDEFICS_CALLBACK_KEYS")


def test_an_attempt_at_a_receiver_that_is_down_has_no_status() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answer = Sender(local(port)).post(delivery(f"http://127.0.0.1:{port}/"))
    assert (answer.status, answer.is_refused) == (None, False)
    assert "could not be reached" in answer.note


def test_an_unknown_host_name_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _no_name)
    assert not Sender(settings()).post(delivery("https://later.test/")).is_refused


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"H", None),
        (b"HTTP/1.1 100 Continue\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nX: ", None),
        (b"HTTP/1.1 200 OK\r\n\r\nx", 200),
        (b"\x00\x01garbage\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed; boundary*0=a; boundary*=b\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed; boundary*=a%00b''x\r\n\r\n", None),
    ],
)
def test_an_attempt_ends_in_time_though_the_response_does_not(sent: bytes, status: int | None) -> None:
    with _trickle(sent) as port:
        started = time.monotonic()
        answer = Sender(local(port)).post(delivery(f"http://127.0.0.1:{port}/"))
        assert time.monotonic() - started < 3.0
    assert answer.status == status


def test_only_the_start_of_a_huge_response_is_read() -> None:
    with _flood() as (port, written):
        assert Sender(local(port)).post(delivery(f"http://127.0.0.1:{port}/")).status == 200
    # What was written beyond what was read stood in the sockets' buffers.
    assert written[0] < 20_000_000


# The decision


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_2xx_is_delivered(status: int) -> None:
    assert decide(AttemptResult(status), 0, SCHEDULE).state == "delivered"


@pytest.mark.parametrize("status", [None, 100, 301, 302, 307, 400, 401, 404, 408, 429, 500, 503])
def test_anything_else_is_attempted_again(status: int | None) -> None:
    decision = decide(AttemptResult(status), 0, SCHEDULE)
    assert decision.state == "again"
    assert 4.0 <= decision.wait_s <= 6.0


def test_a_delivery_fails_after_the_last_attempt_of_the_schedule() -> None:
    assert 240 <= decide(AttemptResult(500), 1, SCHEDULE).wait_s <= 360
    assert decide(AttemptResult(500), 2, SCHEDULE).state == "failed"


def test_delays_have_jitter() -> None:
    assert len({decide(AttemptResult(500), 1, SCHEDULE).wait_s for _ in range(20)}) > 10


def test_410_disables_the_url() -> None:
    decision = decide(AttemptResult(410), 0, SCHEDULE)
    assert (decision.state, decision.disables_url) == ("failed", True)


def test_a_refused_address_is_not_attempted_again() -> None:
    assert decide(AttemptResult(is_refused=True), 0, SCHEDULE).state == "failed"


def test_a_receiver_may_ask_for_more_time_but_not_for_less() -> None:
    assert decide(AttemptResult(503, retry_after_s=60.0), 0, SCHEDULE).wait_s == 60.0
    assert decide(AttemptResult(503, retry_after_s=60.0), 1, SCHEDULE).wait_s >= 240


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30.0),
        ("9" * 500, MAX_RETRY_AFTER_S),
        ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_S),
        ("soon", 0.0),
        ("-5", 0.0),
        ("²", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after_is_read_within_bounds(text: str, seconds: float) -> None:
    assert retry_after_s({"Retry-After": text}, now=1_000.0) == seconds


def _resolve_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    real = socket.getaddrinfo

    def fake(host: str, port: Any, *args: Any, **options: Any) -> Any:
        return real(address if host.endswith(".test") else host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fake)


def _no_name(*args: Any, **options: Any) -> Any:
    raise socket.gaierror("no such name")


@contextmanager
def _trickle(sent: bytes) -> Iterator[int]:
    """Port of a server that sends some bytes, and then a few more every 0.1 s."""
    over = threading.Event()
    more = sent if b" 100 " in sent else b"x"

    def serve(connection: socket.socket) -> None:
        connection.sendall(sent)
        while not over.wait(0.1):
            connection.sendall(more)

    with _serving(serve) as port:
        yield port
        over.set()


@contextmanager
def _flood() -> Iterator[tuple[int, list[int]]]:
    """Port of a server with an endless response, and how many bytes of it were written."""
    written = [0]

    def serve(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            written[0] += connection.send(b"x" * 65_536)

    with _serving(serve) as port:
        yield port, written


@contextmanager
def _serving(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    def run() -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=run, daemon=True).start()
        yield int(listener.getsockname()[1])
