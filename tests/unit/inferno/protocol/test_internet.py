"""Which IP addresses are public: the whole table, its edges, and IPv4 inside IPv6."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest

from inferno.protocol.internet import SPECIAL_V4, SPECIAL_V6, is_public

#: Blocks whose neighbours are special, too.
ADJACENT = {IPv4Network("224.0.0.0/4"), IPv4Network("240.0.0.0/4"), IPv4Network("0.0.0.0/8")}

#: Every way to write an IPv4 address inside an IPv6 address that a network may translate.
EMBEDDINGS = {
    "mapped": "::ffff:{}",
    "NAT64": "64:ff9b::{}",
    "ISATAP": "2606:4700::5efe:{}",
    "ISATAP, global": "2606:4700::200:5efe:{}",
}


@pytest.mark.parametrize("network", [*SPECIAL_V4, *SPECIAL_V6], ids=str)
def test_a_special_block_is_not_public_from_its_first_to_its_last_address(
    network: IPv4Network | IPv6Network,
) -> None:
    assert not is_public(str(network[0]))
    assert not is_public(str(network[-1]))
    assert not is_public(str(network[network.num_addresses // 2]))


@pytest.mark.parametrize("network", [n for n in SPECIAL_V4 if n not in ADJACENT], ids=str)
def test_the_neighbours_of_a_special_block_are_public(network: IPv4Network) -> None:
    assert is_public(str(network[0] - 1))
    assert is_public(str(network[-1] + 1))


@pytest.mark.parametrize("form", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("network", SPECIAL_V4, ids=str)
def test_a_special_address_inside_an_ipv6_address_is_not_public(
    network: IPv4Network, form: str
) -> None:
    assert not is_public(form.format(network[0]))
    assert not is_public(form.format(network[-1]))


@pytest.mark.parametrize("form", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_a_public_address_inside_an_ipv6_address_is_public(form: str) -> None:
    assert is_public(form.format(IPv4Address("93.184.216.34")))


@pytest.mark.parametrize(
    "address",
    [
        # Metadata of clouds.
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "::ffff:a9fe:a9fe",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::",
        "::169.254.169.254",
        "100.100.100.200",
        "192.0.0.192",
        "168.63.129.16",
        "fd00:ec2::254",
        "fd20:ce::254",
        # Forms that contain an IPv4 address, whichever it is.
        "::ffff:0:8.8.8.8",
        "::8.8.8.8",
        "64:ff9b:1::8.8.8.8",
        "2002:808:808::1",
        "2001:0:808:808::1",
        # Outside the block of public addresses.
        "::",
        "::1",
        "100::1",
        "100:0:0:1::1",
        "1fff:ffff::1",
        "4000::1",
        "5f00::1",
        "fc00::1",
        "fdff:ffff::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "feff:ffff::1",
        "ff02::1",
        "ff0e::1",
        # A zone makes an address local.
        "2606:4700:4700::1111%lo",
    ],
)
def test_an_address_that_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001::1", "2001:4860:4860::8888"],
)
def test_an_address_that_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("text", ["", "a.example", "1.2.3", "1.2.3.4.5", "010.0.0.1", "::1::"])
def test_what_is_no_address_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        is_public(text)
