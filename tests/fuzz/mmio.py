"""A hostile driver of each virtio device, whose every choice is a byte of its input."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, TypeVar

from aiokvm.virtio import mmio
from aiokvm.virtio.balloon import Balloon
from aiokvm.virtio.blk import BlkLayout, VirtioBlk
from aiokvm.virtio.blk_request import BlkParser
from aiokvm.virtio.console import Console, ConsolePort
from aiokvm.virtio.constants import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
)
from aiokvm.virtio.net import NetLayout, VirtioNet
from aiokvm.virtio.rng import Rng
from tests.virtio.driver import FakeMemory
from tests.virtio.transport import ALIVE, STARTED, FakeInterrupts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiokvm.virtio.device import VirtioDevice
    from aiokvm.virtio.queue import Virtqueue

    Call = Callable[..., Any]

T = TypeVar("T")

LOW, HIGH = 1 << 18, 1 << 16  # bytes of RAM, from 0 and from 1 MiB
QUEUE_BYTES = 0x3000  # three pages for each queue's areas
SEEDS = (bytes(range(256)) * 4, bytes(1024), b"\xff" * 512)
BLK_IN, BLK_OUT = 0, 1


class Choices:
    """What the input says; zeros behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_over(self) -> bool:
        return self._at >= len(self._data)

    def bits(self, count: int) -> int:
        size = (count + 7) // 8
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part, "little") & (1 << count) - 1

    def below(self, limit: int) -> int:
        return self.bits(max(8, limit.bit_length())) % limit

    def of(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def seldom(self) -> bool:
        return self.bits(8) > 250


class Host:
    """What a machine is to a device; what is to be called again waits for the driver's next step."""

    def __init__(self) -> None:
        self.registers: Any = None
        self.waiting: set[int] = set()

    def interrupt(self, queue: int) -> None:
        self.registers.interrupt()

    def config_changed(self) -> None:
        self.registers.config_changed()

    def needs_reset(self, reason: str) -> None:
        self.registers.needs_reset(reason)

    def again(self, queue: int) -> None:
        self.waiting.add(queue)

    def now_ns(self) -> int:
        return 0

    def timer(self, deadline_ns: int, callback: Callable[[], object], period_ns: int = 0) -> Host:
        return self

    def spawn(self, work: object, name: str) -> Host:
        return self

    def take_queue(self, queue: int) -> int:
        return -1

    def cancel(self) -> None:
        """It never happens."""


class End:
    """The host's end of a console port."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self.port: ConsolePort | None = None

    def room(self) -> int:
        return self._choices.of((0, 1, 7, 1 << 20))

    def on_transmit(self, data: bytes) -> None:
        pass

    def on_room(self) -> None:
        if self.port:
            self.port.receive(b"hello")

    def on_guest_open(self, is_open: bool) -> None:
        pass


class NetPath:
    """An adapter's data path, which looks at what it is told."""

    def activate(self, *_: object) -> None:
        pass

    def set_receive_filter(self, receive: Any) -> None:
        assert len(receive.macs or ()) <= 64

    def set_guest_offloads(self, features: int) -> None:
        pass

    def set_pairs(self, pairs: int) -> None:
        assert 1 <= pairs <= 4

    def stop_queue(self, queue: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


class BlkPath:
    """A disk of 500 KiB that serves at once."""

    def __init__(self) -> None:
        self._parser = BlkParser(1000, 512, False, "s")
        self._queues: list[Virtqueue | None] = []

    def activate(self, host: object, features: int, queues: Sequence[Virtqueue]) -> None:
        self._parser.features = features
        self._queues = list(queues)

    def notified(self, index: int) -> None:
        queue = self._queues[index] if index < len(self._queues) else None
        if queue is None or queue.broken:
            return
        for _ in range(16):
            chain = queue.pop()
            if chain is None:
                break
            request = self._parser.take(chain, index)
            if request:
                if request.type == BLK_OUT:
                    request.read(min(request.length, 4096))
                elif request.type == BLK_IN:
                    request.write(b"z" * min(request.length, 4096))
                request.complete(0)
        queue.publish()

    def stop_queue(self, index: int) -> None:
        if index < len(self._queues):
            self._queues[index] = None

    def reset(self) -> None:
        self._queues = []

    def set_writeback(self, writeback: bool) -> None:
        pass

    def set_capacity(self, sectors: int) -> None:
        pass

    def close(self) -> None:
        pass


class Driver:
    """A device behind registers, and who does with them what the input says."""

    def __init__(self, make: Callable[[Choices, FakeMemory], VirtioDevice], data: bytes, call: Call) -> None:
        self.choices = Choices(data)
        self.memory = FakeMemory((0, LOW), (1 << 20, HIGH))
        self.device = make(self.choices, self.memory)
        self.host = Host()
        self.registers = mmio.VirtioMmio(self.device, self.memory, FakeInterrupts())
        self.host.registers = self.registers
        # As attaching does.
        vars(self.device)["_host"] = self.host
        self._call = call

    def write(self, register: int, value: int) -> None:
        self._call(self.registers.write, register, 4, value)

    def run(self) -> None:
        while not self.choices.is_over:
            self.come_up()
            for _ in range(self.choices.below(30)):
                self.step()
        self._call(self.registers.reset)
        self.registers.close()

    def come_up(self) -> None:
        choices = self.choices
        flags = choices.bits(8)
        packed = bool(flags & 1)
        features = choices.bits(64) if choices.seldom() else self.device.device_features
        features |= VIRTIO_F_VERSION_1 | (VIRTIO_F_RING_PACKED if packed else 0)
        for bit, feature in ((2, VIRTIO_F_INDIRECT_DESC), (4, VIRTIO_F_EVENT_IDX), (8, VIRTIO_F_IN_ORDER)):
            features |= feature if flags & bit else 0
        self.write(mmio.VIRTIO_MMIO_STATUS, 0)
        self.write(mmio.VIRTIO_MMIO_STATUS, STARTED)
        for select in range(2):
            self.write(mmio.VIRTIO_MMIO_DRIVER_FEATURES_SEL, select)
            self.write(mmio.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * select & 0xFFFF_FFFF)
        self.write(mmio.VIRTIO_MMIO_STATUS, STARTED | 8)
        for queue, most in enumerate(self.device.queue_size_max):
            base = 0x4000 + queue * QUEUE_BYTES
            if base + QUEUE_BYTES > LOW:
                break
            self.set_up(queue, base, choices.of((1, 2, 8, 16, most)), packed)
        self.write(mmio.VIRTIO_MMIO_STATUS, ALIVE)

    def set_up(self, queue: int, base: int, size: int, packed: bool) -> None:
        choices = self.choices
        self.write(mmio.VIRTIO_MMIO_QUEUE_SEL, queue)
        self.write(mmio.VIRTIO_MMIO_QUEUE_NUM, size)
        areas = (
            mmio.VIRTIO_MMIO_QUEUE_DESC_LOW,
            mmio.VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            mmio.VIRTIO_MMIO_QUEUE_USED_LOW,
        )
        for page, area in enumerate(areas):
            self.write(area, choices.bits(32) if choices.seldom() else base + 0x1000 * page)
        self.write(mmio.VIRTIO_MMIO_QUEUE_READY, 1)
        count = min(size, 16)
        for index in range(choices.below(count + 1)):
            self.memory.write(base + 16 * index, self.descriptor(base, size, packed))
        available = (
            choices.of((0, 1, 2, size, choices.bits(16))),
            *(choices.below(size + 1) for _ in range(2)),
        )
        self.memory.write(base + 0x1000, struct.pack("<4H", 0, *available))
        self.memory.write(
            0x100, struct.pack("<IIQ", choices.of((0, 1, 4, 8, 11, 13, 99)), 0, choices.below(1010))
        )
        self.memory.write(0x110, choices.bits(128).to_bytes(16, "little"))

    def descriptor(self, base: int, size: int, packed: bool) -> bytes:
        choices = self.choices
        address = choices.of((0, base, 0x100, 1, 1 << 20, (1 << 20) + HIGH - 1, LOW - 1, (1 << 64) - 8))
        length = choices.of((0, 1, 8, 16, 17, 32, 512, 513, 4096, 1 << 17, 0xFFFFFFFF, choices.bits(16)))
        if packed:
            flags = choices.of((0x80, 0x81, 0x82, 0x83, 0x84, 0x8080, 0x8000))
            return struct.pack("<QIHH", address, length, choices.below(4), flags)
        return struct.pack("<QIHH", address, length, choices.of((0, 1, 2, 3, 4, 6)), choices.below(size))

    def step(self) -> None:
        choices, registers, call = self.choices, self.registers, self._call
        kind = choices.below(10)
        if kind < 3:
            call(registers.notify, choices.below(len(self.device.queue_size_max) + 2))
        elif kind == 3:
            self.write(mmio.VIRTIO_MMIO_QUEUE_SEL, choices.below(12))
            self.write(mmio.VIRTIO_MMIO_QUEUE_READY, 0)
        elif kind == 4:
            call(registers.write, choices.below(0x1000), choices.of((1, 2, 4, 8)), choices.bits(32))
        elif kind == 5:
            call(registers.read, choices.below(0x1000), choices.of((1, 2, 3, 4, 8)))
        elif kind < 8:
            self.memory.write(choices.below(LOW - 16), choices.bits(128).to_bytes(16, "little"))
        elif kind == 8 and self.host.waiting:
            queue = self.host.waiting.pop()
            if registers.active and registers.queues[queue].ready:
                call(registers.notify, queue)
        else:
            self.host_does(choices.below(6))

    def host_does(self, what: int) -> None:
        device, call = self.device, self._call
        if isinstance(device, Balloon):
            if what < 3:
                call(device.request_stats)
            else:
                device.num_pages = self.choices.below(64)
        elif isinstance(device, Console) and (port := device.ports[1]):
            if what == 0:
                call(port.receive, b"x" * 100)
            elif what == 1:
                call(port.resume)
            elif what == 2:
                call(device.remove_port, port)
                call(device.add_port, ConsolePort("again", End(self.choices)))
            else:
                call(port.open, what == 3)
                call(port.resize, 80, 25)
        elif isinstance(device, VirtioNet):
            call(device.set_link, what < 3)


def balloon(choices: Choices, memory: FakeMemory) -> VirtioDevice:
    ram: Any = memory
    return Balloon(ram, lambda _: None)


def blk(choices: Choices, memory: FakeMemory) -> VirtioDevice:
    path: Any = BlkPath()
    return VirtioBlk(BlkLayout(512_000, queues=2, queue_size=16), path)


def console(choices: Choices, memory: FakeMemory) -> VirtioDevice:
    device = Console(4)
    for index in range(3):
        end = End(choices)
        end.port = ConsolePort(f"p{index}", end, is_console=index == 0)
        device.add_port(end.port)
    return device


def net(choices: Choices, memory: FakeMemory) -> VirtioDevice:
    path: Any = NetPath()
    return VirtioNet(NetLayout(mac=b"\x52\x54\0\0\0\1", pairs=4), path)


def rng(choices: Choices, memory: FakeMemory) -> VirtioDevice:
    return Rng(lambda size: b"r" * size)


def _run_of(make: Callable[[Choices, FakeMemory], VirtioDevice]) -> Callable[[bytes, Call], None]:
    return lambda data, call: Driver(make, data, call).run()


RUNS = {make.__name__: _run_of(make) for make in (balloon, blk, console, net, rng)}
