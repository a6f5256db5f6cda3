"""The network device: virtio 1.2, section 5.1. Its features, configuration space and control queue.

Frames are moved by others: `NetData` says what that takes. UFO (GUEST_UFO, HOST_UFO) is not offered: kernels
have not known how to segment UDP that way since 4.14; USO, which took its place, is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aiokvm.errors import ConfigError, VirtqueueError
from aiokvm.virtio.constants import VIRTIO_ID_NET
from aiokvm.virtio.device import VirtioDevice
from aiokvm.virtio.net_control import (
    GUEST_OFFLOADS,
    MAX_COMMAND_BYTES,
    VIRTIO_NET_CTRL_MAC_BYTES,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_NET_F_STATUS,
    NetControl,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from aiokvm.virtio.device import VirtioHost
    from aiokvm.virtio.net_control import ReceiveFilter
    from aiokvm.virtio.queue import Chain, Virtqueue

VIRTIO_NET_S_LINK_UP = 1
VIRTIO_NET_S_ANNOUNCE = 2

# struct virtio_net_config (5.1.4): mac, status, max_virtqueue_pairs, mtu, speed, duplex.
_CONFIG = struct.Struct("<6sHHHIB")
_MAC = 0
_STATUS = 6
_SPEED_UNKNOWN = 0xFFFF_FFFF
_DUPLEX_FULL = 1

MAX_PAIRS = 16
CONTROL_QUEUE_SIZE = 64
CONTROL_BATCH = 8
"""Commands done before others on the loop have their turn: each may be a table of 8,192 addresses."""
MIN_MTU, MAX_MTU = 68, 65535
"""What a driver may be told (5.1.4.1)."""
MAX_SPEED_MBPS = 0x7FFF_FFFF

OFFLOADS = (
    VIRTIO_NET_F_CSUM
    | VIRTIO_NET_F_HOST_TSO4
    | VIRTIO_NET_F_HOST_TSO6
    | VIRTIO_NET_F_HOST_ECN
    | VIRTIO_NET_F_HOST_USO
    | VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | GUEST_OFFLOADS
)
_ANY_GUEST_TSO = VIRTIO_NET_F_GUEST_TSO4 | VIRTIO_NET_F_GUEST_TSO6
_ANY_HOST_TSO = VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6
# A feature, and of what it needs one at least (5.1.3.1).
_NEEDS = {
    VIRTIO_NET_F_GUEST_TSO4: VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO6: VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN: _ANY_GUEST_TSO,
    VIRTIO_NET_F_GUEST_USO4: VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_USO6: VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4: VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO6: VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_ECN: _ANY_HOST_TSO,
    VIRTIO_NET_F_HOST_USO: VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_RX: VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_VLAN: VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE: VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MQ: VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_MAC_ADDR: VIRTIO_NET_F_CTRL_VQ,
}


@dataclass(frozen=True, slots=True)
class NetLayout:
    """What the driver is told of an adapter.

    ``mac`` has 6 bytes. There are ``pairs`` of queues of ``queue_size`` entries. ``mtu`` is in bytes, 68 to
    65535, None: it is not told. ``speed_mbps`` is in megabits a second, None: it is not told. ``offload``
    offers checksum and segmentation offload. Raises ConfigError for what cannot be.
    """

    mac: bytes
    pairs: int = 1
    queue_size: int = 256
    mtu: int | None = None
    up: bool = True
    offload: bool = True
    speed_mbps: int | None = None

    def __post_init__(self) -> None:
        if len(self.mac) != VIRTIO_NET_CTRL_MAC_BYTES or self.mac[0] & 1:
            raise ConfigError(f"{self.mac.hex(':')} is not the address of an adapter")
        if not 1 <= self.pairs <= MAX_PAIRS:
            raise ConfigError(f"{self.pairs} queues: a network adapter has 1 to {MAX_PAIRS}")
        if self.queue_size & (self.queue_size - 1) or not 64 <= self.queue_size <= 1024:
            raise ConfigError(f"a queue size of {self.queue_size}: it is a power of two, 64 to 1024")
        if self.mtu is not None and not MIN_MTU <= self.mtu <= MAX_MTU:
            raise ConfigError(f"an MTU of {self.mtu}: it is {MIN_MTU} to {MAX_MTU}")
        if self.speed_mbps is not None and not 0 <= self.speed_mbps <= MAX_SPEED_MBPS:
            raise ConfigError(f"a speed of {self.speed_mbps} Mbit/s: it is 0 to {MAX_SPEED_MBPS}")


class NetData(Protocol):
    """Who moves the frames of an adapter; all of it belongs to the machine's loop."""

    def activate(
        self,
        host: VirtioHost,
        features: int,
        queues: Sequence[Virtqueue],
        receive: ReceiveFilter,
        mtu: int | None,
    ) -> None:
        """Serve these queues, receiveq1, transmitq1 and so on, until `reset`; one pair until `set_pairs`.

        A driver that has VIRTIO_NET_F_MTU gets no frame that is longer than ``mtu``.
        """

    def set_receive_filter(self, receive: ReceiveFilter) -> None:
        """The driver wants these frames from now on."""

    def set_guest_offloads(self, features: int) -> None:
        """Of the offloads of what is received, which the driver takes from now on: feature bits."""

    def set_pairs(self, pairs: int) -> None:
        """So many pairs are in use."""

    def reset(self) -> Awaitable[None] | None:
        """As `VirtioDevice.reset`."""

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        """As `VirtioDevice.stop_queue`."""

    def close(self) -> Awaitable[None] | None:
        """As `VirtioDevice.close`."""


