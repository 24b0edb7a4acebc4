"""Checked connections: the address that was looked up and checked is the one connected to."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from http import client as http_client
from threading import Thread
from typing import Any

from worker.net.deadline import Deadline, DeadlineWatchdog
from worker.net.policy import GuardError, NetworkPolicy, check_address, check_target

#: One thread for all connections of the process.
_watchdog = DeadlineWatchdog()


class NoAddress(GuardError):
    """The DNS has no address for the host."""


class TooManyBytes(GuardError):
    """The server sends more than a body of the allowed size needs."""


class Guard:
    """Opens the connections of one request and its redirects, to allowed addresses and until the deadline."""

    def __init__(self, policy: NetworkPolicy, deadline: Deadline) -> None:
        self.policy = policy
        self.deadline = deadline
        #: Bytes of the body read so far, less each chunk's cost.
        self.body_bytes = 0
        self.responses: list[http_client.HTTPResponse] = []
        self._handles: list[socket.socket] = []

    def close(self) -> None:
        """Stop watching the connections, and close the responses."""
        for handle in self._handles:
            _watchdog.forget(handle)
        # urllib3 does not close a response with invalid headers: its socket would stay open until garbage collection.
        for response in self.responses:
            response.close()

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to the checked address, without a second lookup that could return another one.

        Raises Refused, NoAddress, or an OSError.
        """
        check_target(host, port, self.policy)
        return self._first_open(self.resolve(host, port))

    def resolve(self, host: str, port: int) -> list[Any]:
        """Look a host up; returns getaddrinfo's tuples. Raises NoAddress, or Refused for any forbidden address.

        One forbidden address refuses the host, since DNS rebinding mixes allowed and forbidden ones.
        """
        answers = self._look_up(host, port)
        for *_, target in answers:
            check_address(host, str(target[0]), self.policy)
        return answers

    def _look_up(self, host: str, port: int) -> list[Any]:
        # getaddrinfo has no timeout. An abandoned thread ends when the system's resolver gives up.
        future: Future[list[Any]] = Future()
        Thread(target=_resolve, args=(host, port, future), daemon=True, name="dns-lookup").start()
        try:
            answers = future.result(self.deadline.left(self.policy.total_s))
        except (NotInTime, OSError, UnicodeError):
            raise NoAddress(f"{host} has no address in the DNS", "dns") from None
        if not answers:
            raise NoAddress(f"{host} has no address in the DNS", "dns")
        return answers

    def _first_open(self, answers: list[Any]) -> socket.socket:
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, target in answers:
            try:
                return self._open(family, kind, protocol, target)
            except OSError as error:
                failure = error
        raise failure

    def _open(self, family: int, kind: int, protocol: int, target: Any) -> socket.socket:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(self.deadline.left(self.policy.connect_s))
            connection.connect(target)
            # The TLS handshake and the request wait with the socket's timeout.
            connection.settimeout(self.deadline.left(self.policy.connect_s))
            self._handles.append(_watchdog.watch(connection, self.deadline))
        except BaseException:
            connection.close()
            raise
        return connection


def _resolve(host: str, port: int, future: Future[list[Any]]) -> None:
    try:
        future.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except Exception as error:
        future.set_exception(error)
