"""virtio/net.py and net_control.py: the model of a network adapter, with no loop and no frames."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import ConfigError, VirtqueueError
from aiokvm.virtio.net import (
    CONTROL_BATCH,
    CONTROL_QUEUE_SIZE,
    OFFLOADS,
    NetLayout,
    VirtioNet,
)
from aiokvm.virtio.net_control import (
    EXACT_MACS,
    MAX_COMMAND_BYTES,
    VIRTIO_NET_CTRL_ANNOUNCE,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_ERR,
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
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_OK,
    ReceiveFilter,
)
from aiokvm.virtio.queue import Virtqueue
from tests.virtio.driver import FakeMemory, SplitDriver

if TYPE_CHECKING:
    from collections.abc import Sequence

MAC = bytes.fromhex("525400000001")
ALWAYS = (
    VIRTIO_NET_F_MAC
    | VIRTIO_NET_F_MRG_RXBUF
    | VIRTIO_NET_F_STATUS
    | VIRTIO_NET_F_CTRL_VQ
    | VIRTIO_NET_F_CTRL_RX
    | VIRTIO_NET_F_CTRL_VLAN
    | VIRTIO_NET_F_CTRL_MAC_ADDR
    | VIRTIO_NET_F_GUEST_ANNOUNCE
)


class Data:
    """Records what the model does with its data mover."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    @property
    def receive(self) -> ReceiveFilter:
        [*_, last] = [call[-1] for call in self.calls if isinstance(call[-1], ReceiveFilter)]
        assert isinstance(last, ReceiveFilter)
        return last

    def activate(
        self,
        host: object,
        features: int,
        queues: Sequence[Virtqueue],
        receive: ReceiveFilter,
        mtu: int | None,
    ) -> None:
        self.mtu = mtu
        self.calls.append(("activate", features, len(queues), receive))

    def set_receive_filter(self, receive: ReceiveFilter) -> None:
        self.calls.append(("receive", receive))

    def set_guest_offloads(self, features: int) -> None:
        self.calls.append(("offloads", features))

    def set_pairs(self, pairs: int) -> None:
        self.calls.append(("pairs", pairs))

    def reset(self) -> None:
        self.calls.append(("reset",))

    def stop_queue(self, queue: int) -> None:
        self.calls.append(("stop_queue", queue))

    def close(self) -> None:
        self.calls.append(("close",))


class Host:
    """Records what the model asks of its transport."""

    def __init__(self) -> None:
        self.changes = 0
        self.interrupts = 0
        self.agains: list[int] = []

    def config_changed(self) -> None:
        self.changes += 1

    def interrupt(self, queue: int) -> None:
        self.interrupts += 1

    def again(self, queue: int) -> None:
        self.agains.append(queue)


class Rig:
    """A device with a driver of its control queue."""

    def __init__(self, features: int | None = None, **layout: Any) -> None:
        self.data = Data()
        self.host = Host()
        self.device = VirtioNet(NetLayout(**{"mac": MAC, **layout}), self.data)
        self.device._host = self.host  # type: ignore[assignment]
        self.memory = FakeMemory((0, 4 << 20))
        self.queues = [Virtqueue(self.memory, size) for size in self.device.queue_size_max]
        self.start(self.device.device_features if features is None else features)

    def start(self, features: int) -> None:
        device = self.device
        assert device.accept_features(features)
        self.index = 2 * device.layout.pairs if features & VIRTIO_NET_F_MQ else 2
        self.driver = SplitDriver(self.memory, CONTROL_QUEUE_SIZE)
        self.driver.start(self.queues[self.index])
        device.features, device.queues = features, self.queues
        device.activate(features, self.queues)

    def control(self, class_: int, command: int, data: bytes = b"") -> int:
        self.driver.add([bytes([class_, command]), data], [1])
        self.device.notified(self.index)
        [used] = self.driver.used()
        assert used.written == 1
        return used.data[0]


def table(*lists: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(macs)) + b"".join(macs) for macs in lists)


def many(count: int, first: int) -> list[bytes]:
    return [bytes([first]) + i.to_bytes(5, "big") for i in range(count)]


def test_features_say_what_the_adapter_can() -> None:
    assert Rig().device.device_features == ALWAYS | OFFLOADS
    assert Rig(offload=False).device.device_features == ALWAYS
    assert Rig(pairs=4).device.device_features & VIRTIO_NET_F_MQ
    assert Rig(mtu=1400).device.device_features & VIRTIO_NET_F_MTU
    assert Rig(speed_mbps=10).device.device_features & VIRTIO_NET_F_SPEED_DUPLEX
    # UFO is offered to nobody.
    assert not OFFLOADS & (1 << 10 | 1 << 14)


