"""Ports of the host that lead to ports of a guest: how they are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from aiokvm.errors import ConfigError
from aiokvm.net.address import check_path

_HOST = re.compile(
    r"(?:(?P<protocol>tcp|udp):)?(?:(?P<address>[0-9.]+|\[[0-9a-fA-F:.]+\]):)?(?P<port>0*[0-9]{1,5})"
)
_GUEST = re.compile(r"(?:(?P<address>[0-9.]+|\[[0-9a-fA-F:.]+\]):)?(?P<port>0*[0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Forward:
    """What comes to ``host`` goes to ``guest``.

    ``protocol`` is "tcp" or "udp". ``host`` is an address of the host, or the path of a Unix socket, which
    has no port: ``port`` is 0. ``guest`` is an address of the guest's network; empty for the one that
    DHCP gives out first, for IPv6 the one that was heard first.
    """

    protocol: str
    host: str
    port: int
    guest: str
    guest_port: int

    def __str__(self) -> str:
        return f"{self.key} to port {self.guest_port} of {self.guest or 'the guest'}"

    @property
    def key(self) -> str:
        """How `User` knows it: ``tcp:127.0.0.1:8080``, or the path."""
        if self.is_path:
            return self.host
        address = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}:{address}:{self.port}"

    @property
    def is_path(self) -> bool:
        """Whether the host's side is a Unix socket."""
        return self.host.startswith("/")


def _address(text: str | None, what: object) -> str:
    """Without brackets, in its shortest form."""
    try:
        if text is None:
            return ""
        return str(IPv6Address(text[1:-1])) if text.startswith("[") else str(IPv4Address(text))
    except AddressValueError as error:
        raise ConfigError(f"{what!r} has no address that there is: {error}") from None


def parse_host(host: int | str) -> tuple[str, str, int]:
    """Protocol, address or path, and port of ``[tcp:|udp:][ADDRESS:]PORT``, or of an absolute path.

    Addresses are IPv4, or IPv6 in brackets; without one it is 127.0.0.1. Raises ConfigError.
    """
    text = str(host)
    if text.startswith("/"):
        return "tcp", check_path(text), 0
    match = _HOST.fullmatch(text)
    if isinstance(host, bool) or not match:
        raise ConfigError(
            f"{host!r} is no port of the host: [tcp:|udp:][ADDRESS:]PORT, or an absolute path, is meant, "
            "like 8080, 'udp:53', '0.0.0.0:80', '[::1]:80', '/run/guest.sock'"
        )
    port = int(match["port"])
    if port > 0xFFFF:
        raise ConfigError(f"{host!r} has a port above 65535")
    return match["protocol"] or "tcp", _address(match["address"], host) or "127.0.0.1", port


def parse_forward(host: int | str, guest: int | str) -> Forward:
    """A forward as `User` takes it: ``guest`` is ``[ADDRESS:]PORT``. Raises ConfigError."""
    protocol, address, port = parse_host(host)
    match = _GUEST.fullmatch(str(guest))
    if isinstance(guest, bool) or not match:
        raise ConfigError(
            f"{guest!r} is no port of the guest: [ADDRESS:]PORT is meant, like 80, '10.0.2.20:80'"
        )
    guest_port = int(match["port"])
    if not 0 < guest_port <= 0xFFFF:
        raise ConfigError(f"{guest!r} has no port of 1 to 65535")
    guest_address = _address(match["address"], guest)
    if guest_address and (":" in guest_address) != (":" in address):
        raise ConfigError(f"{host!r} and {guest!r} are not of one version of IP: what is forwarded stays so")
    return Forward(protocol, address, port, guest_address, guest_port)
