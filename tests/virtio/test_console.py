"""The console device: ports, their control messages, and bounds in every direction."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import DeviceError
from aiokvm.virtio.console import (
    CONTROL_BATCH,
    CONTROL_RECEIVEQ,
    CONTROL_TRANSMITQ,
    QUEUE_SIZE,
    TRANSMIT_BYTES,
    VIRTIO_CONSOLE_CONSOLE_PORT,
    VIRTIO_CONSOLE_DEVICE_READY,
    VIRTIO_CONSOLE_F_MULTIPORT,
    VIRTIO_CONSOLE_PORT_ADD,
    VIRTIO_CONSOLE_PORT_NAME,
    VIRTIO_CONSOLE_PORT_OPEN,
    VIRTIO_CONSOLE_PORT_READY,
    VIRTIO_CONSOLE_PORT_REMOVE,
    VIRTIO_CONSOLE_RESIZE,
    Console,
    ConsolePort,
)
from tests.virtio.driver import VIRTQ_DESC_F_WRITE, Descriptor
from tests.virtio.guest import LAYOUTS, RANGE_BYTES, DeviceGuest

if TYPE_CHECKING:
    from aiokvm.virtio.queue import Chain

EMERG_WR = 8


class End:
    """The host's end of a port, with so much room."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.output = bytearray()
        self.input = b""
        self.opens: list[bool] = []
        self.port: ConsolePort

    def room(self) -> int:
        return self.limit - len(self.output)

    def on_transmit(self, data: bytes) -> None:
        assert 0 < len(data) <= self.room()
        self.output += data

    def on_room(self) -> None:
        while self.input and (taken := self.port.receive(self.input)):
            self.input = self.input[taken:]

    def on_guest_open(self, is_open: bool) -> None:
        self.opens.append(is_open)


