"""A network adapter as it is configured: its backend, and what its guest sees."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from aiokvm.arguments import checked_init
from aiokvm.errors import ConfigError
from aiokvm.net.backend import NetBackend
from aiokvm.net.plane import check_dataplane

MAX_QUEUES = 16
MIN_MTU, MAX_MTU = 68, 65535
_LOCAL, _MULTICAST = 2, 1


@checked_init
@dataclass(frozen=True, slots=True)
class Nic:
    """A backend and how a machine has it as a network adapter; what `VM.create` makes of a bare one, too.

    ``mac`` is a locally administered unicast address, as "52:54:00:12:34:56"; unless given it is made up of
    46 random bits. There are ``queues`` (1 to 16) pairs of queues with ``queue_size`` (64 to 1024) entries
    each; a guest uses as many as it has processors. ``mtu`` in bytes (68 to 65535) is told to the guest, and
    defaults to the backend's; a guest that is told nothing takes 1500. ``up`` says whether there is a link
    at first. ``offload=False`` has the guest compute checksums and cut segments by itself. ``dataplane`` is
    "loop", where the loop moves the frames, "thread", where a thread of the adapter's own does, or "auto": a
    thread, but the loop where the program takes part in it, by a `Port` or a `Hook`, or no thread is to be
    had. Frames of one in a switch are moved where the switch is. ``speed_mbps`` is what the guest shows, and
    limits nothing.

    Raises ConfigError for what cannot be.
    """

    backend: NetBackend
    mac: str | None = None
    queues: int = 1
    queue_size: int = 256
    mtu: int | None = None
    up: bool = True
    offload: bool = True
    dataplane: Literal["auto", "loop", "thread"] = "auto"
    speed_mbps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.backend, NetBackend):
            raise ConfigError(f"{self.backend!r} is no network: give a net.User or another NetBackend")
        mac = random_mac() if self.mac is None else self.mac
        object.__setattr__(self, "mac", check_mac(mac))
        check_dataplane(self.dataplane)
        for name, value, low, high in (
            ("queues", self.queues, 1, MAX_QUEUES),
            ("mtu", self.mtu, MIN_MTU, MAX_MTU),
            ("speed_mbps", self.speed_mbps, 0, 0x7FFF_FFFF),
        ):
            if value is not None and (not isinstance(value, int) or not low <= value <= high):
                raise ConfigError(f"{name} is {value!r}: it is {low} to {high}")
        size = self.queue_size
        if not isinstance(size, int) or size & (size - 1) or not 64 <= size <= 1024:
            raise ConfigError(f"a queue size of {size!r}: it is a power of two, 64 to 1024")

    @property
    def mac_bytes(self) -> bytes:
        """The address, 6 bytes."""
        assert self.mac is not None
        return bytes.fromhex(self.mac.replace(":", ""))


def random_mac() -> str:
    """A locally administered unicast address that nobody has."""
    data = bytearray(os.urandom(6))
    data[0] = data[0] & ~_MULTICAST | _LOCAL
    return data.hex(":")


def check_mac(mac: str) -> str:
    """The address in lower case, with colons. Raises ConfigError unless it is one for an adapter."""
    text = str(mac).lower().replace("-", ":")
    if not re.fullmatch("[0-9a-f]{2}(:[0-9a-f]{2}){5}", text):
        raise ConfigError(f"{mac!r} is no MAC address: write it as 52:54:00:12:34:56")
    first = int(text[:2], 16)
    if first & _MULTICAST:
        raise ConfigError(f"{mac} is a multicast address: an adapter has one whose first byte is even")
    if not first & _LOCAL:
        raise ConfigError(
            f"{mac} belongs to a maker of hardware: use a locally administered address, such as one that "
            "begins with 52:54:00"
        )
    return text
