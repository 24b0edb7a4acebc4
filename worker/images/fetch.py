"""One image's download: redirects, statuses, and a body that is read no further than it may be.

Anyone who can send a job can name any address. `worker.net` ensures that the worker connects only to addresses that are
public or that the operator allowed, and never waits longer or reads more than the policy says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import client as http_client
from pathlib import Path
from urllib.parse import urljoin

import requests
import urllib3
from requests.utils import requote_uri

from tasks.errors import ImageBlocked, ImageInvalid, ImageTooLarge, ImageUnreachable, JobError
from tasks.picture_forms import PICTURE_BYTES, PICTURE_FORMS, foreign, may_be_picture
from worker.net.deadline import Deadline
from worker.net.guard import Guard, NoAddress, TooManyBytes
from worker.net.policy import NetworkPolicy, Refused, host_of
from worker.net.rate import RateLimiter
from worker.net.session import (
    CHUNK_BYTES,
    NETWORK_ERRORS,
    GuardedSession,
    describe_failure,
    parse_retry_after,
    tls_context,
    user_agent,
)
from worker.runtime.cpu import all_cores

#: Bytes that are read at once of a large body.
MAX_PIECE_BYTES = 262_144
#: Bytes after which a body is a large one. All large bodies share one rate, in bytes a second for each core: reading a
#: megabyte takes up to 5 ms of a core, and the sender of the jobs chooses how many there are. The rate applies even
#: while the worker has no other work: reading at full speed would keep it from taking new jobs.
LARGE_BYTES, LARGE_BYTES_PER_S = 2_000_000, 15_000_000
#: Bytes of a chunk that do not count for the image, so that tiny ones soon are too much: each is parsed in Python.
CHUNK_COST = 16

#: Statuses that come with the image. 203: a proxy on the way has changed something, as one that shrinks pictures does.
WITH_IMAGE = frozenset({200, 203})
#: Content-Encodings that change bytes. Others are labels that servers write without meaning (`utf-8`, `binary`): the
#: first bytes decide.
COMPRESSIONS = frozenset({"gzip", "x-gzip", "compress", "x-compress", "deflate", "br", "zstd", "dcb", "dcz"})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Statuses after which the same request may succeed, beside 5xx: request timeout, too early, too many requests.
RETRYABLE_STATUSES = frozenset({408, 425, 429})

_GONE = "nothing is there (any more), so send another URL or leave the job out"
#: What helps against a status.
_CURES = {404: _GONE, 410: _GONE}


@dataclass(frozen=True, slots=True)
class FetchPolicy(NetworkPolicy):
    """What an operator lets jobs read. By default public addresses on the web's ports, and no local files."""

    #: The folder that paths are read below; None refuses them.
    root: Path | None = None
    max_redirects: int = 5
    #: Downloads at once from one host.
    host_concurrency: int = 8
    #: How the operators of the hosts reach the operator of this worker; part of the User-Agent.
    contact: str | None = None


