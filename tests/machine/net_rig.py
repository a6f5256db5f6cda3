"""Adapters of no machine, and their peer: drivers in the test on both sides of the C core."""

from __future__ import annotations

import os
import struct
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from aiokvm._core import ffi, lib
from aiokvm.aio import current_loop
from aiokvm.errors import VirtqueueError
from aiokvm.machine.events import EventHub
from aiokvm.machine.log import machine_logger
from aiokvm.machine.nets import Nets
from aiokvm.memory import GuestMemory
from aiokvm.net import NetBackend, Nic
from aiokvm.virtio.net_control import VIRTIO_NET_F_MRG_RXBUF
from aiokvm.virtio.queue import Virtqueue
from tests.virtio.driver import VIRTIO_F_INDIRECT_DESC, FakeMemory, SplitDriver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiokvm.machine.nets import VmNic
    from aiokvm.net.plane import End, Plane

MIB = 1 << 20
LIMIT_S = 60.0
MAC = "52:54:00:00:00:01"
HDR = struct.Struct("<BBHHHHH")
"""struct virtio_net_hdr_v1: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers."""


@dataclass(frozen=True)
class Received:
    hdr: tuple[int, ...]
    frame: bytes


def frame(size: int = 60, to: str = "ff:ff:ff:ff:ff:ff", fill: int = 0) -> bytes:
    """An Ethernet frame of this many bytes, of a type that nobody has."""
    head = bytes.fromhex(to.replace(":", "")) + bytes.fromhex("5254000000aa") + b"\x88\xb5"
    return head + bytes((fill + i) & 0xFF for i in range(size - len(head)))


class Eventfd:
    """One that the loop watches."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.count = 0
        self.happened = anyio.Event()
        self._watch = current_loop().watch(self.fd, self._on_readable)

    def _on_readable(self) -> None:
        self.count += os.eventfd_read(self.fd)
        self.happened.set()
        self.happened = anyio.Event()

    def close(self) -> None:
        self._watch.cancel()
        os.close(self.fd)


class Cable(NetBackend):
    """A backend with a driver of its own: what the guest sends comes to `receive`, `send` goes to it."""

    def __init__(self, *, room: int = 128, mtu: int | None = None, broken: str = "", **policy: Any) -> None:
        super().__init__(**policy)
        self.room = room
        self.mtu = mtu
        self.broken = broken
        self.closes = 0
        self.lose: Callable[[str], None]
        self.waits: anyio.Event | None = None

    def __repr__(self) -> str:
        return "Cable()"

    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        if self.waits:
            await self.waits.wait()
        if self.broken:
            raise OSError(self.broken)
        self.lose = on_lost
        self.memory = FakeMemory((0, 2 * MIB))
        self.irq = Eventfd()
        self.word = ffi.new("uint32_t *")
        notifier = ffi.new("struct aiokvm_notifier *", {"irqfd": self.irq.fd, "status": self.word})
        error = ffi.new("int *")
        end = plane.adopt(lib.aiokvm_net_nic_new(plane.core, error), error[0], lambda *_: None)
        lib.aiokvm_net_nic_set_features(end.core, (1 << 64) - 1, 0)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.vrings = [Virtqueue(self.memory, 128) for _ in range(2)]
        self.drivers = [
            SplitDriver(FakeView(self.memory, index), 128, VIRTIO_F_INDIRECT_DESC, 0x1000 + index * MIB)
            for index in range(2)
        ]
        for index, queue in enumerate(self.vrings):
            self.drivers[index].start(queue)
            kick = self.kicks[index]
            code = lib.aiokvm_net_nic_set_queue(end.core, index, queue.core, 128, kick, notifier)
            assert code == 0
        self.give(self.room)
        return end

    async def _close(self) -> None:
        self.closes += 1
        self.irq.close()
        for kick in self.kicks:
            os.close(kick)

    def give(self, count: int) -> None:
        """Buffers for what the guest sends."""
        for _ in range(count):
            self.drivers[0].add([], [2048])
        os.eventfd_write(self.kicks[0], 1)

    def send(self, *frames: bytes, hdr: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0)) -> None:
        self.drivers[1].used()
        for data in frames:
            self.drivers[1].add([HDR.pack(*hdr), data], indirect=True)
        os.eventfd_write(self.kicks[1], 1)

    def received(self) -> list[Received]:
        found = take(self.drivers[0])
        self.give(len(found))
        return found

    async def receive(self) -> Received:
        """The next frame, which comes alone."""
        while not (found := self.received()):
            await self.irq.happened.wait()
        [one] = found
        return one


class FakeView:
    """A megabyte of a memory: each driver takes its buffers from one of its own."""

    def __init__(self, memory: Any, index: int) -> None:
        [region] = memory.regions
        self.regions = [region.__class__(region.gpa, (index + 1) * MIB, region.host_address, region.bytes)]
        self.read, self.write = memory.read, memory.write


def take(driver: SplitDriver) -> list[Received]:
    """Frames that were received, of one buffer or more."""
    found = []
    used = driver.used()
    while used:
        hdr = HDR.unpack(used[0].data[: HDR.size])
        count = max(hdr[-1], 1)
        found.append(Received(hdr, b"".join(each.data for each in used[:count])[HDR.size :]))
        del used[:count]
    return found


class Host:
    """A transport: what a device asks of it, with eventfds in the place of KVM's."""

    def __init__(self, nic: VmNic) -> None:
        self.loop = current_loop()
        self.device = nic.device
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in nic.device.queue_size_max]
        self.irq = Eventfd()
        self.word = ffi.new("uint32_t *")
        self.notifier = ffi.new("struct aiokvm_notifier *", {"irqfd": self.irq.fd, "status": self.word})
        self.interrupts = 0
        self.changes = 0
        self.reasons: list[str] = []
        self.news = anyio.Event()
        self.taken: set[int] = set()

    def interrupt(self, queue: int) -> None:
        self.interrupts += 1

    def config_changed(self) -> None:
        self.changes += 1
        self.tell()

    def needs_reset(self, reason: str) -> None:
        self.reasons.append(reason)
        self.tell()

    def tell(self) -> None:
        self.news.set()
        self.news = anyio.Event()

    def again(self, queue: int) -> None:
        self.loop.call_soon(partial(self.notify, queue))

    def take_queue(self, queue: int) -> int:
        self.taken.add(queue)
        return self.kicks[queue]

    def notify(self, queue: int) -> None:
        if queue in self.taken:
            os.eventfd_write(self.kicks[queue], 1)
            return
        try:
            self.device.notified(queue)
        except VirtqueueError as error:
            self.needs_reset(str(error))

    async def broken(self) -> str:
        while not self.reasons:
            await self.news.wait()
        return self.reasons[-1]

    def reset(self) -> None:
        assert self.device.reset() is None
        self.taken.clear()

    def close(self) -> None:
        self.irq.close()
        for fd in self.kicks:
            os.close(fd)


