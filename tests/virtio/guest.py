"""A whole device with a driver for each of its queues, and a host that records: no transport, no loop.

guest = DeviceGuest(Rng(random))
token = guest.drivers[0].add([], [64])
guest.notify(0)
[used] = guest.drivers[0].used()
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiokvm.virtio.constants import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED
from aiokvm.virtio.queue import Virtqueue
from tests.virtio.driver import FakeMemory, PackedDriver, SplitDriver

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokvm.virtio.device import VirtioDevice
    from tests.holdups import Step
    from tests.virtio.driver import Memory

# Each queue's rings and buffers have a range of RAM of their own.
RANGE_BYTES = 1 << 20

LAYOUTS = [0, VIRTIO_F_EVENT_IDX, VIRTIO_F_RING_PACKED, VIRTIO_F_RING_PACKED | VIRTIO_F_EVENT_IDX]


@dataclass
class FakeTimer:
    deadline_ns: int
    callback: Callable[[], object]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeHost:
    """`aiokvm.virtio.device.VirtioHost`, as far as these devices need it."""

    notifier = None

    def __init__(self) -> None:
        self.interrupts: list[int] = []
        self.config_changes = 0
        self.reasons: list[str] = []
        self.agains: list[int] = []
        self.time_ns = 0
        self.timers: list[FakeTimer] = []

    def interrupt(self, queue: int) -> None:
        self.interrupts.append(queue)

    def config_changed(self) -> None:
        self.config_changes += 1

    def needs_reset(self, reason: str) -> None:
        self.reasons.append(reason)

    def again(self, queue: int) -> None:
        if queue not in self.agains:
            self.agains.append(queue)

    def now_ns(self) -> int:
        return self.time_ns

    def timer(self, deadline_ns: int, callback: Callable[[], object], period_ns: int = 0) -> FakeTimer:
        self.timers.append(FakeTimer(deadline_ns, callback))
        return self.timers[-1]

    def spawn(self, work: Callable[[], Awaitable[None]], name: str) -> FakeTimer:
        raise NotImplementedError

    def take_queue(self, queue: int) -> int:
        raise NotImplementedError

    def shared_memory(self, shmid: int) -> memoryview:
        raise NotImplementedError

    def advance(self, ns: int) -> None:
        """Let time go on, and timers fall due."""
        end_ns = self.time_ns + ns
        while due := [t for t in self.timers if not t.cancelled and t.deadline_ns <= end_ns]:
            timer = min(due, key=lambda t: t.deadline_ns)
            self.timers.remove(timer)
            self.time_ns = max(self.time_ns, timer.deadline_ns)
            timer.callback()
        self.time_ns = end_ns


class DeviceGuest:
    """The drivers of a device, which is active unless ``start`` is False.

    ``features`` are negotiated beside all that the device offers but ``without``; those of the ring among
    them. ``missing`` queues are not set up.
    """

    step: Step = nullcontext
    """What a callback of the loop does is done in one of these, which is measured (conftest.py)."""

    def __init__(
        self,
        device: VirtioDevice,
        features: int = 0,
        *,
        memory: Memory | None = None,
        size: int = 8,
        without: int = 0,
        missing: tuple[int, ...] = (),
        start: bool = True,
    ) -> None:
        self.device = device
        self.features = features | device.device_features & ~without | VIRTIO_F_INDIRECT_DESC
        self.size = size
        self.missing = missing
        count = len(device.queue_size_max)
        self.memory = memory or ram(count)
        self.host = FakeHost()
        self.queues = [Virtqueue(self.memory, most) for most in device.queue_size_max]
        device._host = self.host
        if start:
            self.start()

    def start(self) -> None:
        """Drivers come up, with new rings."""
        driver: Any = PackedDriver if self.features & VIRTIO_F_RING_PACKED else SplitDriver
        self.drivers = [
            driver(self.memory, self.size, self.features, index * RANGE_BYTES + 0x1000)
            for index in range(len(self.queues))
        ]
        for index, queue in enumerate(self.queues):
            if index not in self.missing:
                self.drivers[index].start(queue)
        self.device.features, self.device.queues = self.features, self.queues
        self.device.activate(self.features, self.queues)
        for index, queue in enumerate(self.queues):
            if queue.ready:
                self.device.notified(index)

    def reset(self) -> None:
        """What a transport does when the driver resets the device."""
        assert self.device.reset() is None
        for queue in self.queues:
            queue.stop()
        self.device.features, self.device.queues = 0, ()

    def notify(self, queue: int) -> None:
        """Ring for a queue if its driver would."""
        if self.drivers[queue].notifies():
            with self.step():
                self.device.notified(queue)

    def again(self) -> bool:
        """A turn of the loop: whether the device had asked for it."""
        agains, self.host.agains = self.host.agains, []
        for queue in agains:
            with self.step():
                self.device.notified(queue)
        return bool(agains)


def ram(count: int) -> FakeMemory:
    """RAM for the rings of so many queues."""
    return FakeMemory(*((index * RANGE_BYTES, RANGE_BYTES) for index in range(count)))