def test_queues_are_pairs_and_one_for_control() -> None:
    assert Rig(pairs=3, queue_size=512).device.queue_size_max == (512,) * 6 + (CONTROL_QUEUE_SIZE,)


def test_the_configuration_space_is_that_of_the_specification() -> None:
    device = Rig(pairs=3, mtu=9000, speed_mbps=40_000).device
    assert bytes(device.config[:6]) == MAC
    assert device.read_config(6, 2) == 1  # status
    assert device.read_config(8, 2) == 3  # max_virtqueue_pairs
    assert device.read_config(10, 2) == 9000  # mtu
    assert device.read_config(12, 4) == 40_000  # speed
    assert device.read_config(16, 1) == 1  # duplex
    assert device.read_config(17, 1) == 0xFF
    assert Rig().device.read_config(12, 4) == 0xFFFF_FFFF
    before = bytes(device.config)
    device.write_config(0, 4, 0)
    assert bytes(device.config) == before


def test_the_mtu_is_that_of_the_layout() -> None:
    assert Rig(mtu=1400).data.mtu == 1400
    assert Rig().data.mtu is None


@pytest.mark.parametrize(
    "layout",
    [
        {"mac": b"\1" * 6},
        {"mac": b"\2" * 5},
        {"pairs": 0},
        {"pairs": 17},
        {"queue_size": 32},
        {"queue_size": 100},
        {"queue_size": 2048},
        {"mtu": 67},
        {"mtu": 65536},
        {"speed_mbps": -1},
        {"speed_mbps": 1 << 31},
    ],
)
def test_layouts_that_cannot_be(layout: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        NetLayout(**{"mac": MAC, **layout})


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (0, True),
        (VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_GUEST_TSO4, True),
        (VIRTIO_NET_F_GUEST_TSO4, False),
        (VIRTIO_NET_F_GUEST_USO4, False),
        (VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_GUEST_ECN, False),
        (VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_ECN, True),
        (VIRTIO_NET_F_HOST_TSO4, False),
        (VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_ECN, False),
        (VIRTIO_NET_F_HOST_USO, False),
        (VIRTIO_NET_F_CTRL_RX, False),
        (VIRTIO_NET_F_CTRL_VLAN, False),
        (VIRTIO_NET_F_GUEST_ANNOUNCE, False),
        (VIRTIO_NET_F_MQ, False),
        (VIRTIO_NET_F_CTRL_MAC_ADDR, False),
        (VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_CTRL_RX | VIRTIO_NET_F_CTRL_MAC_ADDR, True),
    ],
)
def test_features_need_others(features: int, accepted: bool) -> None:
    assert Rig().device.accept_features(features) is accepted


def test_without_mq_there_is_one_pair_and_the_control_queue_comes_third() -> None:
    features = ALWAYS
    rig = Rig(features, pairs=4)
    assert rig.data.calls[0][:3] == ("activate", features, 2)
    assert rig.index == 2
    assert rig.control(VIRTIO_NET_CTRL_RX, 0, b"\1") == VIRTIO_NET_OK
    assert rig.control(VIRTIO_NET_CTRL_MQ, 0, b"\2\0") == VIRTIO_NET_ERR
    rig.device.stop_queue(2)
    rig.device.stop_queue(1)
    assert rig.data.calls[-1] == ("stop_queue", 1)
    rig = Rig(features | VIRTIO_NET_F_MQ, pairs=4)
    assert rig.data.calls[0][2] == 8
    assert rig.control(VIRTIO_NET_CTRL_MQ, 0, b"\2\0") == VIRTIO_NET_OK
    assert rig.data.calls[-1] == ("pairs", 2)
    rig.device.notified(2)
    assert rig.control(VIRTIO_NET_CTRL_MQ, 0, b"\0\0") == VIRTIO_NET_ERR
    assert rig.control(VIRTIO_NET_CTRL_MQ, 0, b"\5\0") == VIRTIO_NET_ERR


def test_what_was_negotiated_says_what_is_filtered_at_first() -> None:
    assert Rig(0).data.receive == ReceiveFilter()
    assert Rig().data.receive == ReceiveFilter(macs=(MAC,), vlans=frozenset())
    features = VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_CTRL_VLAN
    assert Rig(features).data.receive == ReceiveFilter(vlans=frozenset())


def test_promiscuity_and_multicast() -> None:
    rig = Rig()
    for command in (0, 1):
        for wanted in (True, False):
            assert rig.control(VIRTIO_NET_CTRL_RX, command, bytes([wanted])) == VIRTIO_NET_OK
            receive = rig.data.receive
            assert (receive.promiscuous, receive.allmulti)[command] is wanted
    # VIRTIO_NET_F_CTRL_RX_EXTRA is not offered.
    for command in range(2, 6):
        assert rig.control(VIRTIO_NET_CTRL_RX, command, b"\1") == VIRTIO_NET_ERR


