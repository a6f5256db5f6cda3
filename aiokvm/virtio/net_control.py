"""The control queue of a network device: virtio 1.2, section 5.1.6.5. Commands in, what they change out."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

# Feature bits (5.1.3), as masks.
VIRTIO_NET_F_CSUM = 1 << 0
VIRTIO_NET_F_GUEST_CSUM = 1 << 1
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS = 1 << 2
VIRTIO_NET_F_MTU = 1 << 3
VIRTIO_NET_F_MAC = 1 << 5
VIRTIO_NET_F_GUEST_TSO4 = 1 << 7
VIRTIO_NET_F_GUEST_TSO6 = 1 << 8
VIRTIO_NET_F_GUEST_ECN = 1 << 9
VIRTIO_NET_F_HOST_TSO4 = 1 << 11
VIRTIO_NET_F_HOST_TSO6 = 1 << 12
VIRTIO_NET_F_HOST_ECN = 1 << 13
VIRTIO_NET_F_MRG_RXBUF = 1 << 15
VIRTIO_NET_F_STATUS = 1 << 16
VIRTIO_NET_F_CTRL_VQ = 1 << 17
VIRTIO_NET_F_CTRL_RX = 1 << 18
VIRTIO_NET_F_CTRL_VLAN = 1 << 19
VIRTIO_NET_F_GUEST_ANNOUNCE = 1 << 21
VIRTIO_NET_F_MQ = 1 << 22
VIRTIO_NET_F_CTRL_MAC_ADDR = 1 << 23
VIRTIO_NET_F_GUEST_USO4 = 1 << 54
VIRTIO_NET_F_GUEST_USO6 = 1 << 55
VIRTIO_NET_F_HOST_USO = 1 << 56
VIRTIO_NET_F_SPEED_DUPLEX = 1 << 63

GUEST_OFFLOADS = (
    VIRTIO_NET_F_GUEST_CSUM
    | VIRTIO_NET_F_GUEST_TSO4
    | VIRTIO_NET_F_GUEST_TSO6
    | VIRTIO_NET_F_GUEST_ECN
    | VIRTIO_NET_F_GUEST_USO4
    | VIRTIO_NET_F_GUEST_USO6
)
"""What a driver may turn on and off, of what was negotiated (5.1.6.5.6)."""

VIRTIO_NET_OK = 0
VIRTIO_NET_ERR = 1

# Classes and their commands.
VIRTIO_NET_CTRL_RX = 0
VIRTIO_NET_CTRL_RX_PROMISC = 0
VIRTIO_NET_CTRL_RX_ALLMULTI = 1
VIRTIO_NET_CTRL_MAC = 1
VIRTIO_NET_CTRL_MAC_TABLE_SET = 0
VIRTIO_NET_CTRL_MAC_ADDR_SET = 1
VIRTIO_NET_CTRL_VLAN = 2
VIRTIO_NET_CTRL_VLAN_ADD = 0
VIRTIO_NET_CTRL_VLAN_DEL = 1
VIRTIO_NET_CTRL_ANNOUNCE = 3
VIRTIO_NET_CTRL_ANNOUNCE_ACK = 0
VIRTIO_NET_CTRL_MQ = 4
VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET = 0
VIRTIO_NET_CTRL_GUEST_OFFLOADS = 5
VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET = 0

VIRTIO_NET_CTRL_MAC_BYTES = 6
VLANS = 4096

EXACT_MACS = 63
"""Of the table, those that are told apart, beside the adapter's own; with more, all of their kind pass."""
MAX_MACS = 4096
"""Of a list in a table; one with more is an error."""
MAX_COMMAND_BYTES = 2 + 2 * (4 + MAX_MACS * VIRTIO_NET_CTRL_MAC_BYTES)


@dataclass(frozen=True, slots=True)
class ReceiveFilter:
    """Which frames the driver wants: those to one of ``macs``, and to all, in one of ``vlans`` or in none.

    ``macs`` and ``vlans`` are None if it takes whatever there is; ``alluni`` and ``allmulti`` add all
    unicast and all multicast addresses. ``promiscuous`` is everything.
    """

    macs: tuple[bytes, ...] | None = None
    vlans: frozenset[int] | None = None
    promiscuous: bool = False
    alluni: bool = False
    allmulti: bool = False


class Changes(Protocol):
    """What is told of a command before it is acknowledged."""

    def receive_changed(self, receive: ReceiveFilter) -> None: ...
    def mac_changed(self, mac: bytes) -> None: ...
    def announced(self) -> None: ...
    def pairs_changed(self, pairs: int) -> None: ...
    def guest_offloads_changed(self, features: int) -> None: ...


