"""A disk of a machine with drivers for its queues, in guest RAM with no guest and no KVM."""

from __future__ import annotations

import os
import struct
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from aiokvm._core import ffi
from aiokvm.aio import current_loop
from aiokvm.block import BlockBackend, Raw
from aiokvm.errors import VirtqueueError
from aiokvm.machine.disks import Disks, VmDisk
from aiokvm.machine.events import EventHub
from aiokvm.machine.log import machine_logger
from aiokvm.memory import GuestMemory
from aiokvm.virtio.queue import Virtqueue
from tests.virtio.driver import VIRTIO_F_INDIRECT_DESC, SplitDriver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from aiokvm import Disk

MIB = 1 << 20
SECTORS = MIB // 512
LIMIT_S = 120.0


class Looped(Raw):
    """A raw disk that is served by coroutines, as any other backend is."""


def backend(engine: str, path: Path, **options: Any) -> Raw:
    if engine == "loop":
        return Looped(path, **options)
    return Raw(path, engine=engine, **options)


class Host:
    """A transport: what a device asks of it, with eventfds in the place of KVM's."""

    def __init__(self, disk: VmDisk) -> None:
        self.loop = current_loop()
        self.device = disk.device
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in disk.device.queue_size_max]
        self.irq = os.eventfd(0, os.EFD_NONBLOCK)
        self.word = ffi.new("uint32_t *")
        self.notifier = ffi.new("struct aiokvm_notifier *", {"irqfd": self.irq, "status": self.word})
        self.interrupts = 0
        self.interrupted = anyio.Event()
        self.watch = self.loop.watch(self.irq, self.on_irq)
        self.changes = 0
        self.reasons: list[str] = []
        self.tasks: set[Any] = set()
        self.taken: set[int] = set()

    def interrupt(self, queue: int) -> None:
        self.interrupts += 1
        self.interrupted.set()

    def on_irq(self) -> None:
        """Data that moves in C raises it by itself."""
        os.eventfd_read(self.irq)
        self.interrupted.set()

    async def next_interrupt(self) -> None:
        """There has been one since the last call."""
        await self.interrupted.wait()
        self.interrupted = anyio.Event()

    def config_changed(self) -> None:
        self.changes += 1

    def needs_reset(self, reason: str) -> None:
        self.reasons.append(reason)

    def again(self, queue: int) -> None:
        self.loop.call_soon(partial(self.notify, queue))

    def spawn(self, work: Callable[[], Awaitable[None]], name: str) -> Any:
        task = self.loop.spawn(work, name)
        self.tasks.add(task)
        return task

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

    async def reset(self) -> None:
        done = self.device.reset()
        if done is not None:
            await done
        while self.tasks:
            await self.tasks.pop().wait()

    def close(self) -> None:
        self.watch.cancel()
        for fd in (*self.kicks, self.irq):
            os.close(fd)


class Rig:
    """A disk with a driver, a queue each, in guest RAM with no guest."""

    def __init__(self, disks: Disks, hub: EventHub, memory: GuestMemory) -> None:
        self.disks = disks
        self.disk = disks.all[0]
        self.events = hub.subscribe()
        self.memory = memory
        self.host = Host(self.disk)
        self.disk.device._host = self.host  # type: ignore[assignment]
        self.queues = [Virtqueue(memory, size) for size in self.disk.device.queue_size_max]
        self.pauses: list[int] = []
        self.start()

    def start(self, features: int | None = None) -> None:
        device = self.disk.device
        self.drivers = []
        for index, queue in enumerate(self.queues):
            base = 0x1000 + (index << 22)
            driver = SplitDriver(self.memory, queue.max_size, VIRTIO_F_INDIRECT_DESC, base)
            driver.start(queue)
            self.drivers.append(driver)
        device.features = device.device_features if features is None else features
        device.queues = self.queues
        device.activate(device.features, self.queues)

    async def reset(self) -> None:
        await self.host.reset()
        for queue in self.queues:
            queue.stop()

    def submit(self, type_: int, sector: int, *parts: bytes, room: int = 0, queue: int = 0) -> int:
        writable = [room, 1] if room else [1]
        head = struct.pack("<IIQ", type_, 0, sector)
        return self.drivers[queue].add([head, *parts], writable, indirect=True)

    async def request(
        self, type_: int, sector: int = 0, *parts: bytes, room: int = 0, queue: int = 0
    ) -> tuple[int, bytes]:
        """Its status, and what came before it."""
        token = self.submit(type_, sector, *parts, room=room, queue=queue)
        buffer = next(b for b in self.drivers[queue].buffers.values() if b.token == token)
        status = buffer.writable[-1].addr
        self.host.notify(queue)
        used = await self.used(queue)
        assert used.token == token
        return self.memory.read(status, 1)[0], used.data[:-1]

    async def used(self, queue: int = 0) -> Any:
        while not (used := self.drivers[queue].used()):
            await self.host.next_interrupt()
        [one] = used
        return one


@asynccontextmanager
async def rig(*disks: Disk | BlockBackend, memory: int = 16 * MIB) -> AsyncIterator[Rig]:
    ram = GuestMemory(memory)
    hub = EventHub()
    pauses: list[int] = []

    async def pause() -> None:
        pauses.append(1)

    all_ = Disks(current_loop(), "test", hub, machine_logger("test"), pause)
    with anyio.fail_after(LIMIT_S):
        async with AsyncExitStack() as undo:
            undo.callback(ram.close)
            await all_.open(disks, undo)
            made = Rig(all_, hub, ram)
            made.pauses = pauses
            undo.callback(made.host.close)
            undo.push_async_callback(made.host.reset)
            yield made
        # What is in a cycle would keep the RAM mapped.
        made.disk.device.queues = ()
        made.queues.clear()