def test_the_mac_table_and_the_address() -> None:
    rig = Rig()
    uni, multi = many(2, 2), many(3, 1)
    assert rig.control(VIRTIO_NET_CTRL_MAC, 0, table(uni, multi)) == VIRTIO_NET_OK
    assert rig.data.receive.macs == (MAC, *uni, *multi)
    new = bytes.fromhex("525400000002")
    assert rig.control(VIRTIO_NET_CTRL_MAC, 1, new) == VIRTIO_NET_OK
    assert rig.data.receive.macs == (new, *uni, *multi)
    assert bytes(rig.device.config[:6]) == new
    assert rig.control(VIRTIO_NET_CTRL_MAC, 0, table([], [])) == VIRTIO_NET_OK
    assert rig.data.receive.macs == (new,)
    rig.device.reset()
    assert bytes(rig.device.config[:6]) == MAC
    rig.start(VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_CTRL_MAC_ADDR)
    assert rig.control(VIRTIO_NET_CTRL_MAC, 1, new) == VIRTIO_NET_OK
    assert rig.data.receive.macs is None


def test_a_table_with_more_than_there_is_room_for_lets_all_of_a_kind_through() -> None:
    rig = Rig()
    full = many(EXACT_MACS, 2)
    assert rig.control(VIRTIO_NET_CTRL_MAC, 0, table(full, [])) == VIRTIO_NET_OK
    assert rig.data.receive == ReceiveFilter(macs=(MAC, *full), vlans=frozenset())
    assert rig.control(VIRTIO_NET_CTRL_MAC, 0, table(full, many(1, 1))) == VIRTIO_NET_OK
    assert rig.data.receive == ReceiveFilter(macs=(MAC, *full), vlans=frozenset(), allmulti=True)
    assert rig.control(VIRTIO_NET_CTRL_MAC, 0, table(many(100, 2), many(1, 1))) == VIRTIO_NET_OK
    assert rig.data.receive == ReceiveFilter(macs=(MAC, *many(1, 1)), vlans=frozenset(), alluni=True)
    # When the table is short again, so is what passes.
    assert rig.control(VIRTIO_NET_CTRL_MAC, 0, table([], [])) == VIRTIO_NET_OK
    assert rig.data.receive == ReceiveFilter(macs=(MAC,), vlans=frozenset())


def test_vlans() -> None:
    rig = Rig()
    for vlan in (0, 5, 4095):
        assert rig.control(VIRTIO_NET_CTRL_VLAN, 0, struct.pack("<H", vlan)) == VIRTIO_NET_OK
    assert rig.control(VIRTIO_NET_CTRL_VLAN, 1, struct.pack("<H", 5)) == VIRTIO_NET_OK
    assert rig.data.receive.vlans == frozenset((0, 4095))
    for command in range(2):
        assert rig.control(VIRTIO_NET_CTRL_VLAN, command, struct.pack("<H", 4096)) == VIRTIO_NET_ERR


def test_guest_offloads() -> None:
    rig = Rig()
    wanted = VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_GUEST_TSO4
    assert rig.control(VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, struct.pack("<Q", wanted)) == VIRTIO_NET_OK
    assert rig.data.calls[-1] == ("offloads", wanted)
    for wrong in (VIRTIO_NET_F_CSUM, 1 << 63, 1 << 10):
        assert rig.control(VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, struct.pack("<Q", wrong)) == VIRTIO_NET_ERR
    rig = Rig(VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_CTRL_GUEST_OFFLOADS | VIRTIO_NET_F_GUEST_CSUM)
    assert rig.control(VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, struct.pack("<Q", wanted)) == VIRTIO_NET_ERR


def test_the_link_and_the_announcement() -> None:
    rig = Rig()
    rig.device.set_link(True)
    assert rig.host.changes == 0
    rig.device.set_link(False)
    assert (rig.device.read_config(6, 2), rig.host.changes) == (0, 1)
    rig.device.set_link(True)
    rig.device.announce()
    assert (rig.device.read_config(6, 2), rig.host.changes) == (3, 3)
    assert rig.control(VIRTIO_NET_CTRL_ANNOUNCE, 0, b"\0") == VIRTIO_NET_ERR
    assert rig.control(VIRTIO_NET_CTRL_ANNOUNCE, 0) == VIRTIO_NET_OK
    assert (rig.device.read_config(6, 2), rig.host.changes) == (1, 3)
    rig.device.announce()
    rig.device.reset()
    assert rig.device.read_config(6, 2) == 1
    # A driver that cannot is not asked.
    rig.start(0)
    rig.device.announce()
    assert rig.device.read_config(6, 2) == 1
    assert Rig(up=False).device.read_config(6, 2) == 0