class NetControl:
    """What the driver has set by the control queue of an adapter of this address and so many queue pairs."""

    def __init__(self, mac: bytes, pairs: int) -> None:
        self._first_mac = mac
        self._pairs = pairs
        self.start(0)

    def start(self, features: int) -> None:
        """A driver with these negotiated features begins."""
        self.features = features
        self._mac = self._first_mac
        self._table: tuple[bytes, ...] = ()
        self._wants_allmulti = False
        # The MAC table is empty on reset, and nothing else was asked for (5.1.6.5.2.1).
        self.receive = ReceiveFilter(
            macs=(self._mac,) if features & VIRTIO_NET_F_CTRL_RX else None,
            vlans=frozenset() if features & VIRTIO_NET_F_CTRL_VLAN else None,
        )

    def handle(self, command: bytes, changes: Changes) -> int:
        """Do what a command says, class and command first: VIRTIO_NET_OK, or _ERR and nothing has changed."""
        commands: dict[tuple[int, ...], tuple[int, Callable[[bytes, Changes], bool]]] = {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC): (VIRTIO_NET_F_CTRL_RX, self._promisc),
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI): (VIRTIO_NET_F_CTRL_RX, self._allmulti),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET): (VIRTIO_NET_F_CTRL_RX, self._table_set),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET): (
                VIRTIO_NET_F_CTRL_MAC_ADDR,
                self._addr_set,
            ),
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD): (VIRTIO_NET_F_CTRL_VLAN, self._vlan_add),
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL): (VIRTIO_NET_F_CTRL_VLAN, self._vlan_del),
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK): (
                VIRTIO_NET_F_GUEST_ANNOUNCE,
                self._announce_ack,
            ),
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET): (VIRTIO_NET_F_MQ, self._pairs_set),
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET): (
                VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
                self._offloads_set,
            ),
        }
        feature, handler = commands.get(tuple(command[:2]), (0, None))
        if handler is None or not self.features & feature or len(command) > MAX_COMMAND_BYTES:
            return VIRTIO_NET_ERR
        return VIRTIO_NET_OK if handler(command[2:], changes) else VIRTIO_NET_ERR

    def _set_receive(self, receive: ReceiveFilter, changes: Changes) -> bool:
        self.receive = receive
        changes.receive_changed(receive)
        return True

    def _promisc(self, data: bytes, changes: Changes) -> bool:
        if len(data) != 1:
            return False
        return self._set_receive(replace(self.receive, promiscuous=bool(data[0])), changes)

    def _allmulti(self, data: bytes, changes: Changes) -> bool:
        if len(data) != 1:
            return False
        self._wants_allmulti = bool(data[0])
        return self._set_macs(changes)

    def _table_set(self, data: bytes, changes: Changes) -> bool:
        """Two lists, of unicast and of multicast addresses: a 32-bit count, and the addresses."""
        lists = []
        for _ in range(2):
            if len(data) < 4:
                return False
            [count] = struct.unpack_from("<I", data)
            end = 4 + count * VIRTIO_NET_CTRL_MAC_BYTES
            if count > MAX_MACS or end > len(data):
                return False
            lists.append(tuple(data[at : at + VIRTIO_NET_CTRL_MAC_BYTES] for at in range(4, end, 6)))
            data = data[end:]
        if data:
            return False
        self._table = lists[0] + lists[1]
        return self._set_macs(changes)

    def _set_macs(self, changes: Changes) -> bool:
        uni = tuple(mac for mac in self._table if not mac[0] & 1)
        multi = tuple(mac for mac in self._table if mac[0] & 1)
        alluni = len(uni) > EXACT_MACS
        exact = () if alluni else uni
        too_many = len(multi) > EXACT_MACS - len(exact)
        macs = (self._mac, *exact, *(() if too_many else multi))
        return self._set_receive(
            replace(self.receive, macs=macs, alluni=alluni, allmulti=self._wants_allmulti or too_many),
            changes,
        )

    def _addr_set(self, data: bytes, changes: Changes) -> bool:
        if len(data) != VIRTIO_NET_CTRL_MAC_BYTES:
            return False
        self._mac = data
        changes.mac_changed(data)
        return self._set_macs(changes) if self.receive.macs is not None else True

    def _vlan(self, data: bytes) -> int | None:
        if len(data) != 2:
            return None
        [vlan] = struct.unpack("<H", data)
        return vlan if vlan < VLANS else None

    def _vlan_add(self, data: bytes, changes: Changes) -> bool:
        vlan = self._vlan(data)
        if vlan is None or self.receive.vlans is None:
            return False
        return self._set_receive(replace(self.receive, vlans=self.receive.vlans | {vlan}), changes)

    def _vlan_del(self, data: bytes, changes: Changes) -> bool:
        vlan = self._vlan(data)
        if vlan is None or self.receive.vlans is None:
            return False
        return self._set_receive(replace(self.receive, vlans=self.receive.vlans - {vlan}), changes)

    def _announce_ack(self, data: bytes, changes: Changes) -> bool:
        if data:
            return False
        changes.announced()
        return True

    def _pairs_set(self, data: bytes, changes: Changes) -> bool:
        if len(data) != 2:
            return False
        [pairs] = struct.unpack("<H", data)
        if not 1 <= pairs <= self._pairs:
            return False
        changes.pairs_changed(pairs)
        return True

    def _offloads_set(self, data: bytes, changes: Changes) -> bool:
        if len(data) != 8:
            return False
        [offloads] = struct.unpack("<Q", data)
        if offloads & ~(self.features & GUEST_OFFLOADS):
            return False
        changes.guest_offloads_changed(offloads)
        return True
