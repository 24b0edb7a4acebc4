"""HTTP over guarded connections: without proxies, cookies, unchecked redirects and endless responses."""

from __future__ import annotations

import io
import logging
import socket
import ssl
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from http import client as http_client
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from worker.net.guard import Guard, TooManyBytes
from worker.net.idle import Origin
from worker.net.policy import GuardError, check_plain, check_url
from worker.runtime.version import project_version

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# urllib3 logs whole URLs, which may hold tokens: at DEBUG each one, at WARNING those with odd headers.
logging.getLogger("urllib3").setLevel(logging.ERROR)

#: Maximum bytes of a response's status lines, headers and chunk sizes, with read-ahead.
MAX_FRAMING_BYTES = 81_920
#: Bytes of one read.
CHUNK_BYTES = 16_384
#: Statuses from 200 on of responses that have no body, whatever their headers say.
BODILESS = frozenset({204, 205, 304})
#: The informational status after which a connection no longer carries HTTP.
SWITCHING_PROTOCOLS = 101

#: Errors that a request may raise besides GuardError.
NETWORK_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http_client.HTTPException,
    OSError,
)


class LimitedReader(io.RawIOBase):
    """Reads a response's raw bytes within the deadline, and counts them.

    The timeouts of `requests` are per read, so a byte now and then (in a header, a 1xx response, a chunk's size) could
    occupy a thread forever.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, guard: Guard) -> None:
        self._raw = raw
        self._sock = sock
        self._guard = guard
        self._bytes = 0
        self._is_at_end = False

    def end(self) -> None:
        """From now on, give nothing but what a buffer before this reader holds already."""
        self._is_at_end = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Raises TimeoutError after the deadline, and TooManyBytes if the framing outgrows the body."""
        if self._is_at_end:
            return 0
        self._sock.settimeout(self._guard.deadline.left(self._guard.policy.read_s))
        count = self._raw.readinto(buffer) or 0
        if not count and self._guard.deadline.has_passed():
            # The watchdog and not the server ended the stream, so the body may be incomplete.
            raise TimeoutError
        if count:
            self._guard.awaits_kept = False
        self._bytes += count
        # A quarter more than the body, for the chunks' sizes. The received part of the body counts, not its maximum:
        # otherwise 1xx responses and one-byte chunks would take seconds of parsing in Python, with the GIL held.
        if self._bytes > self._guard.body_bytes * 5 // 4 + MAX_FRAMING_BYTES:
            raise TooManyBytes
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Buffer(io.BufferedReader):
    """Reads ahead. `is_empty` tells, once it is closed, whether all that it read was used."""

    is_empty = False

    def __init__(self, reader: LimitedReader) -> None:
        super().__init__(reader, CHUNK_BYTES)
        self._reader = reader

    def close(self) -> None:
        if not self.closed:
            self._reader.end()
            self.is_empty = not self.peek(1)
        super().close()


