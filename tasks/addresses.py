"""Which IP addresses are public. Pure."""

from __future__ import annotations

import contextlib
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: Networks that are not the public internet although Python 3.11 calls most of them global.
BAD_NETWORKS: tuple[Network, ...] = (
    ip_network("0.0.0.0/8"),  # "this host": Linux connects 0.0.0.0 to loopback
    ip_network("100.64.0.0/10"),  # carrier-grade NAT; clouds keep metadata and cluster networks there
    ip_network("192.0.0.0/24"),  # protocol assignments; a cloud's metadata service is in it
    ip_network("192.31.196.0/24"),  # AS112: answered by the nearest server
    ip_network("192.52.193.0/24"),  # AMT relays: tunnels
    ip_network("192.88.99.0/24"),  # 6to4 relays: tunnels
    ip_network("192.175.48.0/24"),  # AS112: answered by the nearest server
    ip_network("198.18.0.0/15"),  # benchmarks, used as internal addresses
    ip_network("168.63.129.16/32"),  # Azure's host agent, in a public range
    ip_network("::/96"),  # unspecified, loopback, and IPv4 written as IPv6 (compatible)
    ip_network("::ffff:0:0:0/96"),  # IPv4 written as IPv6 (translated, SIIT)
    ip_network("64:ff9b::/96"),  # NAT64: leads to any IPv4 address
    ip_network("64:ff9b:1::/48"),  # NAT64 of the local network
    ip_network("100::/64"),  # discarded
    ip_network("2001::/23"),  # Teredo and other tunnels and identifiers
    ip_network("2001:db8::/32"),  # documentation
    ip_network("2002::/16"),  # 6to4: leads to any IPv4 address
    ip_network("3fff::/20"),  # documentation
    ip_network("5f00::/16"),  # segment routing inside a provider
    ip_network("fec0::/10"),  # site-local: private before fc00::/7
)


def is_public(address: Address) -> bool:
    """Whether an address is public, in any notation."""
    address = unmapped(address)
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address in network for network in BAD_NETWORKS)


def unmapped(address: Address) -> Address:
    """An IPv4 address written as IPv6 (`::ffff:127.0.0.1`), as IPv4."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def literal(host: str) -> Address | None:
    """The IP address that a URL's host is, in any notation that resolvers accept; None for a name."""
    with contextlib.suppress(ValueError):
        return ip_address(host)
    with contextlib.suppress(OSError, ValueError):
        # 127.1, 0x7f.1 and 2130706433 are 127.0.0.1.
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    return None
