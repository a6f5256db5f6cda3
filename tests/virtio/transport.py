"""A transport's driver for tests: registers, and interrupts that are recorded."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from aiokvm.virtio import mmio
from aiokvm.virtio.constants import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
)
from aiokvm.virtio.device import VirtioDevice
from tests.virtio.driver import FakeDriver, FakeMemory, PackedDriver, SplitDriver

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from aiokvm.virtio.queue import Virtqueue
    from tests.holdups import Step

STARTED = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER
ALIVE = STARTED | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK
RANGE_BYTES = 1 << 20


class RecordingDevice(VirtioDevice):
    """Two queues, sixteen bytes of configuration space, and all calls in order."""

    device_id = 42
    queue_size_max: tuple[int, ...] = (16, 8)
    device_features = 1 << 5 | 1 << 50

    def __init__(self) -> None:
        self.config = bytearray(range(16))
        self.calls: list[tuple[Any, ...]] = []
        self.drains: list[Awaitable[None]] = []

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.calls.append(("write_config", offset, size, value))

    def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:
        assert self.features == features
        assert self.queues is queues
        self.calls.append(("activate", features, [queue.ready for queue in queues]))

    def notified(self, queue: int) -> None:
        self.calls.append(("notified", queue))

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        self.calls.append(("stop_queue", queue))
        return self.drains.pop(0) if self.drains else None

    def reset(self) -> Awaitable[None] | None:
        self.calls.append(("reset",))
        return self.drains.pop(0) if self.drains else None


class FakeInterrupts:
    def __init__(self) -> None:
        self.word = 0
        self.raised: list[int] = []

    def status(self) -> int:
        return self.word

    def notify(self, bits: int) -> None:
        self.word |= bits
        self.raised.append(bits)

    def acknowledge(self, bits: int) -> None:
        self.word &= ~bits


class Transport:
    """A device behind registers, and a driver's hands on them."""

    step: Step = nullcontext
    """An access is a callback of the loop, and measured (conftest.py)."""

    def __init__(self, device: VirtioDevice, **more: Any) -> None:
        count = max(1, len(device.queue_size_max))
        self.memory = FakeMemory(*((index * RANGE_BYTES, RANGE_BYTES) for index in range(count)))
        self.device = device
        self.interrupts = FakeInterrupts()
        self.reasons: list[str] = []
        self.registers = mmio.VirtioMmio(
            device, self.memory, self.interrupts, on_needs_reset=self.reasons.append, **more
        )

    def read(self, register: int) -> int:
        return self.registers.read(register, 4)

    def write(self, register: int, value: int) -> None:
        with self.step():
            done = self.registers.write(register, 4, value)
        assert done is None

    @property
    def status(self) -> int:
        return self.read(mmio.VIRTIO_MMIO_STATUS)

    @status.setter
    def status(self, value: int) -> None:
        self.write(mmio.VIRTIO_MMIO_STATUS, value)

    def offered(self) -> int:
        words = []
        for select in range(2):
            self.write(mmio.VIRTIO_MMIO_DEVICE_FEATURES_SEL, select)
            words.append(self.read(mmio.VIRTIO_MMIO_DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def accept(self, features: int) -> None:
        for select in range(2):
            self.write(mmio.VIRTIO_MMIO_DRIVER_FEATURES_SEL, select)
            self.write(mmio.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * select & 0xFFFF_FFFF)

    def negotiate(self, features: int = VIRTIO_F_VERSION_1) -> bool:
        """Steps 1 to 6 of 3.1.1; whether the device has set FEATURES_OK."""
        for step in (0, VIRTIO_CONFIG_S_ACKNOWLEDGE, STARTED):
            self.status = step
        self.accept(features)
        self.status = STARTED | VIRTIO_CONFIG_S_FEATURES_OK
        return bool(self.status & VIRTIO_CONFIG_S_FEATURES_OK)

    def set_up(self, queue: int, driver: FakeDriver) -> None:
        self.write(mmio.VIRTIO_MMIO_QUEUE_SEL, queue)
        self.write(mmio.VIRTIO_MMIO_QUEUE_NUM, driver.size)
        for register, area in (
            (mmio.VIRTIO_MMIO_QUEUE_DESC_LOW, driver.desc),
            (mmio.VIRTIO_MMIO_QUEUE_AVAIL_LOW, driver.driver),
            (mmio.VIRTIO_MMIO_QUEUE_USED_LOW, driver.device),
        ):
            self.write(register, area & 0xFFFF_FFFF)
            self.write(register + 4, area >> 32)
        self.write(mmio.VIRTIO_MMIO_QUEUE_READY, 1)

    def ready(self, queue: int) -> int:
        self.write(mmio.VIRTIO_MMIO_QUEUE_SEL, queue)
        return self.read(mmio.VIRTIO_MMIO_QUEUE_READY)

    def start(self, features: int = VIRTIO_F_VERSION_1, size: int = 8) -> list[FakeDriver]:
        """All of 3.1.1."""
        assert self.negotiate(features)
        layout: Any = PackedDriver if features & VIRTIO_F_RING_PACKED else SplitDriver
        drivers = []
        for index in range(len(self.device.queue_size_max)):
            driver = layout(self.memory, size, features, index * RANGE_BYTES + 0x1000)
            self.set_up(index, driver)
            drivers.append(driver)
        self.status = ALIVE
        return drivers
