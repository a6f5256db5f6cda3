"""The host's ends of a virtio console's ports: bounded, nothing lost, nobody stuck."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm.errors import ConfigError, DeviceError, SerialClosedError
from aiokvm.machine import console as limits
from aiokvm.machine.console import INPUT_LIMIT, OUTPUT_LIMIT
from aiokvm.machine.ports import FIRST, Consoles, ConsoleStream
from aiokvm.virtio.console import (
    CONTROL_RECEIVEQ,
    CONTROL_TRANSMITQ,
    VIRTIO_CONSOLE_DEVICE_READY,
    VIRTIO_CONSOLE_PORT_OPEN,
    VIRTIO_CONSOLE_PORT_READY,
    VIRTIO_CONSOLE_PORT_REMOVE,
)
from tests.virtio.guest import DeviceGuest

if TYPE_CHECKING:
    from tests.holdups import Step

pytestmark = pytest.mark.anyio

AGENT = "org.qemu.guest_agent.0"
# Queues of port 1.
RECEIVEQ, TRANSMITQ = 4, 5


class Rig:
    """A console's streams, and a driver that has made all ports and opened them, in the test's hands."""

    def __init__(self, *names: str, opens: bool = True) -> None:
        self.consoles = Consoles(names)
        self.guest = DeviceGuest(self.consoles.device, size=64)
        self.tell(0, VIRTIO_CONSOLE_DEVICE_READY, 1)
        self.messages()
        for number in range(len(names) + 1):
            self.tell(number, VIRTIO_CONSOLE_PORT_READY, 1)
            if opens:
                self.tell(number, VIRTIO_CONSOLE_PORT_OPEN, 1)
        self.messages()

    def tell(self, number: int, event: int, value: int) -> None:
        message = number.to_bytes(4, "little") + event.to_bytes(2, "little") + value.to_bytes(2, "little")
        self.writes(CONTROL_TRANSMITQ, message)
        self.guest.drivers[CONTROL_TRANSMITQ].used()

    def messages(self) -> list[bytes]:
        while self.consoles.device._messages:
            self.guest.drivers[CONTROL_RECEIVEQ].add([], [300])
            self.guest.notify(CONTROL_RECEIVEQ)
        return [used.data for used in self.guest.drivers[CONTROL_RECEIVEQ].used()]

    def writes(self, queue: int, data: bytes) -> None:
        """The guest writes."""
        self.guest.drivers[queue].add([data])
        self.guest.notify(queue)

    def reads(self, queue: int, size: int = 4096) -> bytes:
        """The guest gives a buffer, and takes what it gets."""
        driver = self.guest.drivers[queue]
        if driver.free:
            driver.add([], [size])
        self.guest.notify(queue)
        return b"".join(used.data for used in driver.used())


def test_ports_by_name() -> None:
    consoles = Consoles([AGENT, "log"])
    assert list(consoles) == [FIRST, AGENT, "log"]
    assert len(consoles) == 3
    assert consoles[AGENT].port.id == 1
    assert [stream.port.is_console for stream in consoles.values()] == [True, False, False]
    assert list(Consoles([AGENT, FIRST])) == [FIRST, AGENT]
    assert repr(consoles["log"]) == "<ConsoleStream log>"
    with pytest.raises(KeyError):
        consoles["none"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "two console ports are called 'a'"),
        ([""], "is no name"),
        (["a/b"], "is no name"),
        (["a\n"], "is no name"),
        (["x" * 257], "is no name"),
        ([str(n) for n in range(31)], "at most 31"),
    ],
)
def test_names_that_cannot_be_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Consoles(names)


async def test_bytes_go_both_ways() -> None:
    rig = Rig(AGENT)
    agent = rig.consoles[AGENT]
    assert agent.guest_open
    await agent.opened()
    rig.writes(TRANSMITQ, b"hello\nworld")
    assert await agent.expect(b"\n") == b"hello\n"
    assert await agent.read() == b"world"
    await agent.send(b"answer")
    assert rig.reads(RECEIVEQ) == b"answer"
    rig.writes(1, b"login: ")
    assert await rig.consoles[FIRST].expect(b"login: ") == b"login: "


async def test_a_flood_of_input_reaches_the_guest_whole() -> None:
    rig = Rig(AGENT)
    data = bytes(range(256)) * 2048
    received = bytearray()
    async with anyio.create_task_group() as group:
        group.start_soon(rig.consoles[AGENT].send, data)
        with anyio.fail_after(30):
            while len(received) < len(data):
                await anyio.wait_all_tasks_blocked()
                received += rig.reads(RECEIVEQ)
    assert received == data


async def test_100_mb_typed_into_a_port_nobody_reads_are_bounded() -> None:
    rig = Rig(AGENT)
    agent = rig.consoles[AGENT]
    data = bytes(100_000_000)
    with anyio.move_on_after(0.05) as scope:
        await agent.send(data)
    assert scope.cancelled_caught
    assert len(agent._input) <= INPUT_LIMIT


async def test_output_that_nobody_reads_waits_in_the_guest_and_is_not_lost() -> None:
    rig = Rig(AGENT)
    agent = rig.consoles[AGENT]
    block = bytes(range(256)) * 256
    sent = 0
    driver = rig.guest.drivers[TRANSMITQ]
    for _ in range(20):
        if driver.free:
            try:
                rig.writes(TRANSMITQ, block)
            except MemoryError:
                break
            sent += 1
        driver.used()
        while rig.guest.again():
            pass
    assert len(agent._output) == OUTPUT_LIMIT
    assert sent * len(block) > OUTPUT_LIMIT
    received = bytearray()
    with anyio.fail_after(30):
        while len(received) < sent * len(block):
            received += await agent.read()
            while rig.guest.again():
                pass
    assert received == block * sent
    assert agent.dropped == 0


async def test_output_to_a_terminal_never_waits_and_the_newest_stays() -> None:
    rig = Rig()
    hvc = rig.consoles[FIRST]
    driver = rig.guest.drivers[1]
    for _ in range(40):
        rig.writes(1, bytes(32 << 10))
        assert len(driver.used()) == 1
    rig.writes(1, b"new")
    assert hvc.dropped == 40 * (32 << 10) + 3 - OUTPUT_LIMIT
    assert len(hvc._output) == OUTPUT_LIMIT
    assert hvc._output.endswith(b"new")


async def test_a_reader_that_wants_more_than_there_is_room_for_gets_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "OUTPUT_LIMIT", 8)
    rig = Rig(AGENT)
    agent = rig.consoles[AGENT]
    rig.writes(TRANSMITQ, b"a long stack of hay needle")
    assert bytes(agent._output) == b"a long s"
    assert await agent.expect(b"needle", timeout=10) == b"y needle"
    assert agent.dropped == 18
    assert agent.room() == 8


async def test_output_after_all_was_dropped_is_waited_for() -> None:
    rig = Rig()
    hvc = rig.consoles[FIRST]
    for _ in range(40):
        rig.writes(1, bytes(32 << 10))
        rig.guest.drivers[1].used()
    assert hvc.dropped
    while hvc._output:
        await hvc.read()
    with anyio.move_on_after(0.01) as scope:
        await hvc.read()
    assert scope.cancelled_caught


async def test_a_program_waits_for_the_guest_to_open() -> None:
    rig = Rig(AGENT, opens=False)
    agent = rig.consoles[AGENT]
    done: list[str] = []

    async def wait() -> None:
        await agent.opened()
        done.append("opened")

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await agent.send(b"early")
        await anyio.wait_all_tasks_blocked()
        assert rig.reads(RECEIVEQ) == b""
        assert done == []
        rig.tell(1, VIRTIO_CONSOLE_PORT_OPEN, 1)
    assert rig.reads(RECEIVEQ) == b"early"
    rig.tell(1, VIRTIO_CONSOLE_PORT_OPEN, 0)
    assert not agent.guest_open


async def test_the_end_of_the_machine_ends_all_waits() -> None:
    rig = Rig(AGENT, opens=False)
    agent = rig.consoles[AGENT]
    ended: list[str] = []

    async def ends(call: object) -> None:
        with pytest.raises(SerialClosedError, match="the machine has ended"):
            await call  # type: ignore[misc]
        ended.append("")

    rig.writes(TRANSMITQ, b"left")
    async with anyio.create_task_group() as group:
        group.start_soon(ends, agent.opened())
        group.start_soon(ends, agent.send(bytes(10 * INPUT_LIMIT)))
        group.start_soon(ends, agent.expect(b"never"))
        await anyio.wait_all_tasks_blocked()
        rig.consoles.close()
    assert len(ended) == 3
    assert await agent.read() == b"left"
    assert await agent.read() == b""
    with pytest.raises(SerialClosedError, match="nobody opens port"):
        await agent.opened()


async def test_ports_come_and_go() -> None:
    rig = Rig()
    late = rig.consoles.add("late")
    assert rig.consoles["late"] is late
    rig.messages()
    rig.tell(1, VIRTIO_CONSOLE_PORT_READY, 1)
    rig.tell(1, VIRTIO_CONSOLE_PORT_OPEN, 1)
    rig.writes(TRANSMITQ, b"last words")
    rig.messages()
    rig.consoles.remove("late")
    assert [message[4] for message in rig.messages()] == [VIRTIO_CONSOLE_PORT_REMOVE]
    assert "late" not in rig.consoles
    assert await late.read() == b"last words"
    assert await late.read() == b""
    with pytest.raises(SerialClosedError, match="port late was removed: nobody reads"):
        await late.send(b"x")
    with pytest.raises(ConfigError, match="hvc0 stays"):
        rig.consoles.remove(FIRST)
    with pytest.raises(KeyError):
        rig.consoles.remove("late")
    with pytest.raises(ConfigError, match="two console ports"):
        rig.consoles.add(FIRST)
    for name in ("1", "2", "3"):
        rig.consoles.add(name)
    with pytest.raises(DeviceError, match="no more than its 4 ports"):
        rig.consoles.add("4")
    assert "4" not in rig.consoles


async def test_a_machine_s_reset_forgets_input_and_a_driver_s_does_not() -> None:
    rig = Rig(AGENT)
    agent = rig.consoles[AGENT]
    await agent.send(b"kept")
    rig.guest.reset()
    assert not agent.guest_open
    assert agent._input == b"kept"
    rig.consoles.reset()
    assert agent._input == b""


def test_sizes_and_the_host_s_end() -> None:
    rig = Rig(AGENT)
    rig.consoles[FIRST].resize(100, 30)
    rig.consoles[AGENT].set_open(False)
    assert [(message[0], message[4]) for message in rig.messages()] == [(0, 5), (1, 6)]
    with pytest.raises(DeviceError):
        rig.consoles[FIRST].resize(-1, 30)


def test_a_stream_without_a_console_is_quiet() -> None:
    stream = ConsoleStream("alone")
    stream.on_room()
    stream.port.resume()
    assert stream.port.receive(b"x") == 0


def test_a_driver_that_gives_tiny_buffers_without_end_does_not_keep_the_loop(step: Step) -> None:
    rig = Rig(AGENT)
    agent = rig.consoles[AGENT]
    driver, host = rig.guest.drivers[RECEIVEQ], rig.guest.host
    received = bytearray()

    def refill(queue: int) -> None:
        # As a vCPU of the guest's may, which runs meanwhile.
        received.extend(b"".join(used.data for used in driver.used()))
        for _ in range(64):
            driver.add([], [1])

    host.interrupt = refill  # type: ignore[method-assign]
    data = bytes(range(256)) * 64
    agent._input += data
    refill(RECEIVEQ)
    rounds = 0
    while len(received) < len(data) and rounds < len(data):
        host.agains.clear()
        before = len(received)
        with step():
            rig.guest.device.notified(RECEIVEQ)
        assert len(received) - before <= 64
        assert host.agains == [RECEIVEQ] or len(received) == len(data)
        rounds += 1
    assert received == data
