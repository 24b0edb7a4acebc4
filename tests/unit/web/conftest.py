"""A good server, canaries and a policy that allows only the good one; no test reaches beyond loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from tests.unit.web.servers import GOOD, MAX_BYTES, Resolver, Server, script
from worker.images.fetch import Fetcher, FetchPolicy
from worker.net.session import tls_context

_TLS = tls_context()


@pytest.fixture(autouse=True)
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    stub = Resolver(socket.getaddrinfo)
    monkeypatch.setattr(socket, "getaddrinfo", stub)
    return stub


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A guard that fails must not let a test's packet out of this machine."""
    outside: list[str] = []
    real = socket.socket.connect

    def connect(self: socket.socket, target: Any) -> None:
        address = ip_address(str(target[0]).partition("%")[0])
        if not address.is_loopback and str(address) != "0.0.0.0":
            outside.append(str(address))
            raise OSError("not loopback")
        real(self, target)

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield outside
    assert outside == []


@pytest.fixture(autouse=True)
def one_tls_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the public authorities takes most of a plain test's time."""
    monkeypatch.setattr("worker.images.fetch.tls_context", lambda ca_file: tls_context(ca_file) if ca_file else _TLS)


@pytest.fixture(scope="module")
def good() -> Iterator[Server]:
    with Server(GOOD, answer=script) as server:
        yield server


@pytest.fixture(scope="module")
def canaries(good: Server) -> Iterator[list[Server]]:
    with Server("127.0.0.1", port=good.port, answer=script) as fourth:
        try:
            with Server("::1", port=good.port, answer=script) as sixth:
                yield [fourth, sixth]
        except OSError:
            yield [fourth]


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
