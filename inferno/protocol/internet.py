"""Which IP addresses belong to the public internet.

Python's `ipaddress.is_global` changes with its patch level, so the list is our own. It follows
IANA's registries of special-purpose addresses (https://www.iana.org/assignments/
iana-ipv4-special-registry and iana-ipv6-special-registry, as of 2025). It is stricter:
a block counts as not public even where some of its addresses are globally reachable, because no
server of a client has an address there.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

#: IPv4 addresses that are not public.
SPECIAL_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared by customers of a provider; metadata of Alibaba's cloud
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # Azure's services for its virtual machines
            "169.254.0.0/16",  # link-local; metadata of most clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments; metadata of Oracle's cloud
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # automatic multicast tunneling
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)

#: The only IPv6 block of which public addresses are assigned.
GLOBAL_V6 = IPv6Network("2000::/3")

#: Addresses of `GLOBAL_V6` that are not public.
SPECIAL_V6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID and others
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which contains any IPv4 address
            "2620:4f:8000::/48",  # AS112
            "3ffe::/16",  # the former 6bone
            "3fff::/20",  # documentation
        ),
    )
)

#: Addresses that end in the IPv4 address which they lead to: mapped ones, and NAT64 (RFC 6052).
TRANSLATED = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))

#: Bits 64 to 95 of an address that ISATAP (RFC 5214) sends to the IPv4 address at its end.
ISATAP = (0x0000_5EFE, 0x0200_5EFE)


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet.

    An IPv6 address that leads to an IPv4 address counts as that address. One with a zone does not
    belong to the public internet.

    Raises:
      ValueError: it is not an IP address.
    """
    parsed = ip_address(address)
    if isinstance(parsed, IPv4Address):
        return _is_public_v4(parsed)
    if parsed.scope_id is not None:
        return False
    if any(parsed in network for network in TRANSLATED):
        return _is_public_v4(_last(parsed))
    if parsed not in GLOBAL_V6 or any(parsed in network for network in SPECIAL_V6):
        return False
    return int(parsed) >> 32 & 0xFFFFFFFF not in ISATAP or _is_public_v4(_last(parsed))


def _is_public_v4(address: IPv4Address) -> bool:
    return not any(address in network for network in SPECIAL_V4)


def _last(address: IPv6Address) -> IPv4Address:
    """Return the IPv4 address at the end of an IPv6 address."""
    return IPv4Address(int(address) & 0xFFFFFFFF)
