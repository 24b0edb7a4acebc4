"""Which requests the review page's server answers. Pure.

Any page in the reviewer's browser can send requests to loopback, and any user of this machine can connect to it. So
each request must name this server as its host, which a foreign name that resolves to loopback does not; it must know
the token; and what changes anything must come from the page itself and be JSON, which no form can send.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from urllib.parse import parse_qs

#: The one route that has the token in its address: the others have it in a header.
PAGE = "/"
#: A decision's text may be as long as a model's answer.
MAX_BODY_BYTES = 1 << 18
_MAX_PARAMETERS = 4


class Refusal(Exception):
    """A request that is not answered, with the reason as the reviewer may read it."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Guard:
    """The checks of a server on a port of loopback."""

    port: int
    token: str

    def check(self, method: str, path: str, query: Mapping[str, str], headers: Message) -> None:
        """Raises Refusal for a request that the page did not send."""
        host = _one(headers, "Host").lower()
        if host not in (f"127.0.0.1:{self.port}", f"localhost:{self.port}"):
            raise Refusal(HTTPStatus.FORBIDDEN, "This server has another name.")
        given = query.get("token", "") if path == PAGE else _one(headers, "Authorization").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(errors="replace"), self.token.encode()):
            raise Refusal(HTTPStatus.FORBIDDEN, "Open the address that `idefics-jobs review` has printed.")
        # Browsers without this header are older than four years, and send `Origin` with what changes anything.
        if path != PAGE and headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise Refusal(HTTPStatus.FORBIDDEN, "Another site has sent this.")
        if method == "POST" and _one(headers, "Origin").lower() != f"http://{host}":
            raise Refusal(HTTPStatus.FORBIDDEN, "Another site has sent this.")


def body_length(headers: Message) -> int:
    """The bytes of a request's JSON. Raises Refusal if it is of another type, or too long, or does not tell."""
    if headers.get_content_type() != "application/json":
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be application/json.")
    told = _one(headers, "Content-Length")
    if "Transfer-Encoding" in headers or not (told.isascii() and told.isdecimal()):
        raise Refusal(HTTPStatus.LENGTH_REQUIRED, "The body must tell its length.")
    if len(told) > len(str(MAX_BODY_BYTES)) or int(told) > MAX_BODY_BYTES:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A decision has at most {MAX_BODY_BYTES:,} bytes.")
    return int(told)


def split_target(target: str) -> tuple[str, dict[str, str]]:
    """A request's path and its parameters, each given once. Raises Refusal."""
    path, _, query = target.partition("?")
    try:
        parameters = parse_qs(query, keep_blank_values=True, max_num_fields=_MAX_PARAMETERS)
    except ValueError:
        raise Refusal(HTTPStatus.BAD_REQUEST, "The address has too many parameters.") from None
    return path, {name: _single(values) for name, values in parameters.items()}


def _one(headers: Message, name: str) -> str:
    """A header's value; empty if it is not there. Raises Refusal if it is there twice."""
    return _single(headers.get_all(name, [""]))


def _single(values: Sequence[str]) -> str:
    if len(values) != 1:
        raise Refusal(HTTPStatus.BAD_REQUEST, "The request says something twice.")
    return values[0]
