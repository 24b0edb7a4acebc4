"""Connections that are kept open between two requests to the same server.

A kept connection is no way around the guard. Its address was checked when it was opened, and is checked again by the
policy of the next request. A name that comes to resolve to a forbidden address (DNS rebinding) does not move an open
connection, and MAX_AGE_S limits for how long a name's earlier address is used, as in a cache of the DNS.

What a server sends while nobody has asked would be read as the answer to the next request, which may be another user's.
So a connection on which anything waits to be read is closed, whether that is bytes or the connection's end.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
import weakref
from dataclasses import dataclass
from typing import NamedTuple

from urllib3.util import wait_for_read

from worker.net.policy import GuardError, NetworkPolicy, check_address, check_target

#: Maximum seconds that a connection waits for its next request. Many servers close one that is silent for five.
MAX_IDLE_S = 4.0
#: Maximum seconds between a connection's opening and its last request.
MAX_AGE_S = 30.0
#: Maximum number of idle connections: all, and those to one server.
MAX_IDLE, MAX_IDLE_PER_ORIGIN = 64, 8
#: Seconds between two looks for idle connections that have expired, or that the server has closed.
CHECK_INTERVAL_S = 0.5


class Origin(NamedTuple):
    """What a connection is to. One to another scheme, name or port is never used in its place."""

    scheme: str
    #: As the request names it, not an address.
    host: str
    port: int


@dataclass(frozen=True, slots=True, eq=False)
class IdleConnection:
    """An open connection without a request."""

    origin: Origin
    #: The policy that it was opened under.
    policy: NetworkPolicy
    #: A TLS socket for https.
    socket: socket.socket
    #: Time of its opening, and time until which it may be used (time.monotonic()).
    opened: float
    expires: float

    def is_silent(self) -> bool:
        """False if something waits to be read: bytes without a request, or the connection's end."""
        if isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            return False
        return not wait_for_read(self.socket, timeout=0.0)

    def is_usable(self, policy: NetworkPolicy) -> bool:
        """True if nothing waits to be read, and the policy allows the address that the connection is to."""
        try:
            check_target(self.origin.host, self.origin.port, policy)
            check_address(self.origin.host, str(self.socket.getpeername()[0]), policy)
        except (GuardError, OSError):
            return False
        return self.is_silent()


class IdleConnections:
    """Idle connections by their origin. Thread-safe. One instance is for requests with one TLS context."""

    def __init__(self) -> None:
        #: The one that was used last comes last.
        self._idle: list[IdleConnection] = []
        self._lock = threading.Lock()
        #: Whether a thread closes those that have ended.
        self._is_checked = False
        _instances.add(self)

    def __len__(self) -> int:
        with self._lock:
            return len(self._idle)

    def take(self, origin: Origin, policy: NetworkPolicy) -> IdleConnection | None:
        """A connection for a request to `origin` under `policy`, which is then the caller's; None if there is none."""
        while (connection := self._pop(origin, policy)) is not None:
            if connection.is_usable(policy):
                return connection
            connection.socket.close()
        return None

    def keep(self, origin: Origin, policy: NetworkPolicy, connection: socket.socket, opened: float) -> None:
        """Keep a connection whose last answer was read to its end, or close it. `opened`: as in IdleConnection."""
        now = time.monotonic()
        idle = IdleConnection(origin, policy, connection, opened, min(now + MAX_IDLE_S, opened + MAX_AGE_S))
        if idle.expires <= now or not idle.is_silent():
            connection.close()
            return
        with self._lock:
            self._idle.append(idle)
            surplus = self._surplus(origin)
            if surplus is not None:
                self._idle.remove(surplus)
            if not self._is_checked:
                self._is_checked = True
                threading.Thread(target=self._check, daemon=True, name="idle-connections").start()
        if surplus is not None:
            surplus.socket.close()

    def _pop(self, origin: Origin, policy: NetworkPolicy) -> IdleConnection | None:
        with self._lock:
            now = time.monotonic()
            for connection in reversed(self._idle):
                if connection.origin == origin and connection.policy == policy and connection.expires > now:
                    self._idle.remove(connection)
                    return connection
        return None

    def _surplus(self, origin: Origin) -> IdleConnection | None:
        """The connection that was used longest ago, if there are too many."""
        of_origin = [each for each in self._idle if each.origin == origin]
        if len(of_origin) > MAX_IDLE_PER_ORIGIN:
            return of_origin[0]
        return self._idle[0] if len(self._idle) > MAX_IDLE else None

    def _check(self) -> None:
        """Close connections that nobody has taken in time, or that are no longer silent, until none is left."""
        is_needed = True
        while is_needed:
            time.sleep(CHECK_INTERVAL_S)
            with self._lock:
                now = time.monotonic()
                ended = [each for each in self._idle if each.expires <= now or not each.is_silent()]
                self._idle = [each for each in self._idle if each not in ended]
                is_needed = self._is_checked = bool(self._idle)
            for connection in ended:
                connection.socket.close()

    def _drop_in_child(self) -> None:
        # The parent's connections stay open: this closes the child's descriptors of them. The lock may be held by a
        # thread that the child does not have.
        self._lock, self._is_checked = threading.Lock(), False
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.socket.close()


_instances: weakref.WeakSet[IdleConnections] = weakref.WeakSet()


def _drop_all_in_child() -> None:
    for instance in list(_instances):
        instance._drop_in_child()


# Two processes on one connection would read each other's answers.
os.register_at_fork(after_in_child=_drop_all_in_child)