@pytest.mark.parametrize(
    ("class_", "command", "data"),
    [
        (VIRTIO_NET_CTRL_RX, 0, b""),
        (VIRTIO_NET_CTRL_RX, 0, b"\1\1"),
        (VIRTIO_NET_CTRL_RX, 1, b""),
        (VIRTIO_NET_CTRL_MAC, 0, b""),
        (VIRTIO_NET_CTRL_MAC, 0, b"\0\0\0"),
        (VIRTIO_NET_CTRL_MAC, 0, table([])),
        (VIRTIO_NET_CTRL_MAC, 0, table([], []) + b"\0"),
        (VIRTIO_NET_CTRL_MAC, 0, table([], [])[:-1]),
        (VIRTIO_NET_CTRL_MAC, 0, struct.pack("<I", 0xFFFF_FFFF) + bytes(100)),
        (VIRTIO_NET_CTRL_MAC, 0, table(many(5, 2), many(5, 1))[:-1]),
        (VIRTIO_NET_CTRL_MAC, 0, table(many(4097, 2), [])),
        (VIRTIO_NET_CTRL_MAC, 1, bytes(5)),
        (VIRTIO_NET_CTRL_MAC, 1, bytes(7)),
        (VIRTIO_NET_CTRL_MAC, 2, bytes(6)),
        (VIRTIO_NET_CTRL_VLAN, 0, b"\1"),
        (VIRTIO_NET_CTRL_VLAN, 1, b"\1\0\0"),
        (VIRTIO_NET_CTRL_MQ, 0, b"\1"),
        (VIRTIO_NET_CTRL_MQ, 1, bytes(40)),
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, bytes(7)),
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, bytes(9)),
        (6, 0, b""),
        (255, 255, b""),
    ],
)
def test_commands_that_are_none_are_errors_and_change_nothing(class_: int, command: int, data: bytes) -> None:
    rig = Rig(pairs=2)
    before = list(rig.data.calls)
    assert rig.control(class_, command, data) == VIRTIO_NET_ERR
    assert rig.data.calls == before


@given(st.binary(max_size=40), st.integers(0, 6), st.integers(0, 2))
def test_whatever_comes_is_acknowledged(data: bytes, class_: int, command: int) -> None:
    rig = Rig(pairs=2)
    assert rig.control(class_, command, data) in (VIRTIO_NET_OK, VIRTIO_NET_ERR)


def test_headers_that_are_short_or_missing_are_errors() -> None:
    rig = Rig()
    for readable in ([], [b""], [b"\0"]):
        rig.driver.add(readable, [1])
        rig.device.notified(2)
        [used] = rig.driver.used()
        assert used.data == bytes([VIRTIO_NET_ERR])
    # Over several descriptors it is read all the same.
    rig.driver.add([b"\0", b"\0", b"\1"], [1])
    rig.device.notified(2)
    [used] = rig.driver.used()
    assert used.data == bytes([VIRTIO_NET_OK])


def test_without_a_byte_for_the_acknowledgement_the_driver_has_to_reset() -> None:
    rig = Rig()
    rig.driver.add([b"\0\0\1"])
    with pytest.raises(VirtqueueError, match="acknowledgement"):
        rig.device.notified(2)


def test_a_command_of_any_length_is_read_no_further_than_there_is_a_use_for_it() -> None:
    rig = Rig()
    longest = table(many(4096, 2), many(4096, 1))
    assert len(longest) + 2 == MAX_COMMAND_BYTES
    assert rig.control(VIRTIO_NET_CTRL_MAC, 0, longest) == VIRTIO_NET_OK
    assert rig.control(VIRTIO_NET_CTRL_MAC, 0, longest + bytes(1 << 20)) == VIRTIO_NET_ERR


def test_a_full_queue_is_served_a_batch_at_a_time() -> None:
    rig = Rig()
    for _ in range(CONTROL_BATCH + 2):
        rig.driver.add([b"\0\0\1"], [1])
    rig.device.notified(2)
    assert len(rig.driver.used()) == CONTROL_BATCH
    assert rig.host.agains == [2]
    rig.device.notified(2)
    assert len(rig.driver.used()) == 2
    assert rig.host.agains == [2]
    assert rig.host.interrupts == 2


def test_without_a_control_queue_nothing_is_served() -> None:
    rig = Rig(VIRTIO_NET_F_MAC)
    rig.driver.add([b"\0\0\1"], [1])
    rig.device.notified(2)
    assert rig.driver.used() == []


def test_its_life_is_its_datas() -> None:
    rig = Rig()
    rig.device.reset()
    rig.device.close()
    assert rig.data.calls[-2:] == [("reset",), ("close",)]
