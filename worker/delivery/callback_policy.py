"""Checks where callbacks may go, by the operator's settings."""

from __future__ import annotations

import functools
import time
from urllib.parse import urlsplit

from config.settings import Settings
from tasks.addresses import Network, literal
from tasks.errors import InvalidRequest
from tasks.payloads import Callback
from worker.net.deadline import Deadline
from worker.net.guard import Guard, NoAddress
from worker.net.policy import NetworkPolicy, Refused, check_plain, check_url, is_allowed_address
from worker.runtime import gil

#: Bytes of a response that are read and ignored: a receiver that is cut off earlier may log an error.
RESPONSE_BYTES = 4_096
#: Seconds for one DNS lookup while a job waits for it.
LOOK_UP_S = 2.0
#: Hosts whose lookup is cached, for a minute.
CACHED_LOOKUPS = 1_024


def check(callback: Callback, settings: Settings, *, look_up: bool = True) -> None:
    """Raise InvalidRequest for a callback that the operator's policy forbids, as far as is known now.

    Each attempt is checked again when it connects: the name may have another address then.
    """
    if callback.key_id not in settings.callback_keys:
        raise InvalidRequest(
            "callback.key_id: this worker has no secret of that id. Use one of the operator's, or have it added to "
            "IDEFICS_CALLBACK_KEYS.",
            detail="callback",
        )
    try:
        _check_target(callback.url, settings, look_up)
    except Refused as error:
        raise InvalidRequest(f"callback.url: {error}.", detail="callback") from None


def check_scheme(url: str, settings: Settings) -> None:
    """Raise Refused for http, unless the operator allows it."""
    if not settings.callback_allow_http and urlsplit(url).scheme != "https":
        raise Refused("Callbacks go by https: write https://host/path or have IDEFICS_CALLBACK_ALLOW_HTTP set")


def callback_policy(settings: Settings) -> NetworkPolicy:
    """The network policy for a callback's connection."""
    return NetworkPolicy(
        allow_networks=settings.callback_allow_networks,
        allow_domains=settings.callback_allow_domains,
        ports=settings.callback_ports,
        max_bytes=RESPONSE_BYTES,
        read_s=settings.callback_timeout_s,
        total_s=settings.callback_timeout_s,
        ca_file=settings.ca_file,
        settings_prefix="IDEFICS_CALLBACK",
    )


def _check_target(url: str, settings: Settings, look_up: bool) -> None:
    policy = callback_policy(settings)
    check_scheme(url, settings)
    check_plain(url)
    host = check_url(url, policy).hostname or ""
    address = literal(host)
    if address is not None:
        is_allowed = is_allowed_address(address, policy)
    else:
        is_allowed = not look_up or _is_allowed_name(host, policy.allow_networks, int(time.monotonic()) // 60)
    if not is_allowed:
        raise Refused(
            f"{host} is not a public address: use one that is, or have its network added to "
            "IDEFICS_CALLBACK_ALLOW_NETWORKS"
        )


@functools.lru_cache(CACHED_LOOKUPS)
def _is_allowed_name(host: str, allow_networks: tuple[Network, ...], minute: int) -> bool:
    """False for a name that has a forbidden address now. One without an address is allowed: it may have one later.

    `minute` makes the cache expire.
    """
    guard = Guard(NetworkPolicy(allow_networks=allow_networks), Deadline(LOOK_UP_S))
    try:
        with gil.released():
            guard.resolve(host, 443)
    except (NoAddress, TimeoutError):
        return True
    except Refused:
        return False
    return True
