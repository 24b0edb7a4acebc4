"""Refuses URLs that parsers read differently, that name no host, or that name a user. Pure; used by client and worker.

Which addresses are allowed is decided by the worker, in `worker/net/policy.py`.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

#: Characters. Even signed links are shorter; sending a longer one could outlast the deadline.
MAX_URL_CHARS = 8_192

# "#@", "?@" and "\@" before the first slash are where URL parsers disagree about which part is the host.
_PLAIN_URL = re.compile(r"https?://[^/\\@\x00-\x20\x7f]+(/[^\x00-\x20\x7f]*)?", re.IGNORECASE)
_HOST_NAME = re.compile(r"(?=.{1,254}\Z)([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?")


def fault_of(url: str) -> tuple[str, str] | None:
    """Why a URL is not plain, with the cure, and the detail of the job's error; None for a plain one.

    A host outside ASCII is not checked: it is converted to its ASCII name when it is resolved.
    """
    if len(url) > MAX_URL_CHARS:
        return f"The URL has more than {MAX_URL_CHARS} characters: use a shorter one", "url"
    if not _PLAIN_URL.fullmatch(url):
        return "The URL is not a plain http(s)://host/path: write it without user and spaces", "url"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "The URL is malformed: correct it", "url"
    if port == 0:
        # requests would drop it and take the scheme's port.
        return "The URL names port 0: write the port that the server has", "port"
    if host.isascii() and not is_host(host):
        return "The URL names no plain host: write http(s)://host/path without a user", "url"
    return None


def host_of(url: str) -> str | None:
    """The host of an http(s) URL in lower case; None for any other text."""
    if not url[:8].lower().startswith(("http://", "https://")):
        return None
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def is_host(host: str) -> bool:
    """True for a name or an address. "%" is refused, in escaped names and in IPv6 zones, which select an interface."""
    if ":" not in host:
        return _HOST_NAME.fullmatch(host) is not None
    return "%" not in host and _is_address(host)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
