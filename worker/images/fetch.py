"""An image's source to its bytes, through a guard.

Whoever can send a job can name any address. The guard sees to it that the worker never connects to one that
is not public (or that the operator did not allow), never waits longer, and never reads more than the policy
says.
"""

from __future__ import annotations

import binascii
import io
import logging
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from http import client as http_client
from http.cookiejar import DefaultCookiePolicy
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import requote_uri
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from tasks.addresses import Address, Network, is_public, unmapped
from tasks.errors import ImageBlocked, ImageInvalid, ImageTooLarge, ImageUnreachable, JobError
from tasks.image_sources import data_head
from tasks.payloads import ImageSource
from worker.images.containers import foreign
from worker.images.host_limits import Hosts
from worker.net.deadline import Deadline, Watch
from worker.net.rate import Pace
from worker.runtime.cpu import all_cores

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# urllib3 logs whole URLs, which may hold tokens: at DEBUG each one, at WARNING those with odd headers.
logging.getLogger("urllib3").setLevel(logging.ERROR)

#: Characters. Longer URLs are no signed links; sending one could outlast the deadline.
MAX_URL_CHARS = 8_192
#: Bytes of status lines, headers and chunk sizes that an answer may have on top of its image, whatever is read ahead.
MAX_FRAMING_BYTES = 81_920
CHUNK_BYTES = 16_384
#: Bytes that are read at once of a large body.
MAX_PIECE_BYTES = 262_144
#: Bytes after which a body is a large one. Those keep a pace together, in bytes a second for each core: reading a
#: megabyte takes up to 5 ms of a core, and whoever sends the jobs chooses how many there are. Not only while others
#: have work: a worker that reads at full speed cannot let them in.
LARGE_BYTES, LARGE_BYTES_PER_S = 2_000_000, 15_000_000
#: Bytes of a chunk that do not count for the image, so that tiny ones soon are too much: each is parsed in Python.
CHUNK_COST = 16

#: Statuses that come with the image. 203: a proxy on the way has changed something, as one that shrinks pictures does.
WITH_IMAGE = frozenset({200, 203})
#: The one informational status that is no answer to wait behind: what follows is no HTTP.
SWITCHING_PROTOCOLS = 101
#: Content-Encodings that change bytes. Others are labels that servers write without meaning (`utf-8`, `binary`): the
#: first bytes decide.
COMPRESSIONS = frozenset({"gzip", "x-gzip", "compress", "x-compress", "deflate", "br", "zstd", "dcb", "dcz"})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Statuses that may pass, beside 5xx: request timeout, too early, too many requests.
PASSING = frozenset({408, 425, 429})

# "#@", "?@" and "\@" before the first slash are where URL parsers disagree about which part is the host.
_PLAIN_URL = re.compile(r"https?://[^/\\@\x00-\x20\x7f]+(/[^\x00-\x20\x7f]*)?", re.IGNORECASE)
#: In the place of a host that cannot be repeated.
NO_HOST = "The image's host"
_HOST_NAME = re.compile(r"(?=.{1,254}\Z)([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?")
#: How the files begin that worker.images.decode opens, and the bytes that tell.
_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftyp(?:avi[fs]|mif1|msf1)", re.DOTALL
)
_PICTURE_BYTES = 12
#: Dropped from base64 before it is read.
_BLANKS = b" \t\n\r\f"

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a fifo without a writer would wait for ever.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What an operator lets jobs read. The defaults: public addresses on the web's ports, no local files."""

    #: Networks that are allowed although they are not public.
    allow_networks: tuple[Network, ...] = ()
    #: When not empty, only these hosts and their sub-domains.
    allow_domains: tuple[str, ...] = ()
    ports: tuple[int, ...] = (80, 443)
    max_bytes: int = 20_000_000
    #: The folder that paths are read below; None refuses them.
    root: Path | None = None
    #: Seconds for one connection to be accepted, its TLS handshake again as much.
    connect_s: float = 3.0
    #: Seconds without a byte.
    read_s: float = 5.0
    #: Seconds for one image: look-up, every redirect and the body.
    total_s: float = 20.0
    max_redirects: int = 5
    #: Downloads at once from one host.
    host_turns: int = 8
    #: Who runs this worker, for those who run the hosts.
    contact: str | None = None
    #: Certificates of the operator's own authorities, beside the public ones.
    ca_file: Path | None = None
    #: How the names of the settings begin that would allow what is refused.
    settings: str = "IDEFICS_IMAGE"