def nic(**options: Any) -> Nic:
    return Nic(options.pop("backend", None) or Cable(), mac=options.pop("mac", MAC), **options)


class Rig:
    """An adapter with a driver, a queue each, in guest RAM with no guest."""

    def __init__(self, nets: Nets, hub: EventHub, memory: GuestMemory) -> None:
        self.nets = nets
        self.nic = nets.all[0]
        self.device = self.nic.device
        self.events = hub.subscribe()
        self.memory = memory
        self.host = Host(self.nic)
        self.device._host = self.host  # type: ignore[assignment]
        self.queues = [Virtqueue(memory, size) for size in self.device.queue_size_max]
        self.start()

    @property
    def cable(self) -> Cable:
        assert isinstance(self.nic.backend, Cable)
        return self.nic.backend

    def start(self, features: int | None = None) -> None:
        device = self.device
        self.drivers = []
        for index, queue in enumerate(self.queues):
            view = FakeView(self.memory, index)
            driver = SplitDriver(view, queue.max_size, VIRTIO_F_INDIRECT_DESC, 0x1000 + index * MIB)
            driver.start(queue)
            self.drivers.append(driver)
        device.features = device.device_features if features is None else features
        device.queues = self.queues
        device.activate(device.features, self.queues)
        self.give(64, size=2048)

    def stop(self) -> None:
        self.host.reset()
        for queue in self.queues:
            queue.stop()

    def give(self, count: int, size: int = 2048, pair: int = 0) -> None:
        for _ in range(count):
            self.drivers[2 * pair].add([], [size])
        self.host.notify(2 * pair)

    def send(self, *frames: bytes, hdr: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0), pair: int = 0) -> None:
        driver = self.drivers[2 * pair + 1]
        driver.used()
        for data in frames:
            driver.add([HDR.pack(*hdr), data], indirect=True)
        self.host.notify(2 * pair + 1)

    def received(self, pair: int = 0) -> list[Received]:
        return take(self.drivers[2 * pair])

    async def receive(self, pair: int = 0) -> Received:
        """The next frame, which comes alone."""
        while not (found := self.received(pair)):
            await self.host.irq.happened.wait()
        [one] = found
        return one

    @property
    def mergeable(self) -> bool:
        return bool(self.device.features & VIRTIO_NET_F_MRG_RXBUF)

    def control(self, class_: int, command: int, data: bytes = b"") -> int:
        """The acknowledgement of a control command."""
        index = len(self.drivers) - 1
        driver = self.drivers[index]
        driver.add([bytes([class_, command]), data], [1], indirect=True)
        self.host.notify(index)
        [used] = driver.used()
        return used.data[0]


@asynccontextmanager
async def rig(*nets: Nic | NetBackend, memory: int = 48 * MIB) -> AsyncIterator[Rig]:
    ram = GuestMemory(memory)
    hub = EventHub()
    all_ = Nets(current_loop(), "test", hub, machine_logger("test"))
    with anyio.fail_after(LIMIT_S):
        async with AsyncExitStack() as undo:
            undo.callback(ram.close)
            await all_.open(nets, undo)
            made = Rig(all_, hub, ram)
            undo.callback(made.host.close)
            undo.callback(made.stop)
            yield made
            made.nets.stop()
        # What is in a cycle would keep the RAM mapped.
        made.device.queues = ()
        made.queues.clear()