class _Response(http_client.HTTPResponse):
    # The base class begins to read a response here, and skips status 100 only.
    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 < status < 200 or status == SWITCHING_PROTOCOLS:
                return version, status, reason
            while self.fp.readline(CHUNK_BYTES).rstrip(b"\r\n"):
                # Headers of an informational response are not the body's; LimitedReader counts their bytes.
                pass

    def __init__(self, sock: socket.socket, *args: Any, guard: Guard, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        guard.responses.append(self)
        self._reader = LimitedReader(self.fp.detach(), sock, guard)
        self.fp = self._buffer = _Buffer(self._reader)

    def begin(self) -> None:
        try:
            super().begin()
        except GuardError:
            raise
        except (TypeError, ValueError, LookupError) as error:
            # The e-mail parser raises these for invalid parameters of headers; urllib3 and requests do not expect them.
            raise http_client.HTTPException("the response's headers cannot be read") from error

    def stop_waiting(self) -> None:
        """Read from now on only what has arrived."""
        self._reader.end()

    def is_complete(self) -> bool:
        """Whether the response was read to an end that is beyond doubt, so that its connection may be used again.

        Only HTTP/1.1 with one plain Content-Length: chunks, whose parser is lenient, and statuses without a body leave
        room for a server's and a proxy's opinions on where a response ends.
        """
        return self.isclosed() and self._has_plain_length() and self.length == 0 and self._buffer.is_empty

    def _has_plain_length(self) -> bool:
        headers = self.headers
        if headers is None or self.version != 11 or self.will_close or self.status in BODILESS or self.status < 200:
            return False
        lengths = headers.get_all("Content-Length", [])
        options = ",".join(headers.get_all("Connection", [])).lower()
        # What stands in a payload is lines that are no headers.
        is_understood = not headers.defects and not headers.get_payload()
        is_plain = len(lengths) == 1 and lengths[0].isascii() and lengths[0].isdecimal()
        return is_understood and is_plain and "Transfer-Encoding" not in headers and "close" not in options


class _Connection(HTTPConnection):
    scheme = "http"

    def __init__(self, *args: Any, guard: Guard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard = guard
        self._handle: socket.socket | None = None
        #: Time when it was opened (time.monotonic()).
        self._opened = 0.0
        self._response: _Response | None = None
        self.response_class = self._receive  # type: ignore[assignment]

    @property
    def _origin(self) -> Origin:
        return Origin(self.scheme, self.host, self.port)

    def _receive(self, sock: socket.socket, *args: Any, **kwargs: Any) -> _Response:
        if hasattr(socket, "TCP_QUICKACK"):
            # On a kept connection Linux would acknowledge the headers after 40 ms. Simple servers send them in a packet
            # of their own, and wait for that before they send the body (Nagle's algorithm).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._response = _Response(sock, *args, guard=self._guard, **kwargs)
        return self._response

    def connect(self) -> None:
        """Use a kept connection or open a new one."""
        kept = self._guard.take_kept(self._origin)
        if kept is None:
            super().connect()
            return
        self.sock, self._opened = kept.socket, kept.opened
        self._handle = self._guard.watch(kept.socket)
        kept.socket.settimeout(self._guard.deadline.left(self._guard.policy.connect_s))
        # Its certificate was, when it was opened.
        self.is_verified = self.scheme == "https"

    def _new_conn(self) -> socket.socket:
        self._opened = time.monotonic()
        try:
            connection = self._guard.connect(self.host, self.port)
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(self, "no connection in time") from error
        # Already here, so that it is closed if it cannot be watched.
        self.sock = connection
        self._handle = self._guard.watch(connection)
        return connection

    def give_back(self) -> None:
        """Leave the connection to later requests if its last response is complete; close it otherwise."""
        connection, handle = self.sock, self._handle
        if connection is not None and handle is not None and self._response and self._response.is_complete():
            self.sock = None
            # First: the next request has a deadline of its own.
            self._guard.unwatch(handle)
            self._guard.keep(self._origin, connection, self._opened)
        self.close()


class _TlsConnection(_Connection, HTTPSConnection):
    """A TLS connection. Its certificate must match the host name, although the address was looked up here."""

    scheme = "https"


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection

    # urllib3 calls this once a response has been read, or has failed. Its own pools keep nothing.
    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.give_back()


class _TlsPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    def __init__(self, guard: Guard, tls: ssl.SSLContext) -> None:
        self._guard = guard
        self._tls = tls
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._tls)
        manager: Any = self.poolmanager
        # Not as arguments of the manager: its pools' keys accept only urllib3's own.
        manager.pool_classes_by_scheme = {
            "http": partial(_Pool, guard=self._guard),
            "https": partial(_TlsPool, guard=self._guard),
        }

    def cert_verify(self, *args: Any, **kwargs: Any) -> None:
        # The context verifies with authorities that are loaded once; requests would load them for each connection.
        pass


class GuardedSession(requests.Session):
    """A session for one request and its redirects. It is not reused, so that no state passes between jobs."""

    def __init__(self, guard: Guard, tls: ssl.SSLContext) -> None:
        super().__init__()
        self._guard = guard
        # Otherwise requests would send passwords of a .netrc, and connect to a proxy of the environment unguarded.
        self.trust_env = False
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        for prefix in ("http://", "https://"):
            self.mount(prefix, _Adapter(guard, tls))

    def close(self) -> None:
        super().close()
        self._guard.close()

    def get_redirect_target(self, resp: requests.Response) -> None:
        # requests would read a redirect's whole body, even when streaming. So callers follow redirects themselves.
        return None

    def send_checked(self, request: requests.Request) -> requests.Response:
        """Send a request if the policy allows its URL. The caller streams the body and follows redirects.

        Raises GuardError, one of NETWORK_ERRORS, or ValueError for a malformed URL.
        """
        check_plain(request.url)
        prepared = self.prepare_request(request)
        policy = self._guard.policy
        # Checked after the preparation, in which requests may have rewritten the host (IDNA).
        check_url(str(prepared.url), policy)
        timeout = (policy.connect_s, policy.read_s)
        send = partial(self.send, prepared, stream=True, allow_redirects=False, timeout=timeout, proxies={})
        try:
            return send()
        except NETWORK_ERRORS:
            # Servers close idle connections whenever they like.
            if not self._guard.retry_without_kept():
                raise
        return send()

    def skip_body(self, response: requests.Response) -> None:
        """Read the body of the latest response if it is short and has arrived, so that its connection can be kept."""
        cast(_Response, self._guard.responses[-1]).stop_waiting()
        with suppress(*NETWORK_ERRORS):
            response.raw.read(CHUNK_BYTES, decode_content=False)


def tls_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """A TLS context that trusts certifi's authorities and those of `ca_file`, regardless of the environment."""
    context = ssl.create_default_context(cafile=certifi.where())
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    return context


def user_agent(role: str = "image fetcher", contact: str | None = None) -> str:
    """The User-Agent header: this project, its version, the role, and how to reach the operator."""
    return f"idefics-jobs/{project_version()} (+{role}{f'; {contact}' if contact else ''})"


def parse_retry_after(header: str, now: float) -> float | None:
    """Seconds to wait by a Retry-After header, a number or a date (`now`: Unix seconds); None for anything else."""
    if header.isascii() and header.strip().isdigit():
        return float(header.strip()[:9])
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def describe_failure(error: Exception) -> tuple[str, str]:
    """The predicate of a sentence about a failed connection to a host, and the error's detail."""
    if isinstance(error, requests.exceptions.SSLError | urllib3.exceptions.SSLError):
        return "has no valid certificate for its name", "tls"
    if isinstance(error, requests.exceptions.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "did not answer in time", "timeout"
    return "could not be reached or broke the connection off", "connection"
