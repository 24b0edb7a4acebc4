"""Which addresses are the public internet's, and which an operator allows beside them."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from tasks.addresses import is_public
from worker.net.policy import NetworkPolicy, is_allowed_address


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8", "168.63.129.17"],
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "0.1.2.3",
        "10.9.8.7",
        "100.64.0.1",
        "100.127.255.255",
        "127.9.9.9",
        "169.254.0.1",
        "172.31.255.255",
        "192.0.0.8",
        "192.0.0.170",
        "192.0.2.9",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.168.255.1",
        "192.175.48.1",
        "198.19.255.255",
        "198.51.100.9",
        "203.0.113.9",
        "168.63.129.16",
        "224.0.0.251",
        "233.252.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::8.8.8.8",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:0:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:10::1",
        "2001:1ff::1",
        "2001:db8::1",
        "2002:808:808::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "feff::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_other_addresses_are_not(address: str) -> None:
    assert not is_public(ip_address(address))


def test_an_operator_can_allow_a_network() -> None:
    inner = NetworkPolicy(allow_networks=(ip_network("10.1.0.0/16"), ip_network("fd00::/8")))
    assert is_allowed_address(ip_address("10.1.2.3"), inner)
    assert is_allowed_address(ip_address("::ffff:10.1.2.3"), inner)
    assert is_allowed_address(ip_address("fd00::1"), inner)
    assert not is_allowed_address(ip_address("10.2.0.1"), inner)
    assert not is_allowed_address(ip_address("127.0.0.1"), inner)
