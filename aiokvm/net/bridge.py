"""Bridges and addresses of the host, by pyroute2: the extra ``netlink``."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from anyio import to_thread

from aiokvm.errors import AiokvmError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


async def configure(name: str, *, bridge: str | None = None, addresses: Sequence[str] = ()) -> None:
    """Brings an interface up, makes it a port of ``bridge``, gives it ``addresses``, as in "10.0.0.1/24".

    An address that it has is no error. Raises ConfigError if pyroute2 is not installed, an address is none or
    an interface is not there, AiokvmError if the kernel refuses.
    """
    for address in addresses:
        _parse(address)
    await to_thread.run_sync(_configure, name, bridge, tuple(addresses))


def _parse(address: str) -> tuple[str, int]:
    try:
        parsed = ipaddress.ip_interface(address)
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address of an interface: one is 10.0.0.1/24") from error
    return str(parsed.ip), parsed.network.prefixlen


def _configure(name: str, bridge: str | None, addresses: Sequence[str]) -> None:
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError as error:
        raise ConfigError(
            "bridges and addresses need pyroute2: install aiokvm[netlink], or set them with `ip`"
        ) from error
    with IPRoute() as route:

        def index_of(interface: str) -> int:
            found = route.link_lookup(ifname=interface)
            if not found:
                raise ConfigError(f"there is no interface {interface!r}")
            return int(found[0])

        index = index_of(name)
        try:
            if bridge is not None:
                route.link("set", index=index, master=index_of(bridge))
            for address in addresses:
                ip, prefix = _parse(address)
                route.addr("replace", index=index, address=ip, prefixlen=prefix)
            route.link("set", index=index, state="up")
        except NetlinkError as error:
            raise AiokvmError(f"{name} cannot be configured: {error}") from error