class GuardError(ValueError):
    """Why the guard stopped a request.

    A ValueError, since urllib3 takes an OSError for a broken connection and makes it something retryable.
    """

    def __init__(self, message: str = "", detail: str | None = None) -> None:
        super().__init__(message)
        #: The error's detail.
        self.detail = detail


class Refused(GuardError):
    """The policy forbids this host, address or port."""


class NoAddress(GuardError):
    """The host's name could not be looked up."""


class TooManyBytes(GuardError):
    """The server sends more than its image, or one of the allowed size, needs."""


# --- Which hosts and addresses are good: pure -----------------------------------------------------


def is_allowed_address(address: Address, policy: FetchPolicy) -> bool:
    """True for a public address and for one in a network that the operator allows."""
    plain = unmapped(address)
    return is_public(plain) or any(plain in network for network in policy.allow_networks)


def is_allowed_host(host: str, policy: FetchPolicy) -> bool:
    """True if the operator lists the host or a parent domain of it, or lists none at all."""
    name = host.rstrip(".").lower()
    domains = [domain.strip(".").lower() for domain in policy.allow_domains]
    return not domains or any(name == domain or name.endswith(f".{domain}") for domain in domains)


def _is_host(host: str) -> bool:
    # No "%": neither an escaped name nor an IPv6 zone, which would choose the network card.
    if ":" not in host:
        return _HOST_NAME.fullmatch(host) is not None
    return "%" not in host and _is_address(host)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def check_url(url: str, policy: FetchPolicy) -> SplitResult:
    """A URL's parts. Raises Refused for one that is not plain http(s), names a user, or breaks the policy.

    This only spares a connection: host, port and address are checked again where the connection is made.
    """
    try:
        parts = urlsplit(url)
        port = parts.port if parts.port is not None else {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise Refused("The URL is malformed: correct it", "url") from None
    if parts.scheme not in ("http", "https") or "@" in parts.netloc or not _is_host(parts.hostname or ""):
        raise Refused("The URL names no plain host: write http(s)://host/path without a user", "url")
    _check_target(parts.hostname or "", port, policy)
    return parts


def _check_target(host: str, port: int | None, policy: FetchPolicy) -> None:
    if port not in policy.ports:
        allowed = ", ".join(str(number) for number in policy.ports)
        raise Refused(
            f"{host} is asked for on a port that is not allowed: use one of {allowed}, or have it added to "
            f"{policy.settings}_PORTS",
            "port",
        )
    if not is_allowed_host(host, policy):
        raise Refused(
            f"{host} is not among the allowed domains: use one of them, or have it added to "
            f"{policy.settings}_ALLOW_DOMAINS",
            "domain",
        )


def check_plain(url: str) -> None:
    if len(url) > MAX_URL_CHARS:
        raise Refused(f"The URL has more than {MAX_URL_CHARS} characters: use a shorter one", "url")
    if not _PLAIN_URL.fullmatch(url):
        raise Refused("The URL is no plain http(s)://host/path: write it without user and spaces", "url")
    if urlsplit(url).port == 0:
        # requests would drop it and take the scheme's port.
        raise Refused("The URL names port 0: write the port that the server has", "port")


# --- The connection: checked where it is made -----------------------------------------------------

_watch = Watch()


class Guard:
    """Makes one request's connections: only to allowed addresses, only until the deadline."""

    def __init__(self, policy: FetchPolicy, deadline: Deadline) -> None:
        self.policy = policy
        self.deadline = deadline
        #: Bytes of the image so far, less each chunk's cost.
        self.body_bytes = 0
        self.responses: list[http_client.HTTPResponse] = []
        self._handles: list[socket.socket] = []

    def close(self) -> None:
        for handle in self._handles:
            _watch.forget(handle)
        # urllib3 forgets to close an answer whose headers it refuses: the socket would stay open until collected.
        for response in self.responses:
            response.close()

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection to the very address that was checked: no second look-up could answer otherwise."""
        _check_target(host, port, self.policy)
        return self._first_open(self.resolve(host, port))

    def resolve(self, host: str, port: int) -> list[Any]:
        """What the DNS says of a host. Raises NoAddress, or Refused where any of its addresses is forbidden."""
        answers = self._look_up(host, port)
        for *_, target in answers:
            self._check_address(host, str(target[0]))
        return answers

    def _look_up(self, host: str, port: int) -> list[Any]:
        # getaddrinfo knows no timeout. A thread left behind ends when the system's resolver gives up.
        future: Future[list[Any]] = Future()
        Thread(target=_resolve, args=(host, port, future), daemon=True, name="image-look-up").start()
        try:
            answers = future.result(self.deadline.left(self.policy.total_s))
        except (NotInTime, OSError, UnicodeError):
            raise NoAddress(f"{host} has no address in the DNS", "dns") from None
        if not answers:
            raise NoAddress(f"{host} has no address in the DNS", "dns")
        return answers

    def _check_address(self, host: str, text: str) -> None:
        # One bad address refuses the host: a good one beside it is how a rebinding attack looks.
        if not is_allowed_address(ip_address(text.partition("%")[0]), self.policy):
            raise Refused(
                f"{host} is at no public address: use a public host, or have its network added to "
                f"{self.policy.settings}_ALLOW_NETWORKS",
                "network",
            )

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
            # For the TLS handshake and the request, which wait by the socket's timeout.
            connection.settimeout(self.deadline.left(self.policy.connect_s))
            self._handles.append(_watch.add(connection, self.deadline))
        except BaseException:
            connection.close()
            raise
        return connection


def _resolve(host: str, port: int, future: Future[list[Any]]) -> None:
    try:
        future.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except Exception as error:
        future.set_exception(error)


class _Metered(io.RawIOBase):
    """What a server sends, whatever it is: every wait ends with the deadline and every byte counts.

    Timeouts of requests are per read, so one byte now and then (in a header, a 1xx answer, a chunk's size)
    would hold a thread for ever.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, guard: Guard) -> None:
        self._raw = raw
        self._sock = sock
        self._guard = guard
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        self._sock.settimeout(self._guard.deadline.left(self._guard.policy.read_s))
        count = self._raw.readinto(buffer) or 0
        if not count and self._guard.deadline.has_passed():
            # Our end, not the server's: what came before need be no whole image.
            raise TimeoutError
        self._bytes += count
        # A quarter more: chunked bodies carry their chunks' sizes. By what has come of the image, not by what may: 1xx
        # answers and chunks of one byte cost a thread seconds of parsing in Python, with the interpreter held.
        if self._bytes > self._guard.body_bytes * 5 // 4 + MAX_FRAMING_BYTES:
            raise TooManyBytes
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http_client.HTTPResponse):
    # How the base class begins to read an answer: it reads past 100 alone.
    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 < status < 200 or status == SWITCHING_PROTOCOLS:
                return version, status, reason
            while self.fp.readline(CHUNK_BYTES).rstrip(b"\r\n"):
                # Headers of an informational answer say nothing of the image; what reads them counts their bytes.
                pass

    def __init__(self, sock: socket.socket, *args: Any, guard: Guard, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        guard.responses.append(self)
        self.fp = io.BufferedReader(_Metered(self.fp.detach(), sock, guard), CHUNK_BYTES)

    def begin(self) -> None:
        try:
            super().begin()
        except GuardError:
            raise
        except (TypeError, ValueError, LookupError) as error:
            # The e-mail parser's, of parameters that no header has: neither urllib3 nor requests expects it.
            raise http_client.HTTPException("the answer's headers cannot be read") from error


class _Connection(HTTPConnection):
    def __init__(self, *args: Any, guard: Guard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard = guard
        self.response_class = partial(_Response, guard=guard)  # type: ignore[assignment]

    def _new_conn(self) -> socket.socket:
        try:
            return self._guard.connect(self.host, self.port)
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(self, "no connection in time") from error


class _TlsConnection(_Connection, HTTPSConnection):
    """As above; the certificate must be the host name's as ever, although the address was looked up here."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    def __init__(self, guard: Guard, tls: ssl.SSLContext) -> None:
        self._guard = guard
        self._tls = tls
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self._tls)
        manager: Any = self.poolmanager
        # Not through the pools' key, which takes no arguments of others.
        manager.pool_classes_by_scheme = {
            "http": partial(_Pool, guard=self._guard),
            "https": partial(_TlsPool, guard=self._guard),
        }

    def cert_verify(self, *args: Any, **kwargs: Any) -> None:
        # The context verifies, and has its authorities loaded: requests would load them for each connection.
        pass


class GuardedSession(requests.Session):
    """A session for one request and its redirects. Never kept: nothing passes from job to job."""

    def __init__(self, guard: Guard, tls: ssl.SSLContext) -> None:
        super().__init__()
        self._guard = guard
        # Else a .netrc's passwords are sent, and a proxy from the environment connects unguarded.
        self.trust_env = False
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        for prefix in ("http://", "https://"):
            self.mount(prefix, _Adapter(guard, tls))

    def close(self) -> None:
        super().close()
        self._guard.close()

    def get_redirect_target(self, resp: requests.Response) -> None:
        # requests reads a redirect's body to its end, however long, even when streaming: we follow ourselves.
        return None


def tls_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """Certificates are checked against certifi's authorities and an operator's own, whatever the environment says."""
    context = ssl.create_default_context(cafile=certifi.where())
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    return context


def user_agent(role: str = "image fetcher", contact: str | None = None) -> str:
    try:
        version = metadata.version("idefics-jobs")
    except metadata.PackageNotFoundError:
        version = "dev"
    return f"idefics-jobs/{version} (+{role}{f'; {contact}' if contact else ''})"


# --- The three kinds of source --------------------------------------------------------------------


class Fetcher:
    """Reads images for many job threads at once: it holds nothing that a request changes."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        self._tls = tls_context(policy.ca_file)
        self._hosts = Hosts(policy.host_turns)
        self._pace = Pace(LARGE_BYTES_PER_S * len(all_cores()))
        self._headers = {
            "User-Agent": user_agent(contact=policy.contact),
            "Accept": "image/jpeg, image/png, image/webp, image/gif, */*;q=0.1",
            # A compressed body is a bomb's fuse, and pictures gain nothing.
            "Accept-Encoding": "identity",
            "Connection": "close",
        }

    def fetch(self, source: ImageSource, patience_s: float | None = None) -> bytes:
        """The bytes of one image; they may still be no picture. `patience_s`: to wait for a turn at its host.

        Raises ImageBlocked, ImageTooLarge, ImageInvalid, ImageUnreachable (retryable), or HostBusy. No message
        holds a URL's path, query or user, since they may be secrets: the host at most.
        """
        if not isinstance(source, str):
            return read_below(self._policy.root, source.path, self._policy.max_bytes)
        if source[:5].lower() == "data:":
            return decode_data_uri(source, self._policy.max_bytes)
        with self._hosts.turn(_turn_of(source), patience_s):
            return self._download(source)

    def _download(self, url: str) -> bytes:
        guard = Guard(self._policy, Deadline(self._policy.total_s))
        with GuardedSession(guard, self._tls) as session:
            for _ in range(self._policy.max_redirects + 1):
                with _translated(url, guard), self._answer(session, url) as response:
                    if response.status_code not in REDIRECTS:
                        return _body(response, guard, self._pace)
                    url = _redirect_target(response)
        hops = self._policy.max_redirects
        raise ImageBlocked(
            f"{_host(url)} comes after more than {hops} redirects: send the image's final URL, or have "
            "IDEFICS_IMAGE_MAX_REDIRECTS raised.",
            detail="redirects",
        )

    def _answer(self, session: GuardedSession, url: str) -> requests.Response:
        check_plain(url)
        request = session.prepare_request(requests.Request("GET", url, headers=self._headers))
        # What is checked is what is sent: requests may have rewritten the host (IDNA).
        check_url(str(request.url), self._policy)
        timeout = (self._policy.connect_s, self._policy.read_s)
        return session.send(request, stream=True, allow_redirects=False, timeout=timeout, proxies={})


def _redirect_target(response: requests.Response) -> str:
    location = response.headers.get("Location")
    if not location:
        raise ImageInvalid(
            f"{_host(response.url)} redirects to nowhere: send the image's final URL.", detail="redirects"
        )
    with suppress(UnicodeError):
        # Headers are read as Latin-1, but where a server spells a path out it writes UTF-8.
        location = location.encode("latin-1").decode()
    target = urljoin(response.url, requote_uri(location.strip())).partition("#")[0]
    if response.url.startswith("https:") and not target.lower().startswith("https:"):
        raise Refused(f"{_host(response.url)} redirects away from https: send the image's final URL", "redirects")
    return target


def _body(response: requests.Response, guard: Guard, pace: Pace) -> bytes:
    host, max_bytes = _host(response.url), guard.policy.max_bytes
    _check_status(response, host)
    encodings = response.headers.get("Content-Encoding", "").lower().split(",")
    if COMPRESSIONS.intersection(encoding.strip() for encoding in encodings):
        raise ImageInvalid(
            f"{host} compresses the image although asked not to: use another server.", detail="not_a_picture"
        )
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(f"{host} sends", max_bytes)
    return _read_capped(response, host, guard, pace)


_GONE = "nothing is there (any more), so send another URL or leave the job out"
#: What helps against a status.
_CURES = {404: _GONE, 410: _GONE}


def _check_status(response: requests.Response, host: str) -> None:
    status = response.status_code
    if status in WITH_IMAGE:
        return
    if status >= 500 or status in PASSING:
        error = ImageUnreachable(
            f"{host} answered with status {status}: send the job again when it is well.", detail=f"http_{status}"
        )
        # For Celery's retry: no thread sleeps so long.
        error.retry_after_s = retry_after_s(response.headers.get("Retry-After", ""), time.time())
        raise error
    # Not retryable: a missing or forbidden image stays so. ImageInvalid, since there is no image at that URL
    # for the job to have; ImageBlocked would blame the operator's policy. The detail tells it from a broken picture.
    raise ImageInvalid(
        f"{host} answered with status {status} and no image: {_CURES.get(status, 'check that the URL is public')}.",
        detail=f"http_{status}",
    )


def retry_after_s(header: str, now: float) -> float | None:
    """The seconds that a Retry-After asks for, as a number or as a date; None for anything else."""
    if header.isascii() and header.strip().isdigit():
        return float(header.strip()[:9])
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _read_capped(response: requests.Response, host: str, guard: Guard, pace: Pace) -> bytes:
    # Not one buffer that grows: its new memory would be touched with the interpreter held, and moved again and again.
    pieces: list[bytes] = []
    size, head = 0, b""
    for piece in _pieces(response.raw):
        pieces.append(piece)
        size += len(piece)
        head += piece[: _PICTURE_BYTES - len(head)]
        if len(head) == _PICTURE_BYTES and not _PICTURE.match(head):
            # Whatever else it sends, be it without end, need not be read.
            sent = foreign(head) or "no JPEG, PNG, WebP, GIF or AVIF"
            raise ImageInvalid(
                f"{host} sends {sent}: check that the URL is that of a JPEG, PNG, WebP, GIF or AVIF.",
                detail="not_a_picture",
            )
        guard.body_bytes += len(piece) - CHUNK_COST
        if size > guard.policy.max_bytes:
            raise _too_large(f"{host} sends", guard.policy.max_bytes)
        if size > LARGE_BYTES:
            rest = pace.wait_s(len(piece))
            time.sleep(rest)
            # It is not the server that lets us wait.
            guard.deadline.extend(rest)
    return b"".join(pieces)


def _pieces(raw: urllib3.HTTPResponse) -> Iterator[bytes]:
    """A body: in larger pieces the more there is of it, since each costs the interpreter the same."""
    if raw.chunked:
        yield from raw.stream(CHUNK_BYTES, decode_content=False)
        return
    size = 0
    while piece := raw.read(min(max(CHUNK_BYTES, size // 4), MAX_PIECE_BYTES), decode_content=False):
        size += len(piece)
        yield piece


def _too_large(what: str, max_bytes: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"{what} more than {max_bytes:,} bytes: send a smaller image, or have IDEFICS_IMAGE_MAX_BYTES raised.",
        detail="bytes",
    )


NETWORK_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http_client.HTTPException,
    OSError,
)


@contextmanager
def _translated(url: str, guard: Guard) -> Iterator[None]:
    # `from None` throughout: the libraries' messages hold the whole URL, and Celery stores tracebacks.
    try:
        yield
    except JobError:
        raise
    except TooManyBytes:
        raise _too_large(f"{_host(url)} sends", guard.policy.max_bytes) from None
    except NoAddress as error:
        raise ImageUnreachable(f"{error}: check its spelling, then send the job again.", detail=error.detail) from None
    except Refused as error:
        raise ImageBlocked(f"{error}.", detail=error.detail) from None
    except NETWORK_ERRORS as error:
        raise _failure(error, _host(url), guard) from None
    except ValueError:
        raise ImageBlocked("The image's URL is malformed: correct it.", detail="url") from None


def _failure(error: Exception, host: str, guard: Guard) -> JobError:
    if guard.deadline.has_passed():
        problem = f"did not deliver the image within {guard.policy.total_s:g} seconds"
        return ImageUnreachable(
            f"{host} {problem}: check that it is well and send the job again, or have IDEFICS_IMAGE_TIMEOUT_S raised.",
            detail="timeout",
        )
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
        return ImageBlocked("The image's URL is malformed: correct it.", detail="url")
    if isinstance(error, requests.exceptions.InvalidHeader):
        return ImageInvalid(
            f"{host} announces its bytes in a form that nobody reads: check the server.", detail="length"
        )
    if _is_cut_off(error):
        return ImageUnreachable(
            f"{host} sent fewer bytes than it announced: send the job again when it is well.", detail="length"
        )
    problem, detail = _network_problem(error)
    return ImageUnreachable(f"{host} {problem}: check that it is up, then send the job again.", detail=detail)


def _is_cut_off(error: Exception) -> bool:
    return any(isinstance(cause, http_client.IncompleteRead) for cause in (error, *error.args))


def network_problem(error: Exception) -> str:
    return _network_problem(error)[0]


def _network_problem(error: Exception) -> tuple[str, str]:
    """What went wrong on the way to a host, and the error's detail."""
    if isinstance(error, requests.exceptions.SSLError | urllib3.exceptions.SSLError):
        return "has no valid certificate for its name", "tls"
    if isinstance(error, requests.exceptions.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "did not answer in time", "timeout"
    return "could not be reached or broke the connection off", "connection"


def _host(url: str) -> str:
    """The host for a message; nothing else of a URL is safe to repeat."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        host = ""
    return host if _is_host(host) else NO_HOST


def _turn_of(url: str) -> str:
    """The host that a URL takes a turn at, as it will be asked: one of another script has a plain name too."""
    host = _host(url)
    if host == NO_HOST:
        with suppress(requests.RequestException, ValueError):
            host = _host(str(requests.Request("GET", url).prepare().url))
    return host.rstrip(".").lower()


def decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes of a `data:image/...;base64,` URI. Raises ImageBlocked, ImageInvalid or ImageTooLarge."""
    start = data_head(uri)
    if start is None:
        raise ImageBlocked(
            "Of data: URIs only data:image/...;base64, is read: send the image in this form.", detail="data_uri"
        )
    # Before decoding, so that a giant costs no second copy. Padding makes up to two bytes less.
    size = (len(uri) - start) // 4 * 3 - uri.count("=", len(uri) - 2)
    if size > max_bytes:
        # Blanks and escapes are no bytes of the image.
        size -= sum(uri.count(blank, start) for blank in _BLANKS.decode()) + 2 * uri.count("%", start)
    if size > max_bytes:
        raise _too_large("The data: URI holds", max_bytes)
    try:
        return _forgiving_base64(uri[start:])
    except ValueError:
        raise ImageInvalid(
            "The data: URI is not valid base64: encode the image's bytes anew.", detail="data_uri"
        ) from None


def _forgiving_base64(text: str) -> bytes:
    """As the WHATWG's "forgiving-base64 decode": wrapped, unpadded or percent-encoded too. Raises ValueError."""
    with suppress(ValueError):
        return binascii.a2b_base64(text, strict_mode=True)
    plain = text.encode("ascii")
    if b"%" in plain:
        plain = unquote_to_bytes(plain)
    plain = plain.translate(None, _BLANKS)
    if len(plain) % 4 == 0:
        # Two at most; any other is no letter of base64.
        plain = plain.removesuffix(b"=").removesuffix(b"=")
    if len(plain) % 4 == 1 or b"=" in plain:
        raise ValueError("no base64")
    return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4), strict_mode=True)


def read_below(root: Path | None, path: str, max_bytes: int) -> bytes:
    """A regular file strictly below `root`. Raises ImageBlocked, ImageInvalid or ImageTooLarge."""
    if root is None:
        raise ImageBlocked(
            "This worker reads no local files: send a URL, or have IDEFICS_IMAGE_ROOT set.", detail="path"
        )
    relative = PurePosixPath(path)
    if relative.is_absolute() or not relative.parts or ".." in relative.parts or "\0" in path:
        raise ImageBlocked(
            "The image's path leaves the image root (IDEFICS_IMAGE_ROOT): write it from there, without '..'.",
            detail="path",
        )
    try:
        try:
            return _read_file(root, relative.parts, max_bytes)
        except OSError:
            # On the way there may be a link, which may lead somewhere below the root.
            return _read_file(*_inside(root, relative), max_bytes)
    except (OSError, RuntimeError, ValueError):
        raise ImageInvalid(
            "The image's path names no readable file: check it below the image root (IDEFICS_IMAGE_ROOT).",
            detail="no_file",
        ) from None


def _inside(root: Path, relative: PurePosixPath) -> tuple[Path, tuple[str, ...]]:
    base = root.resolve(strict=True)
    real = (base / relative).resolve()
    if base not in real.parents:
        raise ImageBlocked(
            "The image's path leaves the image root (IDEFICS_IMAGE_ROOT): copy the file below the root.", detail="path"
        )
    return base, real.relative_to(base).parts


@contextmanager
def _opened(base: Path, parts: tuple[str, ...]) -> Iterator[int]:
    # Step by step without following links: what was resolved may have been exchanged for one meanwhile. The root is the
    # operator's, who may have made it a link.
    opened = [os.open(base, _FOLDER_FLAGS & ~os.O_NOFOLLOW)]
    try:
        for name in parts[:-1]:
            opened.append(os.open(name, _FOLDER_FLAGS, dir_fd=opened[-1]))
        opened.append(os.open(parts[-1], _FILE_FLAGS, dir_fd=opened[-1]))
        yield opened[-1]
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _read_file(base: Path, parts: tuple[str, ...], max_bytes: int) -> bytes:
    with _opened(base, parts) as descriptor:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ImageInvalid("The image's path is no regular file: name one.", detail="no_file")
        data = _contents(descriptor, status.st_size, max_bytes + 1)
    if len(data) > max_bytes:
        raise _too_large("The image's file has", max_bytes)
    return data


def _contents(descriptor: int, size: int, most: int) -> bytes:
    """Files grow, and some in /proc say that they are empty: what comes counts."""
    pieces: list[bytes] = []
    while most and (piece := os.read(descriptor, min(most, size + CHUNK_BYTES))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)
