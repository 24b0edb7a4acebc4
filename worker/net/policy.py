"""Decides which URLs, hosts, addresses and ports a connection may go to. Pure: nothing here opens one.

`worker/images/fetch.py` applies it to images, `worker/delivery/callback_policy.py` to callbacks. URLs that
every deployment refuses are refused by the client already (`tasks/urls.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from tasks.addresses import Address, Network, is_public, unmapped
from tasks.urls import fault_of, is_host


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """The allowed targets and durations of connections. By default public addresses on the web's ports."""

    #: Allowed networks that are not public.
    allow_networks: tuple[Network, ...] = ()
    #: When not empty, only these hosts and their sub-domains.
    allow_domains: tuple[str, ...] = ()
    ports: tuple[int, ...] = (80, 443)
    #: Maximum bytes of a response's body.
    max_bytes: int = 20_000_000
    #: Maximum seconds for one TCP connection, and again for its TLS handshake.
    connect_s: float = 3.0
    #: Maximum seconds without a byte.
    read_s: float = 5.0
    #: Maximum seconds for one request: DNS lookup, every redirect and the body.
    total_s: float = 20.0
    #: Certificates of the operator's own authorities, trusted beside the public ones.
    ca_file: Path | None = None
    #: The prefix of the settings' names in error messages.
    settings_prefix: str = "IDEFICS_IMAGE"


class GuardError(ValueError):
    """The guard stopped a request.

    A ValueError, since urllib3 treats an OSError as a broken connection, which is retryable.
    """

    def __init__(self, message: str = "", detail: str | None = None) -> None:
        """`detail`: a short code for the cause; becomes the detail of the job's error."""
        super().__init__(message)
        self.detail = detail


class Refused(GuardError):
    """The policy forbids this URL, host, address or port."""


def is_allowed_address(address: Address, policy: NetworkPolicy) -> bool:
    """True for a public address and for one in a network that the operator allows."""
    plain = unmapped(address)
    return is_public(plain) or any(plain in network for network in policy.allow_networks)


def is_allowed_host(host: str, policy: NetworkPolicy) -> bool:
    """True if the operator lists the host or a parent domain of it, or lists no domains."""
    name = host.rstrip(".").lower()
    domains = [domain.strip(".").lower() for domain in policy.allow_domains]
    return not domains or any(name == domain or name.endswith(f".{domain}") for domain in domains)


def check_plain(url: str) -> None:
    """Raise Refused for a URL that parsers may read in different ways. Call this before any of them reads it."""
    if fault := fault_of(url):
        raise Refused(*fault)


def check_url(url: str, policy: NetworkPolicy) -> SplitResult:
    """Split a URL. Raises Refused for one that is not plain http(s), names a user, or breaks the policy.

    This only saves a connection: host, port and address are checked again when the connection is made.
    """
    try:
        parts = urlsplit(url)
        port = parts.port if parts.port is not None else {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise Refused("The URL is malformed: correct it", "url") from None
    if parts.scheme not in ("http", "https") or "@" in parts.netloc or not is_host(parts.hostname or ""):
        raise Refused("The URL names no plain host: write http(s)://host/path without a user", "url")
    check_target(parts.hostname or "", port, policy)
    return parts


def check_target(host: str, port: int | None, policy: NetworkPolicy) -> None:
    """Raise Refused for a port or a domain that the policy forbids."""
    if port not in policy.ports:
        allowed = ", ".join(str(number) for number in policy.ports)
        raise Refused(
            f"{host} is asked for on a port that is not allowed: use one of {allowed}, or have it added to "
            f"{policy.settings_prefix}_PORTS",
            "port",
        )
    if not is_allowed_host(host, policy):
        raise Refused(
            f"{host} is not among the allowed domains: use one of them, or have it added to "
            f"{policy.settings_prefix}_ALLOW_DOMAINS",
            "domain",
        )


def check_address(host: str, text: str, policy: NetworkPolicy) -> None:
    """Raise Refused for an address, as the DNS gives it for `host`, that the policy forbids."""
    if not is_allowed_address(ip_address(text.partition("%")[0]), policy):
        raise Refused(
            f"{host} is at no public address: use a public host, or have its network added to "
            f"{policy.settings_prefix}_ALLOW_NETWORKS",
            "network",
        )


def host_of(url: str) -> str | None:
    """The host, the only part of a URL that is safe to repeat in a message. None if it is not valid."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return None
    return host if is_host(host) else None
