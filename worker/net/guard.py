"""Checked connections: the address that was looked up and checked is the one connected to."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from http import client as http_client
from threading import Thread
from typing import Any

from worker.net.deadline import Deadline, DeadlineWatchdog
from worker.net.idle import IdleConnection, IdleConnections, Origin
from worker.net.policy import GuardError, NetworkPolicy, check_address, check_target

#: One thread for all connections of the process.
_watchdog = DeadlineWatchdog()


class NoAddress(GuardError):
    """The DNS has no address for the host."""


class TooManyBytes(GuardError):
    """The server sends more than a body of the allowed size needs."""


class Guard:
    """Opens the connections of one request and its redirects, to allowed addresses and until the deadline."""

    def __init__(self, policy: NetworkPolicy, deadline: Deadline, idle: IdleConnections | None = None) -> None:
        """`idle`: connections of earlier requests; None: each request has a new connection, closed after it."""
        self.policy = policy
        self.deadline = deadline
        #: Whether a request was sent on a kept connection, and no byte of its answer has come.
        self.awaits_kept = False
        self._idle = idle
        self._may_take_kept = True
        #: Bytes of the body read so far, less each chunk's cost.
        self.body_bytes = 0
        self.responses: list[http_client.HTTPResponse] = []
        self._handles: set[socket.socket] = set()

    def close(self) -> None:
        """Stop watching the connections, and close the responses."""
        for handle in list(self._handles):
            self.unwatch(handle)
        # urllib3 does not close a response with invalid headers: its socket would stay open until garbage collection.
        for response in self.responses:
            response.close()

    # Kept connections

    def take_kept(self, origin: Origin) -> IdleConnection | None:
        """A connection to `origin` that an earlier request has left, if there is one."""
        kept = self._idle.take(origin, self.policy) if self._idle is not None and self._may_take_kept else None
        self.awaits_kept = kept is not None
        return kept

    def keep(self, origin: Origin, connection: socket.socket, opened: float) -> None:
        """Leave a connection, no longer watched, to later requests. `opened`: when it was (time.monotonic())."""
        if self._idle is None:
            connection.close()
        else:
            self._idle.keep(origin, self.policy, connection, opened)

    def retry_without_kept(self) -> bool:
        """Whether the request that failed may be sent again, on a new connection: a kept one had died unnoticed."""
        may_retry = self.awaits_kept and not self.deadline.has_passed()
        if may_retry:
            self.awaits_kept = self._may_take_kept = False
        return may_retry

    # Watched connections

    def watch(self, connection: socket.socket) -> socket.socket:
        """Have a connection, plain or TLS, end at the deadline. Returns the handle for `unwatch`."""
        handle = _watchdog.watch(connection, self.deadline)
        self._handles.add(handle)
        return handle

    def unwatch(self, handle: socket.socket) -> None:
        """The opposite of `watch`."""
        self._handles.discard(handle)
        _watchdog.forget(handle)

    # New connections

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
        except BaseException:
            connection.close()
            raise
        return connection


def _resolve(host: str, port: int, future: Future[list[Any]]) -> None:
    try:
        future.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except Exception as error:
        future.set_exception(error)
