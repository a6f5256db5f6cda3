"""Console, entropy and balloon in a machine: the test is the driver, through the registers and the RAM."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aiokvm import VM, ConfigError, RngConfig, SerialClosedError, StateError
from aiokvm.machine.peripherals import port_names
from aiokvm.virtio.balloon import INFLATEQ
from aiokvm.virtio.console import CONTROL_RECEIVEQ, CONTROL_TRANSMITQ
from aiokvm.virtio.constants import VIRTIO_ID_BALLOON, VIRTIO_ID_CONSOLE, VIRTIO_ID_RNG
from aiokvm.virtio.mmio import (
    VIRTIO_MMIO_CONFIG,
    VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_STATUS,
)
from tests.virtio.driver import VIRTQ_DESC_F_WRITE, Descriptor, SplitDriver

if TYPE_CHECKING:
    from aiokvm.machine.virtio_host import VirtioAttachment
    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.kvm, pytest.mark.anyio]

IDLE = bytes.fromhex("f4 eb fd")  # again: hlt; jmp again
AGENT = "org.qemu.guest_agent.0"
MIB = 1 << 20
# Each queue's rings and buffers.
PART_BYTES = 256 << 10
DEVICE_READY, PORT_READY, PORT_OPEN = 0, 3, 6


class Driver:
    """A driver of a device of a machine: ``queues`` has its ends of the queues."""

    def __init__(self, vm: VM, device_id: int, base: int = 2 * MIB) -> None:
        [self.device] = [one for one in vm._life.virtio if one.device.device_id == device_id]
        self.registers = self.device.registers
        self.queues: list[SplitDriver] = []
        for status in (0, 1, 3):
            self.registers.write(VIRTIO_MMIO_STATUS, 4, status)
        for sel, bits in enumerate((self.device.device.device_features, 1)):
            self.registers.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 4, sel)
            self.registers.write(VIRTIO_MMIO_DRIVER_FEATURES, 4, bits)
        self.registers.write(VIRTIO_MMIO_STATUS, 4, 11)
        assert self.registers.read(VIRTIO_MMIO_STATUS, 4) == 11
        for index in range(len(self.device.device.queue_size_max)):
            queue = SplitDriver(vm.memory, 8, 0, base + index * PART_BYTES)
            self.registers.write(VIRTIO_MMIO_QUEUE_SEL, 4, index)
            self.registers.write(VIRTIO_MMIO_QUEUE_NUM, 4, 8)
            self.registers.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 4, queue.desc)
            self.registers.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 4, queue.driver)
            self.registers.write(VIRTIO_MMIO_QUEUE_USED_LOW, 4, queue.device)
            self.registers.write(VIRTIO_MMIO_QUEUE_READY, 4, 1)
            self.queues.append(queue)
        self.registers.write(VIRTIO_MMIO_STATUS, 4, 15)

    def notify(self, queue: int) -> None:
        self.registers.write(VIRTIO_MMIO_QUEUE_NOTIFY, 4, queue)

    def writes(self, queue: int, data: bytes) -> None:
        self.queues[queue].add([data])
        self.notify(queue)

    def reads(self, queue: int, size: int = 4096) -> bytes:
        self.queues[queue].add([], [size])
        self.notify(queue)
        return b"".join(used.data for used in self.queues[queue].used())


def open_port(driver: Driver, number: int = 1) -> None:
    for name, event in ((0, DEVICE_READY), (number, PORT_READY), (number, PORT_OPEN)):
        driver.writes(CONTROL_TRANSMITQ, struct.pack("<IHH", name, event, 1))
        driver.queues[CONTROL_TRANSMITQ].used()
        for _ in range(4):
            driver.reads(CONTROL_RECEIVEQ)


def ids(vm: VM) -> list[int]:
    attachments: list[VirtioAttachment] = list(vm._life.virtio)
    return [attachment.registers.read(8, 4) for attachment in attachments]


async def test_a_machine_has_them_if_it_is_asked(guest: Guest) -> None:
    async with guest(IDLE, memory="8M", start=False) as vm:
        assert ids(vm) == []
        for name in ("console", "balloon"):
            with pytest.raises(StateError, match=f"has no .*{name}"):
                getattr(vm, name)
    async with guest(IDLE, memory="8M", start=False, console=True, rng=True, balloon=True) as vm:
        assert ids(vm) == [VIRTIO_ID_CONSOLE, VIRTIO_ID_RNG, VIRTIO_ID_BALLOON]
        assert list(vm.console) == ["hvc0"]
        assert (vm.balloon.target, vm.balloon.actual) == (0, 0)


@pytest.mark.parametrize(
    "config",
    [
        {"console": ["a", "a"]},
        {"console": [""]},
        {"rng": RngConfig(bytes_per_second=0)},
        {"rng": RngConfig(burst_bytes=1)},
    ],
)
async def test_what_cannot_be_is_refused(guest: Guest, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        async with guest(IDLE, memory="8M", start=False, **config):
            pass


def test_names_of_ports() -> None:
    assert port_names(False) is None
    assert port_names(True) == ()
    assert port_names("one") == ("one",)
    assert port_names(iter(["a", "b"])) == ("a", "b")


async def test_a_port_is_a_stream(guest: Guest) -> None:
    async with guest(IDLE, memory="16M", console=[AGENT]) as vm:
        driver = Driver(vm, VIRTIO_ID_CONSOLE)
        agent = vm.console[AGENT]
        open_port(driver)
        assert agent.guest_open
        driver.writes(5, b"from the guest\n")
        assert await agent.expect(b"\n", timeout=10) == b"from the guest\n"
        await agent.send(b"from the host")
        assert driver.reads(4) == b"from the host"
        assert driver.registers.read(VIRTIO_MMIO_INTERRUPT_STATUS, 4) & 1
        driver.registers.write(VIRTIO_MMIO_CONFIG + 8, 4, ord("!"))
        assert await vm.console["hvc0"].read() == b"!"


async def test_a_flood_from_the_guest_reaches_a_slow_reader_whole(guest: Guest) -> None:
    async with guest(IDLE, memory="16M", console=[AGENT]) as vm:
        driver = Driver(vm, VIRTIO_ID_CONSOLE)
        agent = vm.console[AGENT]
        open_port(driver)
        queue = driver.queues[5]
        block = bytes(range(256)) * 128
        sent = 0
        received = bytearray()

        async def write() -> None:
            nonlocal sent
            while sent < 64:
                queue.used()
                while queue.free and sent < 64:
                    try:
                        queue.add([block])
                    except MemoryError:
                        break
                    sent += 1
                driver.notify(5)
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(write)
            for _ in range(200):
                await anyio.lowlevel.checkpoint()
            with anyio.fail_after(30):
                while len(received) < 64 * len(block):
                    received += await agent.read()
                    assert len(agent._output) <= MIB
        assert received == block * 64
        assert agent.dropped == 0


async def test_the_loop_has_its_turns_while_a_gigabyte_is_written(guest: Guest) -> None:
    async with guest(IDLE, memory="16M", console=True) as vm:
        driver = Driver(vm, VIRTIO_ID_CONSOLE)
        open_port(driver, 0)
        driver.queues[1].expose([Descriptor(0, 15 * MIB)] * 8)
        driver.notify(1)
        turns = 0
        while not driver.queues[1].memory.read(driver.queues[1].device + 2, 1)[0]:
            await anyio.lowlevel.checkpoint()
            turns += 1
        assert turns >= 100
        assert vm.console["hvc0"].dropped >= 119 * MIB


async def test_randomness(guest: Guest) -> None:
    async with guest(IDLE, memory="8M", rng=RngConfig(bytes_per_second=1000, burst_bytes=1000)) as vm:
        driver = Driver(vm, VIRTIO_ID_RNG)
        first = driver.reads(0, 600)
        assert len(set(first)) > 50
        assert 400 <= len(driver.reads(0, 600)) < 600
        # The next waits for the limit's timer.
        driver.queues[0].add([], [64])
        driver.notify(0)
        with anyio.fail_after(10):
            while not (used := driver.queues[0].used()):
                await anyio.lowlevel.checkpoint()
        assert used[0].written == 64


async def test_the_balloon_gives_memory_back(guest: Guest) -> None:
    async with guest(IDLE, memory="16M", balloon=True) as vm:
        driver = Driver(vm, VIRTIO_ID_BALLOON)
        vm.memory.write(12 * MIB, b"secret")
        vm.balloon.target = 4096
        assert driver.registers.read(VIRTIO_MMIO_CONFIG, 4) == 1
        assert driver.registers.read(VIRTIO_MMIO_INTERRUPT_STATUS, 4) & 2
        driver.writes(INFLATEQ, struct.pack("<I", 12 * MIB >> 12))
        driver.registers.write(VIRTIO_MMIO_CONFIG + 4, 4, 1)
        with anyio.fail_after(10):
            await vm.balloon.reached()
        assert vm.memory.read(12 * MIB, 6) == bytes(6)
        assert vm.balloon.released_bytes == 4096


async def test_a_reset_of_the_machine_starts_them_over(guest: Guest) -> None:
    async with guest(IDLE, memory="16M", console=[AGENT], balloon=True, rng=True) as vm:
        driver = Driver(vm, VIRTIO_ID_CONSOLE)
        agent = vm.console[AGENT]
        open_port(driver)
        await agent.send(b"never read")
        vm.balloon.target = 8192
        await vm.reset()
        assert not agent.guest_open
        assert vm.balloon.target == 8192
        driver = Driver(vm, VIRTIO_ID_CONSOLE)
        open_port(driver)
        await agent.send(b"new")
        assert driver.reads(4) == b"new"


async def test_the_end_of_the_machine_ends_its_streams(guest: Guest) -> None:
    async with guest(IDLE, memory="16M", console=[AGENT], balloon=True) as vm:
        driver = Driver(vm, VIRTIO_ID_CONSOLE)
        open_port(driver)
        driver.writes(5, b"last words")
        agent, balloon = vm.console[AGENT], vm.balloon
        await vm.kill()
        with pytest.raises(StateError, match="has ended"):
            await balloon.stats()
    assert await agent.read() == b"last words"
    assert await agent.read() == b""
    with pytest.raises(SerialClosedError):
        await agent.send(b"x")
    agent.set_open(False)
    agent.resize(80, 25)
    balloon.target = 4096


async def test_a_hostile_ring_needs_a_reset_and_the_machine_lives_on(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    async with guest(IDLE, memory="16M", console=[AGENT]) as vm:
        driver = Driver(vm, VIRTIO_ID_CONSOLE)
        open_port(driver)
        driver.queues[4].expose([Descriptor(1 << 40, 8, VIRTQ_DESC_F_WRITE)])
        with anyio.move_on_after(0.01):
            await vm.console[AGENT].send(b"into a broken queue")
        assert driver.registers.read(VIRTIO_MMIO_STATUS, 4) & 0x40
        assert driver.registers.read(VIRTIO_MMIO_INTERRUPT_STATUS, 4) & 2
        for _ in range(5):
            with anyio.move_on_after(0.01):
                await vm.console[AGENT].send(b"again")
        assert len([record for record in caplog.records if "needs a reset" in record.message]) == 1
        open_port(Driver(vm, VIRTIO_ID_CONSOLE))
        assert vm.console[AGENT].guest_open
