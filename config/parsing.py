"""Parses values of settings: comma-separated lists, networks, secrets, certificates."""

from __future__ import annotations

import base64
import re
import ssl
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode


def split(value: Any) -> Any:
    """The items of comma-separated text; any other value unchanged."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _networks(value: Any) -> Any:
    return [ip_network(item) if isinstance(item, str) else item for item in split(value)]


def is_secret(text: str) -> bool:
    """Whether a text is a secret of Standard Webhooks: `whsec_` and the base64 of 24 to 64 bytes."""
    try:
        return text.startswith("whsec_") and 24 <= len(base64.b64decode(text[6:], validate=True)) <= 64
    except ValueError:
        return False


def holding_certificates(file: Path) -> Path:
    """Return the file itself. Raises ValueError if it has no readable certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
    except OSError:
        raise ValueError("a file of certificates in PEM form, readable by this user") from None
    return file


def listen_address(text: str) -> str:
    """Return `host:port`, with 127.0.0.1 for a port alone. Raises ValueError for anything else."""
    host, _, port = text.rpartition(":")
    is_valid = port.isascii() and port.isdigit() and 0 < int(port) < 65_536 and "/" not in host
    if text and not is_valid:
        raise ValueError("an address as 127.0.0.1:9101, or a port alone for this machine's own programs")
    return f"{host or '127.0.0.1'}:{port}" if text else ""


#: Comma-separated in the environment.
CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split)]
Ports = Annotated[tuple[Annotated[int, Field(ge=1, le=65_535)], ...], NoDecode, BeforeValidator(split)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_networks)]
Seconds = Annotated[
    tuple[Annotated[float, Field(ge=0, le=604_800)], ...], NoDecode, BeforeValidator(split), Field(min_length=1)
]


def _ascending(value: tuple[int, ...]) -> tuple[int, ...]:
    if list(value) != sorted(set(value)) or value[0] != 0:
        raise ValueError("ascending priorities that begin with 0, as 0,3,6,9")
    return value


Steps = Annotated[
    tuple[Annotated[int, Field(ge=0, le=255)], ...],
    NoDecode,
    BeforeValidator(split),
    Field(min_length=1, max_length=32),
    AfterValidator(_ascending),
]


def naming_a_function(value: str) -> str:
    """A name as `module:function`, or nothing."""
    if value and not re.fullmatch(r"[\w.]+:\w+", value):
        raise ValueError("a function as module:function, such as shop.sentry:set_up")
    return value
