"""Downloads one image: redirects, statuses, and a body whose size and time are limited.

Anyone who can send a job can name any address. `worker.net` ensures that the worker connects only to addresses that are
public or that the operator allowed, and never waits longer or reads more than the policy says.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
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
from worker.net.idle import IdleConnections
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

#: Maximum bytes of one read of a large body.
MAX_CHUNK_BYTES = 262_144
#: Bytes after which a body is large, and the rate that all large bodies share, in bytes a second for each core. Reading
#: a megabyte takes up to 5 ms of a core, and producers choose how many they send. The rate applies to an idle worker
#: too, since reading at full speed would keep it from taking new jobs.
LARGE_BYTES, LARGE_BYTES_PER_S = 2_000_000, 15_000_000
#: Bytes of each chunk that do not count for the image. So bodies of tiny chunks, each parsed in Python, are refused.
CHUNK_COST = 16

#: Statuses of a response with the image. 203: a proxy has changed the response, as proxies that shrink pictures do.
WITH_IMAGE = frozenset({200, 203})
#: Content-Encodings that change bytes. Others are labels without meaning (`utf-8`, `binary`): then the first bytes of
#: the body decide.
COMPRESSIONS = frozenset({"gzip", "x-gzip", "compress", "x-compress", "deflate", "br", "zstd", "dcb", "dcz"})
#: Directives of X-Robots-Tag that forbid the use of an image by AI, and the agent that this worker is in that header.
NO_AI, AGENT = frozenset({"noai", "noimageai"}), "idefics-jobs"
REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Statuses besides 5xx after which the same request may succeed: request timeout, too early, too many requests.
RETRYABLE_STATUSES = frozenset({408, 425, 429})

_GONE = "nothing is there (any more), so send another URL or leave the job out"
#: Advice by status.
_CURES = {404: _GONE, 410: _GONE}


@dataclass(frozen=True, slots=True)
class FetchPolicy(NetworkPolicy):
    """The sources that jobs may read. By default public addresses on the web's ports, and no local files."""

    #: The folder below which paths are read. None: paths are refused.
    root: Path | None = None
    max_redirects: int = 5
    #: Maximum seconds for which a host that sends Retry-After is left alone.
    retry_after_max_s: float = 300.0
    #: Whether images are refused whose server forbids their use by AI.
    respect_noai: bool = False
    #: How a host's operators can reach the operator of this worker; part of the User-Agent.
    contact: str | None = None