class Fetcher:
    """Downloads images for many job threads at once: nothing that a request changes is kept."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        self._tls = tls_context(policy.ca_file)
        self._rate = RateLimiter(LARGE_BYTES_PER_S * len(all_cores()))
        self._headers = {
            "User-Agent": user_agent(contact=policy.contact),
            "Accept": "image/jpeg, image/png, image/webp, image/gif, */*;q=0.1",
            # A compressed body may inflate without end, and pictures gain nothing.
            "Accept-Encoding": "identity",
            "Connection": "close",
        }

    def fetch(self, url: str) -> bytes:
        """Download one image; its bytes begin like a picture's, and may still be none.

        Raises ImageBlocked, ImageTooLarge, ImageInvalid or ImageUnreachable (retryable). No message holds a URL's path,
        query or user, since they may be secrets: the host at most.
        """
        guard = Guard(self._policy, Deadline(self._policy.total_s))
        with GuardedSession(guard, self._tls) as session:
            for _ in range(self._policy.max_redirects + 1):
                with _translated(url, guard), self._response(session, url) as response:
                    if response.status_code not in REDIRECTS:
                        return _body(response, guard, self._rate)
                    url = _redirect_target(response)
        hops = self._policy.max_redirects
        raise ImageBlocked(
            f"{_host(url)} comes after more than {hops} redirects: send the image's final URL, or have "
            "IDEFICS_IMAGE_MAX_REDIRECTS raised.",
            detail="redirects",
        )

    def _response(self, session: GuardedSession, url: str) -> requests.Response:
        return session.send_checked(requests.Request("GET", url, headers=self._headers))


def requested_host(url: str) -> str:
    """The host as it will be asked, for its limit: one in another script has a plain name too. Never raises."""
    host = host_of(url)
    if host is None:
        with suppress(requests.RequestException, ValueError):
            host = host_of(str(requests.Request("GET", url).prepare().url))
    return (host or "").rstrip(".").lower()


def is_transient(status: int) -> bool:
    """True for an HTTP status after which the same request may succeed later."""
    return status >= 500 or status in RETRYABLE_STATUSES


def too_large(what: str, max_bytes: int) -> ImageTooLarge:
    """The error of an image that `what`, with a verb, has too many bytes of."""
    return ImageTooLarge(
        f"{what} more than {max_bytes:,} bytes: send a smaller image, or have IDEFICS_IMAGE_MAX_BYTES raised.",
        detail="bytes",
    )


def _host(url: str) -> str:
    return host_of(url) or "The image's host"


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


def _body(response: requests.Response, guard: Guard, rate: RateLimiter) -> bytes:
    host, max_bytes = _host(response.url), guard.policy.max_bytes
    _check_status(response, host)
    encodings = response.headers.get("Content-Encoding", "").lower().split(",")
    if COMPRESSIONS.intersection(encoding.strip() for encoding in encodings):
        raise ImageInvalid(
            f"{host} compresses the image although asked not to: use another server.", detail="not_a_picture"
        )
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large(f"{host} sends", max_bytes)
    return _read_capped(response, host, guard, rate)


def _check_status(response: requests.Response, host: str) -> None:
    status = response.status_code
    if status in WITH_IMAGE:
        return
    if is_transient(status):
        error = ImageUnreachable(
            f"{host} answered with status {status}: send the job again when it is well.", detail=f"http_{status}"
        )
        # For Celery's retry: no thread sleeps so long.
        error.retry_after_s = parse_retry_after(response.headers.get("Retry-After", ""), time.time())
        raise error
    # Not retryable: a missing or forbidden image stays so. ImageInvalid, since there is no image at that URL
    # for the job to have; ImageBlocked would blame the operator's policy. The detail tells it from a broken picture.
    raise ImageInvalid(
        f"{host} answered with status {status} and no image: {_CURES.get(status, 'check that the URL is public')}.",
        detail=f"http_{status}",
    )


def _read_capped(response: requests.Response, host: str, guard: Guard, rate: RateLimiter) -> bytes:
    # Not one buffer that grows: its new memory would be touched with the interpreter held, and moved again and again.
    pieces: list[bytes] = []
    size, head = 0, b""
    for piece in _pieces(response.raw):
        pieces.append(piece)
        size += len(piece)
        head += piece[: PICTURE_BYTES - len(head)]
        _check_head(head, host)
        guard.body_bytes += len(piece) - CHUNK_COST
        if size > guard.policy.max_bytes:
            raise too_large(f"{host} sends", guard.policy.max_bytes)
        if size > LARGE_BYTES:
            wait_s = rate.wait_s(len(piece))
            time.sleep(wait_s)
            # This wait is ours, not the server's.
            guard.deadline.extend(wait_s)
    return b"".join(pieces)


def _check_head(head: bytes, host: str) -> None:
    """Raise ImageInvalid where a file's first bytes are no picture's: the rest, which may be endless, is not read."""
    if len(head) == PICTURE_BYTES and not may_be_picture(head):
        sent = foreign(head) or f"no {PICTURE_FORMS}"
        raise ImageInvalid(
            f"{host} sends {sent}: check that the URL is that of a {PICTURE_FORMS}.", detail="not_a_picture"
        )


def _pieces(raw: urllib3.HTTPResponse) -> Iterator[bytes]:
    """Read a body in pieces that grow with it, since each costs the interpreter the same."""
    if raw.chunked:
        yield from raw.stream(CHUNK_BYTES, decode_content=False)
        return
    size = 0
    while piece := raw.read(min(max(CHUNK_BYTES, size // 4), MAX_PIECE_BYTES), decode_content=False):
        size += len(piece)
        yield piece


@contextmanager
def _translated(url: str, guard: Guard) -> Iterator[None]:
    """Raise what a request meets as a JobError."""
    # `from None` throughout: the libraries' messages hold the whole URL, and Celery stores tracebacks.
    try:
        yield
    except JobError:
        raise
    except TooManyBytes:
        raise too_large(f"{_host(url)} sends", guard.policy.max_bytes) from None
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
        return ImageInvalid(f"{host} announces its length in no valid form: check the server.", detail="length")
    if _is_cut_off(error):
        return ImageUnreachable(
            f"{host} sent fewer bytes than it announced: send the job again when it is well.", detail="length"
        )
    problem, detail = describe_failure(error)
    return ImageUnreachable(f"{host} {problem}: check that it is up, then send the job again.", detail=detail)


def _is_cut_off(error: Exception) -> bool:
    return any(isinstance(cause, http_client.IncompleteRead) for cause in (error, *error.args))