class Rig:
    """A console with a terminal and a plain port, and a driver in the test's hands."""

    def __init__(self, features: int = 0, *, without: int = 0, ports: int = 4, size: int = 8) -> None:
        self.console = Console(ports)
        self.hvc = self.make("hvc0", is_console=True)
        self.agent = self.make("agent")
        self.console.add_port(self.hvc.port)
        self.console.add_port(self.agent.port)
        self.guest = DeviceGuest(self.console, features, without=without, size=size)

    @staticmethod
    def make(name: str, *, is_console: bool = False, limit: int = 1 << 30) -> End:
        end = End(limit)
        end.port = ConsolePort(name, end, is_console=is_console)
        return end

    def tell(self, number: int, event: int, value: int) -> None:
        """The driver sends a control message."""
        self.send_raw(CONTROL_TRANSMITQ, struct.pack("<IHH", number, event, value))

    def send_raw(self, queue: int, data: bytes) -> None:
        self.guest.drivers[queue].add([data])
        self.guest.notify(queue)
        assert [used.written for used in self.guest.drivers[queue].used()] == [0]

    def give(self, queue: int, *sizes: int) -> None:
        """The driver gives buffers for input."""
        for size in sizes:
            self.guest.drivers[queue].add([], [size])
        self.guest.notify(queue)

    def told(self) -> list[tuple[int, int, int, bytes]]:
        """The control messages that the device has for the driver: number, event, value, payload."""
        found = []
        while self.console._messages:
            self.give(CONTROL_RECEIVEQ, 300)
            [used] = self.guest.drivers[CONTROL_RECEIVEQ].used()
            found.append((*struct.unpack("<IHH", used.data[:8]), used.data[8:]))
        return found

    def up(self) -> None:
        """Driver and programs in the guest are there; all ports are open."""
        self.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
        added = [number for number, event, *_ in self.told() if event == VIRTIO_CONSOLE_PORT_ADD]
        for number in added:
            self.tell(number, VIRTIO_CONSOLE_PORT_READY, 1)
            self.tell(number, VIRTIO_CONSOLE_PORT_OPEN, 1)
        self.told()

    def received(self, queue: int) -> list[bytes]:
        return [used.data for used in self.guest.drivers[queue].used()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_driver_is_introduced_to_the_ports(layout: int) -> None:
    rig = Rig(layout)
    rig.hvc.port.resize(100, 40)
    assert rig.told() == []
    rig.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
    assert rig.told() == [
        (0, VIRTIO_CONSOLE_PORT_ADD, 1, b""),
        (1, VIRTIO_CONSOLE_PORT_ADD, 1, b""),
    ]
    rig.tell(0, VIRTIO_CONSOLE_PORT_READY, 1)
    rig.tell(1, VIRTIO_CONSOLE_PORT_READY, 1)
    assert rig.told() == [
        (0, VIRTIO_CONSOLE_CONSOLE_PORT, 1, b""),
        (0, VIRTIO_CONSOLE_RESIZE, 0, struct.pack("<HH", 100, 40)),
        (0, VIRTIO_CONSOLE_PORT_NAME, 1, b"hvc0"),
        (0, VIRTIO_CONSOLE_PORT_OPEN, 1, b""),
        (1, VIRTIO_CONSOLE_PORT_NAME, 1, b"agent"),
        (1, VIRTIO_CONSOLE_PORT_OPEN, 1, b""),
    ]
    assert rig.agent.opens == []
    rig.tell(1, VIRTIO_CONSOLE_PORT_OPEN, 1)
    rig.tell(1, VIRTIO_CONSOLE_PORT_OPEN, 0)
    assert rig.agent.opens == [True, False]
    assert rig.console.ignored == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_go_both_ways_on_every_port(layout: int) -> None:
    rig = Rig(layout)
    rig.up()
    for end, receiveq in ((rig.hvc, 0), (rig.agent, 4)):
        rig.guest.drivers[receiveq + 1].add([b"from ", b"guest"])
        rig.guest.notify(receiveq + 1)
        assert end.output == b"from guest"
        rig.give(receiveq, 4, 100)
        assert end.port.receive(b"from host") == 9
        assert rig.received(receiveq) == [b"from", b" host"]


def test_input_waits_for_buffers() -> None:
    rig = Rig()
    rig.up()
    rig.agent.input = b"0123456789"
    rig.agent.on_room()
    assert rig.agent.input == b"0123456789"
    rig.give(4, 4)
    assert (rig.received(4), rig.agent.input) == ([b"0123"], b"456789")
    rig.give(4, 4, 4)
    assert (rig.received(4), rig.agent.input) == ([b"4567", b"89"], b"")


def test_input_waits_until_the_guest_has_opened_the_port() -> None:
    rig = Rig()
    rig.agent.input = b"early"
    rig.give(4, 100)
    rig.agent.on_room()
    rig.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
    rig.told()
    rig.tell(1, VIRTIO_CONSOLE_PORT_READY, 1)
    assert rig.received(4) == []
    rig.tell(1, VIRTIO_CONSOLE_PORT_OPEN, 1)
    assert rig.received(4) == [b"early"]


def test_without_multiport_there_is_port_0_and_it_is_open() -> None:
    rig = Rig(without=VIRTIO_CONSOLE_F_MULTIPORT)
    assert rig.hvc.opens == [True]
    rig.give(0, 10)
    assert rig.hvc.port.receive(b"x") == 1
    rig.send_raw(1, b"y")
    assert rig.hvc.output == b"y"
    for queue in range(2, 10):
        rig.guest.drivers[queue].add([struct.pack("<IHH", 0, VIRTIO_CONSOLE_DEVICE_READY, 1)], [100])
        rig.guest.notify(queue)
        assert rig.guest.drivers[queue].used() == []
    assert rig.agent.port.receive(b"x") == 0
    assert rig.agent.output == b""


def test_a_driver_that_is_ready_again_and_again_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With buffers that nothing fits in, and new ones as soon as they come back."""
    rig = Rig(ports=31, size=QUEUE_SIZE)
    for number in range(29):
        rig.console.add_port(rig.make(f"p{number}").port)
    queue, driver = rig.guest.queues[CONTROL_RECEIVEQ], rig.guest.drivers[CONTROL_RECEIVEQ]
    pops = 0

    def refill() -> None:
        driver.used()
        while driver.free:
            driver.add([], [1])

    def pop() -> Chain | None:
        nonlocal pops
        pops += 1
        return taken()

    def publish() -> bool:
        shown = published()
        refill()
        return shown

    taken, published = queue.pop, queue.publish
    monkeypatch.setattr(queue, "pop", pop)
    monkeypatch.setattr(queue, "publish", publish)
    refill()
    ready = struct.pack("<IHH", 0, VIRTIO_CONSOLE_DEVICE_READY, 1)
    for _ in range(CONTROL_BATCH + 1):
        rig.guest.drivers[CONTROL_TRANSMITQ].add([ready])
    rig.guest.notify(CONTROL_TRANSMITQ)
    assert pops <= QUEUE_SIZE
    assert set(rig.guest.host.agains) == {CONTROL_TRANSMITQ, CONTROL_RECEIVEQ}


def test_a_driver_that_is_ready_again_and_again_hears_of_no_port_twice() -> None:
    rig = Rig()
    for _ in range(50):
        rig.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
    assert [event for _, event, *_ in rig.told()] == [VIRTIO_CONSOLE_PORT_ADD] * 2
    for _ in range(50):
        rig.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
        rig.tell(1, VIRTIO_CONSOLE_PORT_READY, 1)
    # None of which was taken: the newest of each kind is kept.
    assert rig.told() == [
        (1, VIRTIO_CONSOLE_PORT_NAME, 1, b"agent"),
        (1, VIRTIO_CONSOLE_PORT_OPEN, 1, b""),
    ]


@pytest.mark.parametrize(
    ("number", "event", "value"),
    [
        (2, VIRTIO_CONSOLE_PORT_OPEN, 1),
        (4, VIRTIO_CONSOLE_PORT_OPEN, 1),
        (0xFFFF_FFFF, VIRTIO_CONSOLE_PORT_READY, 1),
        (0, VIRTIO_CONSOLE_PORT_ADD, 1),
        (0, VIRTIO_CONSOLE_PORT_REMOVE, 1),
        (0, VIRTIO_CONSOLE_RESIZE, 1),
        (0, 0xFFFF, 1),
    ],
)
def test_messages_without_sense_are_ignored_and_counted(number: int, event: int, value: int) -> None:
    rig = Rig()
    rig.up()
    rig.tell(number, event, value)
    assert rig.console.ignored == 1
    assert rig.told() == []
    assert rig.guest.host.reasons == []


def test_messages_about_ports_before_they_are_added_are_ignored() -> None:
    rig = Rig()
    rig.tell(1, VIRTIO_CONSOLE_PORT_OPEN, 1)
    rig.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
    rig.tell(1, VIRTIO_CONSOLE_PORT_READY, 1)
    assert rig.console.ignored == 2
    assert not rig.agent.port.guest_open


def test_a_driver_or_port_that_failed_is_told_nothing() -> None:
    rig = Rig()
    rig.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 0)
    assert rig.told() == []
    rig.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
    rig.told()
    rig.tell(1, VIRTIO_CONSOLE_PORT_READY, 0)
    assert rig.told() == []


def test_short_empty_and_endless_messages() -> None:
    rig = Rig(size=128)
    rig.send_raw(CONTROL_TRANSMITQ, b"short")
    rig.guest.drivers[CONTROL_TRANSMITQ].add([], [100])
    rig.guest.notify(CONTROL_TRANSMITQ)
    assert [used.written for used in rig.guest.drivers[CONTROL_TRANSMITQ].used()] == [0]
    rig.guest.drivers[CONTROL_TRANSMITQ].expose([Descriptor(RANGE_BYTES, RANGE_BYTES)] * 128)
    rig.guest.notify(CONTROL_TRANSMITQ)
    # What lies there is zeros: a driver that failed.
    assert rig.console.ignored == 2
    assert rig.guest.host.agains == []


def test_a_buffer_too_small_for_a_message_comes_back_empty_and_the_message_waits() -> None:
    rig = Rig()
    rig.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
    rig.told()
    rig.tell(1, VIRTIO_CONSOLE_PORT_READY, 1)
    driver = rig.guest.drivers[CONTROL_RECEIVEQ]
    for size in (7, 12):
        driver.add([], [size])
    driver.add([b"readable"])
    rig.guest.notify(CONTROL_RECEIVEQ)
    assert [used.written for used in driver.used()] == [0, 0, 0]
    assert [event for _, event, *_ in rig.told()] == [VIRTIO_CONSOLE_PORT_NAME, VIRTIO_CONSOLE_PORT_OPEN]


def test_output_waits_in_the_queue_while_the_host_has_no_room() -> None:
    rig = Rig()
    rig.up()
    rig.agent.limit = 5
    driver = rig.guest.drivers[5]
    driver.add([b"0123"])
    driver.add([b"4567"])
    driver.add([b"89"])
    rig.guest.notify(5)
    assert rig.agent.output == b"01234"
    assert len(driver.used()) == 1
    rig.agent.port.resume()
    assert rig.agent.output == b"01234"
    rig.agent.output.clear()
    rig.agent.port.resume()
    assert rig.agent.output == b"56789"
    assert len(driver.used()) == 2
    assert rig.guest.host.agains == []


def test_room_that_comes_while_output_is_taken_is_used_at_once() -> None:
    rig = Rig()
    rig.up()

    def on_transmit(data: bytes) -> None:
        rig.agent.output += data
        rig.agent.port.resume()

    rig.agent.on_transmit = on_transmit  # type: ignore[method-assign]
    driver = rig.guest.drivers[5]
    for n in range(6):
        driver.add([b"%d" % n])
    rig.guest.notify(5)
    assert rig.agent.output == b"012345"
    assert len(driver.used()) == 6


def test_a_chain_of_a_gigabyte_gives_the_loop_its_turns() -> None:
    rig = Rig(size=128)
    rig.up()
    chain = [Descriptor(5 * RANGE_BYTES, RANGE_BYTES)] * 128
    rig.guest.drivers[5].expose(chain)
    rig.guest.notify(5)
    for turn in range(1, 8):
        assert len(rig.agent.output) == turn * TRANSMIT_BYTES
        assert rig.guest.again()
    rig.guest.reset()
    while rig.guest.again():
        pass
    assert len(rig.agent.output) == 8 * TRANSMIT_BYTES


def test_a_queue_that_is_taken_back_ends_its_output() -> None:
    rig = Rig()
    rig.up()
    rig.agent.limit = 2
    rig.send_raw(1, b"x")
    rig.guest.drivers[5].add([b"0123"])
    rig.guest.notify(5)
    rig.console.stop_queue(5)
    rig.guest.queues[5].stop()
    rig.agent.limit = 100
    rig.agent.port.resume()
    assert rig.agent.output == b"01"


def test_empty_output_and_output_into_writable_buffers_come_back() -> None:
    rig = Rig()
    rig.up()
    rig.guest.drivers[5].add([], [64])
    rig.guest.drivers[5].add([b"x"], [64])
    rig.guest.notify(5)
    assert [used.written for used in rig.guest.drivers[5].used()] == [0, 0]
    assert rig.agent.output == b"x"


def test_buffers_without_room_hold_nothing_up() -> None:
    rig = Rig()
    rig.up()
    for _ in range(8):
        rig.guest.drivers[4].add([b"readable"])
    assert rig.agent.port.receive(b"input") == 0
    assert rig.guest.host.agains == [4]
    assert [used.written for used in rig.guest.drivers[4].used()] == [0] * 8


def test_the_guest_s_ring_broken_in_any_queue_needs_a_reset() -> None:
    rig = Rig()
    rig.up()
    wild = 1 << 40
    for queue in (1, 3, 5):
        rig.guest.drivers[queue].expose([Descriptor(wild, 8)])
        rig.guest.notify(queue)
    for number, queue in enumerate((0, 4)):
        rig.guest.drivers[queue].expose([Descriptor(wild, 8, VIRTQ_DESC_F_WRITE)])
        assert rig.console.ports[number].receive(b"x") == 0  # type: ignore[union-attr]
    assert len(rig.guest.host.reasons) == 5


def test_configuration() -> None:
    rig = Rig()
    assert rig.console.read_config(4, 4) == 4
    assert rig.console.read_config(EMERG_WR, 4) == 0
    rig.hvc.port.resize(132, 43)
    assert (rig.console.read_config(0, 2), rig.console.read_config(2, 2)) == (132, 43)
    assert rig.guest.host.config_changes == 1
    rig.agent.port.resize(1, 1)
    assert rig.console.read_config(0, 2) == 132
    for size in ((-1, 1), (1, 65536)):
        with pytest.raises(DeviceError, match="0 to 65535"):
            rig.hvc.port.resize(*size)


def test_an_emergency_write_needs_no_driver_and_has_a_bound() -> None:
    rig = Rig()
    rig.guest.reset()
    rig.hvc.limit = 2
    for value in (0x1234_5641, 0x42, 0x43):
        rig.console.write_config(EMERG_WR, 4, value)
    rig.console.write_config(0, 4, 0x44)
    assert rig.hvc.output == b"AB"


def test_a_terminal_is_resized_while_it_runs_and_only_the_last_size_counts() -> None:
    rig = Rig()
    rig.up()
    for cols in range(1000):
        rig.hvc.port.resize(cols, 25)
    assert rig.told() == [(0, VIRTIO_CONSOLE_RESIZE, 0, struct.pack("<HH", 999, 25))]
    rig.hvc.port.resize(80, 25)
    assert rig.told() == [(0, VIRTIO_CONSOLE_RESIZE, 0, struct.pack("<HH", 80, 25))]


def test_the_host_s_end_opens_and_closes() -> None:
    rig = Rig()
    rig.agent.port.open(False)
    rig.up()
    assert not rig.agent.port.host_open
    rig.agent.port.open(True)
    rig.agent.port.open(False)
    assert rig.told()[-1:] == [(1, VIRTIO_CONSOLE_PORT_OPEN, 0, b"")]


def test_a_port_is_added_and_removed_while_the_guest_runs() -> None:
    rig = Rig()
    rig.up()
    late = rig.make("late")
    rig.console.add_port(late.port)
    assert late.port.id == 2
    assert rig.told() == [(2, VIRTIO_CONSOLE_PORT_ADD, 1, b"")]
    rig.tell(2, VIRTIO_CONSOLE_PORT_READY, 1)
    rig.tell(2, VIRTIO_CONSOLE_PORT_OPEN, 1)
    late.limit = 3
    driver = rig.guest.drivers[7]
    driver.add([b"output"])
    rig.guest.notify(7)
    rig.told()
    rig.console.remove_port(late.port)
    assert rig.told() == [(2, VIRTIO_CONSOLE_PORT_REMOVE, 1, b"")]
    assert late.opens == [True, False]
    assert len(driver.used()) == 1
    assert (late.port.id, late.port.receive(b"x")) == (-1, 0)
    late.port.resume()
    late.port.open(True)
    late.port.resize(1, 1)
    rig.tell(2, VIRTIO_CONSOLE_PORT_OPEN, 1)
    assert rig.console.ignored == 1
    again = rig.make("again")
    rig.console.add_port(again.port)
    assert rig.told() == [(2, VIRTIO_CONSOLE_PORT_ADD, 1, b"")]


def test_a_port_that_the_driver_never_heard_of_is_not_removed_there() -> None:
    rig = Rig()
    rig.up()
    first, second = rig.make("first"), rig.make("second")
    rig.console.add_port(first.port)
    rig.console.remove_port(first.port)
    rig.console.add_port(second.port)
    assert [message[:2] for message in rig.told() if message[0] == 2] == [(2, VIRTIO_CONSOLE_PORT_ADD)]


def test_a_number_is_told_gone_before_it_comes_back() -> None:
    rig = Rig()
    rig.up()
    rig.console.remove_port(rig.agent.port)
    fresh = rig.make("fresh")
    rig.console.add_port(fresh.port)
    assert [message[:2] for message in rig.told() if message[0] == 1] == [
        (1, VIRTIO_CONSOLE_PORT_REMOVE),
        (1, VIRTIO_CONSOLE_PORT_ADD),
    ]


def test_there_are_no_more_ports_than_the_driver_was_told() -> None:
    console = Console(1)
    console.add_port(Rig.make("a").port)
    with pytest.raises(DeviceError, match="no more than its 1 ports"):
        console.add_port(Rig.make("b").port)
    for ports in (0, 32):
        with pytest.raises(DeviceError, match="1 to 31 ports"):
            Console(ports)
    with pytest.raises(DeviceError, match="at most 256 bytes"):
        ConsolePort("ä" * 129, End())


def test_a_reset_closes_the_ports_and_the_next_driver_starts_over() -> None:
    rig = Rig()
    rig.up()
    rig.agent.limit = 2
    rig.guest.drivers[5].add([b"lost"])
    rig.guest.notify(5)
    rig.guest.reset()
    assert rig.agent.opens == [True, False]
    rig.agent.limit = 100
    rig.agent.port.resume()
    assert rig.agent.output == b"lo"
    rig.guest.start()
    rig.up()
    assert rig.agent.port.guest_open
    rig.send_raw(5, b"new")
    assert rig.agent.output == b"lonew"


def test_queues_that_are_not_set_up_are_not_touched() -> None:
    rig = Rig()
    guest = DeviceGuest(rig.console, missing=(0, 1, 2, 3, 4, 5))
    for queue in range(20):
        rig.console.notified(queue)
    assert rig.hvc.port.receive(b"x") == 0
    assert guest.host.reasons == []


def test_a_queue_s_worth_of_chains_gives_the_loop_its_turn() -> None:
    rig = Rig(size=QUEUE_SIZE)
    rig.up()
    for _ in range(QUEUE_SIZE):
        rig.guest.drivers[5].add([b"x"])
    rig.guest.notify(5)
    assert rig.guest.host.agains == [5]