class Fetcher:
    """Downloads images. Thread-safe: requests share nothing but idle connections."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        self._tls = tls_context(policy.ca_file)
        self._idle = IdleConnections()
        self._rate = RateLimiter(LARGE_BYTES_PER_S * len(all_cores()))
        self._headers = {
            "User-Agent": user_agent(contact=policy.contact),
            "Accept": "image/jpeg, image/png, image/webp, image/gif, */*;q=0.1",
            # A compressed body may inflate without end, and compression does not make pictures smaller.
            "Accept-Encoding": "identity",
            "Connection": "keep-alive",
        }

    def fetch(self, url: str) -> bytes:
        """Download one image. Its first bytes are checked to be a picture's; the others are not.

        Raises ImageBlocked, ImageTooLarge, ImageInvalid or ImageUnreachable (retryable). Of the URL, messages contain
        only the host: path, query and user may be secrets.
        """
        guard = Guard(self._policy, Deadline(self._policy.total_s), self._idle)
        with GuardedSession(guard, self._tls) as session:
            for _ in range(self._policy.max_redirects + 1):
                with _translated(url, guard), self._response(session, url) as response:
                    target = _redirect_target(response) if response.status_code in REDIRECTS else None
                    if response.status_code not in WITH_IMAGE:
                        session.skip_body(response)
                    if target is None:
                        return _body(response, guard, self._rate, respect_noai=self._policy.respect_noai)
                    url = target
        hops = self._policy.max_redirects
        raise ImageBlocked(
            f"{_host(url)} comes after more than {hops} redirects: send the image's final URL, or have "
            "IDEFICS_IMAGE_MAX_REDIRECTS raised.",
            detail="redirects",
        )

    def _response(self, session: GuardedSession, url: str) -> requests.Response:
        return session.send_checked(requests.Request("GET", url, headers=self._headers))


def requested_host(url: str) -> str:
    """The host in the form that the request will use (IDNA, lower case), as a key for its limit. Never raises."""
    host = host_of(url)
    if host is None:
        with suppress(requests.RequestException, ValueError):
            host = host_of(str(requests.Request("GET", url).prepare().url))
    return (host or "").rstrip(".").lower()


def is_transient(status: int) -> bool:
    """True for an HTTP status after which the same request may succeed later."""
    return status >= 500 or status in RETRYABLE_STATUSES


def too_large(what: str, max_bytes: int) -> ImageTooLarge:
    """The error of an image with too many bytes. `what`: subject and verb, such as "The image's file has"."""
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
        # Headers are read as Latin-1, but servers write paths outside ASCII as UTF-8.
        location = location.encode("latin-1").decode()
    target = urljoin(response.url, requote_uri(location.strip())).partition("#")[0]
    if response.url.startswith("https:") and not target.lower().startswith("https:"):
        raise Refused(f"{_host(response.url)} redirects away from https: send the image's final URL", "redirects")
    return target


def _body(response: requests.Response, guard: Guard, rate: RateLimiter, *, respect_noai: bool = False) -> bytes:
    host, max_bytes = _host(response.url), guard.policy.max_bytes
    _check_status(response, host)
    if respect_noai and _forbids_ai(response.raw.headers.getlist("X-Robots-Tag")):
        raise ImageBlocked(
            f"{host} forbids the use of this image by AI (X-Robots-Tag), and this worker respects that "
            "(IDEFICS_IMAGE_RESPECT_NOAI): leave the image out.",
            detail="noai",
        )
    encodings = response.headers.get("Content-Encoding", "").lower().split(",")
    if COMPRESSIONS.intersection(encoding.strip() for encoding in encodings):
        raise ImageInvalid(
            f"{host} compresses the image although asked not to: use another server.", detail="not_a_picture"
        )
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large(f"{host} sends", max_bytes)
    return _read_capped(response, host, guard, rate)


def _forbids_ai(tags: Iterable[str]) -> bool:
    """Whether one of these X-Robots-Tag headers, for everybody or for this agent, forbids the use of an image by AI."""
    for tag in tags:
        agent, colon, directives = tag.rpartition(":")
        is_meant = not colon or agent.strip().lower() == AGENT
        if is_meant and NO_AI.intersection(each.strip().lower() for each in directives.split(",")):
            return True
    return False


def _check_status(response: requests.Response, host: str) -> None:
    status = response.status_code
    if status in WITH_IMAGE:
        return
    if is_transient(status):
        error = ImageUnreachable(
            f"{host} answered with status {status}: send the job again when it is well.", detail=f"http_{status}"
        )
        # For Celery's retry, so that no thread sleeps.
        error.retry_after_s = parse_retry_after(response.headers.get("Retry-After", ""), time.time())
        raise error
    # Not retryable, since a missing or forbidden image stays so. Not ImageBlocked, which would blame the operator's
    # policy. The detail tells this case from a broken picture.
    raise ImageInvalid(
        f"{host} answered with status {status} and no image: {_CURES.get(status, 'check that the URL is public')}.",
        detail=f"http_{status}",
    )


def _read_capped(response: requests.Response, host: str, guard: Guard, rate: RateLimiter) -> bytes:
    # A list and not one growing buffer, which would be moved again and again, with the GIL held.
    chunks: list[bytes] = []
    size, first_bytes = 0, b""
    for chunk in _chunks(response.raw):
        chunks.append(chunk)
        size += len(chunk)
        first_bytes += chunk[: PICTURE_BYTES - len(first_bytes)]
        _check_first_bytes(first_bytes, host)
        guard.body_bytes += len(chunk) - CHUNK_COST
        if size > guard.policy.max_bytes:
            raise too_large(f"{host} sends", guard.policy.max_bytes)
        if size > LARGE_BYTES:
            wait_s = rate.wait_s(len(chunk))
            time.sleep(wait_s)
            # The server is not to blame for this wait.
            guard.deadline.extend(wait_s)
    return b"".join(chunks)


def _check_first_bytes(first_bytes: bytes, host: str) -> None:
    """Raise ImageInvalid if a file's first bytes are not a picture's. The rest, which may be endless, is not read."""
    if len(first_bytes) == PICTURE_BYTES and not may_be_picture(first_bytes):
        sent = foreign(first_bytes) or f"no {PICTURE_FORMS}"
        raise ImageInvalid(
            f"{host} sends {sent}: check that the URL is that of a {PICTURE_FORMS}.", detail="not_a_picture"
        )


def _chunks(raw: urllib3.HTTPResponse) -> Iterator[bytes]:
    """Read a body in chunks that grow with it, since each read takes the same time of the interpreter."""
    if raw.chunked:
        yield from raw.stream(CHUNK_BYTES, decode_content=False)
        return
    size = 0
    while chunk := raw.read(min(max(CHUNK_BYTES, size // 4), MAX_CHUNK_BYTES), decode_content=False):
        size += len(chunk)
        yield chunk


@contextmanager
def _translated(url: str, guard: Guard) -> Iterator[None]:
    """Turn the errors of a request into JobErrors."""
    # `from None` everywhere, since the libraries' messages contain the whole URL, and Celery stores tracebacks.
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
