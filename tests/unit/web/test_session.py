"""HTTP over guarded connections: what is sent, TLS, and servers that answer with too much, too slowly or nonsense."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.errors import ImageBlocked, ImageTooLarge, ImageUnreachable
from tests.support.memory import peak_memory
from tests.unit.web.servers import (
    BODY,
    CHUNKED,
    GOOD,
    HOSTILE_ANSWERS,
    LEAVES_S,
    MAX_BYTES,
    Server,
    bomb,
    chunk,
    flood,
    redirect,
    response,
    script,
    tls_server,
    trickle,
    within,
)
from worker.images.fetch import Fetcher, FetchPolicy
from worker.net.session import parse_retry_after, tls_context, user_agent

#: Bytes while a hostile server is read, both ends together: the cap some times over, for buffers and copies.
MOST_MEMORY = 10 * MAX_BYTES


def test_the_request_carries_nothing_but_what_it_needs(
    fetcher: Fetcher, good: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine good.test login me password pw\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1")
    fetcher.fetch(f"http://good.test:{good.port}{redirect('/ok')}")
    for head in good.heads[-2:]:
        names = {line.partition(":")[0].lower() for line in head.strip().splitlines()[1:]}
        assert names == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert "Accept-Encoding: identity\r\n" in good.heads[-1]
    assert f"User-Agent: {user_agent()}\r\n" in good.heads[-1]


@pytest.mark.parametrize("before", [b"100 Continue", b"102 Processing", b"103 Early Hints", b"199 Whatever"])
def test_informational_responses_are_skipped(before: bytes, policy: FetchPolicy) -> None:
    start = b"HTTP/1.1 %s\r\nLink: </style.css>; rel=preload\r\n\r\n" % before
    with Server(GOOD, answer=lambda connection, _: connection.sendall(start * 3 + response())) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,)))
        assert fetcher.fetch(f"http://good.test:{server.port}/") == BODY


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
    assert parse_retry_after(header, 1_445_412_380) == seconds


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Where the certificate of `secure` stands, once that serves."""
    return tmp_path / "crt"


@pytest.fixture
def secure(certificate: Path) -> Iterator[Server]:
    with Server(GOOD, answer=script, tls=tls_server(certificate.parent, "good.test")) as server:
        yield server


@pytest.fixture
def trusting(policy: FetchPolicy, secure: Server, certificate: Path) -> FetchPolicy:
    """Allows the secure server and trusts its certificate."""
    return replace(policy, ports=(*policy.ports, secure.port), ca_file=certificate)


def test_a_certificate_must_be_trusted_and_of_that_name(secure: Server, trusting: FetchPolicy) -> None:
    with pytest.raises(ImageUnreachable, match="certificate"):
        Fetcher(replace(trusting, ca_file=None)).fetch(f"https://good.test:{secure.port}/ok")
    fetcher = Fetcher(trusting)
    assert fetcher.fetch(f"https://good.test:{secure.port}/ok") == BODY
    with pytest.raises(ImageUnreachable, match="certificate"):
        fetcher.fetch(f"https://notgood.test:{secure.port}/ok")


def test_an_operators_own_authority_is_trusted_beside_the_public_ones(secure: Server, certificate: Path) -> None:
    assert len(tls_context(certificate).get_ca_certs()) == len(tls_context().get_ca_certs()) + 1 > 50


def test_https_does_not_redirect_to_http(secure: Server, trusting: FetchPolicy, good: Server) -> None:
    fetcher = Fetcher(trusting)
    hits = good.hits
    with pytest.raises(ImageBlocked, match="https"):
        fetcher.fetch(f"https://good.test:{secure.port}{redirect(f'http://good.test:{good.port}/ok')}")
    assert good.hits == hits
    assert fetcher.fetch(f"https://good.test:{secure.port}{redirect('/ok')}") == BODY


def test_trickled_tls_leaves_within_the_deadline(secure: Server, trusting: FetchPolicy, hasty: FetchPolicy) -> None:
    fetcher = Fetcher(replace(hasty, ports=trusting.ports, ca_file=trusting.ca_file))
    with within(LEAVES_S), pytest.raises(ImageUnreachable, match="seconds"):
        fetcher.fetch(f"https://good.test:{secure.port}/hostile/0")


def test_a_trickled_handshake_leaves_within_the_deadline(hasty: FetchPolicy) -> None:
    # A record that announces 16 kB of handshake and lets them drip.
    record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"
    with Server(GOOD, greeting=lambda c: trickle(c, record, b"\0")) as server:
        fetcher = Fetcher(replace(hasty, ports=(server.port,)))
        with within(LEAVES_S), pytest.raises(ImageUnreachable):
            fetcher.fetch(f"https://good.test:{server.port}/ok")


@pytest.mark.parametrize(("number", "name"), list(enumerate(HOSTILE_ANSWERS)))
def test_a_hostile_server_is_left_within_the_deadline_and_the_cap_on_memory(
    number: int, name: str, policy: FetchPolicy, hasty: FetchPolicy, good: Server
) -> None:
    slow = "trickled" in name or name == "silence"
    fetcher = Fetcher(hasty if slow else replace(policy, max_redirects=0))
    assert len(bomb()) < MAX_BYTES

    def leave() -> None:
        with within(LEAVES_S), pytest.raises(HOSTILE_ANSWERS[name][1]):
            fetcher.fetch(f"http://good.test:{good.port}/hostile/{number}")

    assert peak_memory(leave, expected_below=MOST_MEMORY) < MOST_MEMORY


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        pytest.param(b"", b"HTTP/1.1 100 Continue\r\n\r\n", id="1xx answers"),
        pytest.param(CHUNKED + chunk(BODY[:20]), chunk(b"x"), id="chunks of one byte"),
    ],
)
def test_many_tiny_pieces_cost_little_cpu_under_a_large_limit(start: bytes, piece: bytes, policy: FetchPolicy) -> None:
    with Server(GOOD, answer=lambda c, _: flood(c, start, piece * 999)) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,), max_bytes=20_000_000))
        began = time.thread_time()
        with pytest.raises(ImageTooLarge):
            fetcher.fetch(f"http://good.test:{server.port}/x")
    assert time.thread_time() - began < 0.6


def test_a_large_image_in_small_chunks_arrives(policy: FetchPolicy) -> None:
    body = BODY[:100] * 20_000
    with Server(GOOD, answer=lambda c, _: c.sendall(CHUNKED + chunk(BODY[:100]) * 20_000 + b"0\r\n\r\n")) as server:
        fetcher = Fetcher(replace(policy, ports=(server.port,), max_bytes=len(body)))
        assert fetcher.fetch(f"http://good.test:{server.port}/x") == body
