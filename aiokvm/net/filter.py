"""Which frames may pass a backend: rules, and questions to the program about flows.

The first rule that matches a frame decides; a frame that none matches passes. "egress" is what comes from
the guest, "ingress" what goes to it. Rules are held against frames in C; only a `Hook` runs Python, once for
each flow.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from aiokvm._core import lib
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError

Direction: TypeAlias = Literal["egress", "ingress"]
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Ports: TypeAlias = int | tuple[int, int] | str

DIRECTIONS = {
    None: lib.AIOKVM_NET_EGRESS | lib.AIOKVM_NET_INGRESS,
    "egress": lib.AIOKVM_NET_EGRESS,
    "ingress": lib.AIOKVM_NET_INGRESS,
}
# IANA's EtherTypes and protocol numbers.
ETHERTYPES = {"arp": 0x0806, "ipv4": 0x0800, "ipv6": 0x86DD}
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "dccp": 33, "icmp6": 58, "sctp": 132, "udplite": 136}
WITH_PORTS = {"tcp", "udp", "dccp", "sctp", "udplite"}

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rule:
    """What `allow` and `deny` make: all conditions have to hold, None is no condition."""

    allows: bool
    direction: Direction | None = None
    src: Network | None = None
    dst: Network | None = None
    src_mac: bytes | None = None
    dst_mac: bytes | None = None
    ethertype: int | None = None
    protocol: int | None = None
    src_ports: tuple[int, int] | None = None
    dst_ports: tuple[int, int] | None = None
    icmp_types: tuple[int, int] | None = None
    replies: bool = True


@checked
def allow(
    *,
    direction: Direction | None = None,
    src: str | Network | None = None,
    dst: str | Network | None = None,
    src_mac: str | None = None,
    dst_mac: str | None = None,
    protocol: str | int | None = None,
    src_port: Ports | None = None,
    dst_port: Ports | None = None,
    icmp_type: Ports | None = None,
    replies: bool = True,
) -> Rule:
    """A rule that lets frames pass, and what replies to them, for as long as the flow is used.

    ``src`` and ``dst`` are addresses or networks of IPv4 or IPv6, ``src_mac`` and ``dst_mac`` like
    "52:54:00:00:00:01". ``protocol`` is "tcp", "udp", "icmp", "icmp6", "sctp", "dccp", "udplite", "arp",
    "ipv4", "ipv6" or the number of a protocol in IP. Ports and ICMP types are a number, (first, last) or
    "first-last"; a rule with ports and no protocol is one for all protocols that have ports.

    Replies are what comes back with addresses and ports exchanged, an echo's reply, and ICMP errors about
    the flow; with ``replies=False`` rules alone decide about them. Raises ConfigError for what cannot be.
    """
    return _rule(
        True, direction, src, dst, src_mac, dst_mac, protocol, src_port, dst_port, icmp_type, replies
    )


@checked
def deny(
    *,
    direction: Direction | None = None,
    src: str | Network | None = None,
    dst: str | Network | None = None,
    src_mac: str | None = None,
    dst_mac: str | None = None,
    protocol: str | int | None = None,
    src_port: Ports | None = None,
    dst_port: Ports | None = None,
    icmp_type: Ports | None = None,
) -> Rule:
    """A rule that lets frames not pass; its conditions are those of `allow`.

    Without any it is the end of an allow-list. What cannot be known of a frame, since its headers are damaged
    or do not end within its first 256 bytes, counts as what is denied.
    """
    return _rule(False, direction, src, dst, src_mac, dst_mac, protocol, src_port, dst_port, icmp_type, True)


def essentials() -> tuple[Rule, ...]:
    """What a guest needs to have an address at all: ARP, DHCP, DHCPv6, neighbour and multicast discovery.

    To be put before the rules of an allow-list: ``filters=[*essentials(), allow(dst="10.0.0.0/8"), deny()]``.
    """
    return (
        allow(protocol="arp"),
        allow(direction="egress", protocol="udp", src_port=68, dst_port=67),
        allow(direction="ingress", protocol="udp", src_port=67, dst_port=68),
        allow(direction="egress", protocol="udp", src_port=546, dst_port=547),
        allow(direction="ingress", protocol="udp", src_port=547, dst_port=546),
        # RFC 4861 without redirects; RFC 2710 and 3810.
        allow(protocol="icmp6", icmp_type=(133, 136), replies=False),
        allow(protocol="icmp6", icmp_type=(130, 132), replies=False),
        allow(protocol="icmp6", icmp_type=143, replies=False),
    )


def _rule(
    allows: bool,
    direction: Direction | None,
    src: str | Network | None,
    dst: str | Network | None,
    src_mac: str | None,
    dst_mac: str | None,
    protocol: str | int | None,
    src_port: Ports | None,
    dst_port: Ports | None,
    icmp_type: Ports | None,
    replies: bool,
) -> Rule:
    if direction not in DIRECTIONS:
        raise ConfigError(f"direction {direction!r} is neither 'egress' nor 'ingress'; None is both")
    source, destination = _network("src", src), _network("dst", dst)
    if source and destination and source.version != destination.version:
        raise ConfigError(f"src {source} and dst {destination} are of different versions of IP")
    ethertype, number = _protocol(protocol)
    version = next((network.version for network in (source, destination) if network), None)
    if (ethertype, version) not in {
        *((None, None), (None, 4), (None, 6), (0x0800, None), (0x0800, 4), (0x86DD, None), (0x86DD, 6)),
        (0x0806, None),
    }:
        raise ConfigError(f"{protocol} has no addresses of IPv{version}")
    ports = _range("src_port", src_port, 65535), _range("dst_port", dst_port, 65535)
    with_ports = {PROTOCOLS[name] for name in WITH_PORTS}
    if ports != (None, None) and (ethertype == 0x0806 or (number is not None and number not in with_ports)):
        raise ConfigError(f"{protocol} has no ports; {', '.join(sorted(WITH_PORTS))} have")
    icmp_types = _range("icmp_type", icmp_type, 255)
    if icmp_types and number not in (PROTOCOLS["icmp"], PROTOCOLS["icmp6"]):
        raise ConfigError("icmp_type needs protocol='icmp' or protocol='icmp6'")
    macs = _mac("src_mac", src_mac), _mac("dst_mac", dst_mac)
    return Rule(allows, direction, source, destination, *macs, ethertype, number, *ports, icmp_types, replies)


def _network(name: str, value: str | Network | None) -> Network | None:
    if value is None:
        return None
    try:
        return ipaddress.ip_network(value)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; it is an address or a network like 10.0.0.0/8") from None


def _mac(name: str, value: str | None) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _MAC.fullmatch(value):
        raise ConfigError(f"{name} {value!r} is no MAC address like 52:54:00:00:00:01")
    return bytes.fromhex(value.replace(":", ""))


def _protocol(value: str | int | None) -> tuple[int | None, int | None]:
    """The EtherType and the number in IP."""
    if value is None:
        return None, None
    if isinstance(value, str):
        if value in ETHERTYPES:
            return ETHERTYPES[value], None
        if value in PROTOCOLS:
            return None, PROTOCOLS[value]
    elif 0 <= value <= 255:
        return None, value
    known = ", ".join(sorted({*ETHERTYPES, *PROTOCOLS}))
    raise ConfigError(f"protocol {value!r} is none of {known}, and no number from 0 to 255")


def _range(name: str, value: Ports | None, most: int) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):
        match = _RANGE.fullmatch(value)
        if not match:
            raise ConfigError(f"{name} {value!r} is no number and no range like '80-90'")
        value = int(match[1]), int(match[2] or match[1])
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(number, int) and 0 <= number <= most for number in pair):
        raise ConfigError(f"{name} {value!r} is no number from 0 to {most}, and no (first, last)")
    if pair[0] > pair[1]:
        raise ConfigError(f"{name} {value!r} ends before it begins")
    return pair[0], pair[1]