class VirtioNet(VirtioDevice):
    """A network adapter as its driver sees it; ``data`` moves its frames."""

    device_id = VIRTIO_ID_NET

    def __init__(self, layout: NetLayout, data: NetData) -> None:
        self.layout = layout
        self.data = data
        self.queue_size_max = (layout.queue_size,) * (2 * layout.pairs) + (CONTROL_QUEUE_SIZE,)
        features = (
            VIRTIO_NET_F_MAC
            | VIRTIO_NET_F_MRG_RXBUF
            | VIRTIO_NET_F_STATUS
            | VIRTIO_NET_F_CTRL_VQ
            | VIRTIO_NET_F_CTRL_RX
            | VIRTIO_NET_F_CTRL_VLAN
            | VIRTIO_NET_F_CTRL_MAC_ADDR
            | VIRTIO_NET_F_GUEST_ANNOUNCE
        )
        if layout.offload:
            features |= OFFLOADS
        if layout.pairs > 1:
            features |= VIRTIO_NET_F_MQ
        if layout.mtu is not None:
            features |= VIRTIO_NET_F_MTU
        if layout.speed_mbps is not None:
            features |= VIRTIO_NET_F_SPEED_DUPLEX
        self.device_features = features
        self._status = VIRTIO_NET_S_LINK_UP if layout.up else 0
        self._control = NetControl(layout.mac, layout.pairs)
        self.config = bytearray(
            _CONFIG.pack(
                layout.mac,
                self._status,
                layout.pairs,
                layout.mtu or 0,
                _SPEED_UNKNOWN if layout.speed_mbps is None else layout.speed_mbps,
                _DUPLEX_FULL,
            )
        )

    @property
    def is_up(self) -> bool:
        """Whether the driver is told that there is a link."""
        return bool(self._status & VIRTIO_NET_S_LINK_UP)

    def set_link(self, up: bool) -> None:
        """The link is up or down from now on, and the driver is told (5.1.4.2)."""
        if up != self.is_up:
            self._set_status(self._status ^ VIRTIO_NET_S_LINK_UP)

    def announce(self) -> None:
        """Ask the driver to tell the network where it is, if it can (5.1.6.5.4)."""
        if self.features & VIRTIO_NET_F_GUEST_ANNOUNCE:
            self._set_status(self._status | VIRTIO_NET_S_ANNOUNCE)

    def _set_status(self, status: int, *, tell: bool = True) -> None:
        self._status = status
        struct.pack_into("<H", self.config, _STATUS, status)
        if tell and self._host is not None:
            self.host.config_changed()

    def accept_features(self, features: int) -> bool:
        return all(features & needed for feature, needed in _NEEDS.items() if features & feature)

    def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:
        self._control.start(features)
        data_queues = queues[: self._control_index]
        self.data.activate(self.host, features, data_queues, self._control.receive, self.layout.mtu)

    def notified(self, queue: int) -> None:
        # The data's are watched by who moves it.
        if queue == self._control_index and self.features & VIRTIO_NET_F_CTRL_VQ:
            self._serve_control(queue)

    def reset(self) -> Awaitable[None] | None:
        self.config[_MAC : _MAC + VIRTIO_NET_CTRL_MAC_BYTES] = self.layout.mac
        self._set_status(self._status & ~VIRTIO_NET_S_ANNOUNCE, tell=False)
        return self.data.reset()

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        return None if queue >= self._control_index else self.data.stop_queue(queue)

    def close(self) -> Awaitable[None] | None:
        return self.data.close()

    @property
    def _control_index(self) -> int:
        """Behind the pairs that there may be (5.1.2); without MQ there is one."""
        return 2 * self.layout.pairs if self.features & VIRTIO_NET_F_MQ else 2

    def _serve_control(self, index: int) -> None:
        queue = self.queues[index]
        for _ in range(CONTROL_BATCH):
            chain = queue.pop()
            if chain is None:
                break
            self._command(chain)
        else:
            self.host.again(index)
        if queue.publish():
            self.host.interrupt(index)

    def _command(self, chain: Chain) -> None:
        if not chain.writable_bytes:
            chain.drop()
            raise VirtqueueError("a control command has no byte for its acknowledgement")
        command = chain.read(MAX_COMMAND_BYTES + 1)
        # What it changes is so before the driver sees it acknowledged.
        ack = self._control.handle(command, self)
        chain.write(bytes([ack]))
        chain.push()

    # What a control command changes: `aiokvm.virtio.net_control.Changes`.

    def receive_changed(self, receive: ReceiveFilter) -> None:
        """Other frames are wanted."""
        self.data.set_receive_filter(receive)

    def mac_changed(self, mac: bytes) -> None:
        """The adapter has another address: "MUST update mac in config space" (5.1.6.5.2.1)."""
        self.config[_MAC : _MAC + VIRTIO_NET_CTRL_MAC_BYTES] = mac

    def announced(self) -> None:
        """The driver has seen that it is to announce itself."""
        self._set_status(self._status & ~VIRTIO_NET_S_ANNOUNCE, tell=False)

    def pairs_changed(self, pairs: int) -> None:
        """So many are in use."""
        self.data.set_pairs(pairs)

    def guest_offloads_changed(self, features: int) -> None:
        """These are on."""
        self.data.set_guest_offloads(features)
