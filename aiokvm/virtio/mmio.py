"""The register model of a device behind MMIO: virtio 1.2, section 4.2, version 2 of the registers.

It drives a `VirtioDevice` through its life: features, queues, DRIVER_OK, notifications, reset. Like all
models it knows neither a loop nor KVM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aiokvm.errors import ConfigError, VirtqueueError
from aiokvm.virtio.constants import (
    DEVICE_FEATURES,
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
)
from aiokvm.virtio.queue import MAX_SIZE, Virtqueue

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from aiokvm.virtio.device import VirtioDevice
    from aiokvm.virtio.queue import Memory

VIRTIO_MMIO_SIZE = 0x1000

# Control registers, 32 bits each (4.2.2), by the names of linux/virtio_mmio.h.
VIRTIO_MMIO_MAGIC_VALUE = 0x000
VIRTIO_MMIO_VERSION = 0x004
VIRTIO_MMIO_DEVICE_ID = 0x008
VIRTIO_MMIO_VENDOR_ID = 0x00C
VIRTIO_MMIO_DEVICE_FEATURES = 0x010
VIRTIO_MMIO_DEVICE_FEATURES_SEL = 0x014
VIRTIO_MMIO_DRIVER_FEATURES = 0x020
VIRTIO_MMIO_DRIVER_FEATURES_SEL = 0x024
VIRTIO_MMIO_QUEUE_SEL = 0x030
VIRTIO_MMIO_QUEUE_NUM_MAX = 0x034
VIRTIO_MMIO_QUEUE_NUM = 0x038
VIRTIO_MMIO_QUEUE_READY = 0x044
VIRTIO_MMIO_QUEUE_NOTIFY = 0x050
VIRTIO_MMIO_INTERRUPT_STATUS = 0x060
VIRTIO_MMIO_INTERRUPT_ACK = 0x064
VIRTIO_MMIO_STATUS = 0x070
VIRTIO_MMIO_QUEUE_DESC_LOW = 0x080
VIRTIO_MMIO_QUEUE_DESC_HIGH = 0x084
VIRTIO_MMIO_QUEUE_AVAIL_LOW = 0x090
VIRTIO_MMIO_QUEUE_AVAIL_HIGH = 0x094
VIRTIO_MMIO_QUEUE_USED_LOW = 0x0A0
VIRTIO_MMIO_QUEUE_USED_HIGH = 0x0A4
VIRTIO_MMIO_SHM_SEL = 0x0AC
VIRTIO_MMIO_SHM_LEN_LOW = 0x0B0
VIRTIO_MMIO_SHM_LEN_HIGH = 0x0B4
VIRTIO_MMIO_SHM_BASE_LOW = 0x0B8
VIRTIO_MMIO_SHM_BASE_HIGH = 0x0BC
VIRTIO_MMIO_CONFIG_GENERATION = 0x0FC
VIRTIO_MMIO_CONFIG = 0x100

VIRTIO_MMIO_INT_VRING = 1
VIRTIO_MMIO_INT_CONFIG = 2

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR_ID = int.from_bytes(b"AIOK", "little")

# What the transport and its queues can do. NOTIFICATION_DATA would put more than the index into QueueNotify,
# which an eventfd a queue cannot match.
_RING_FEATURES = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_RING_PACKED | VIRTIO_F_IN_ORDER
_DRIVER_STATUS = (
    VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED
)
_ONES = (1 << 64) - 1


class Interrupts(Protocol):
    """The device's interrupt and the word behind InterruptStatus, of bits VIRTIO_MMIO_INT_*."""

    def status(self) -> int:
        """The events that have not been acknowledged."""

    def notify(self, bits: int) -> None:
        """Set bits and interrupt the driver."""

    def acknowledge(self, bits: int) -> None:
        """Clear bits."""


class Calls(Protocol):
    """What the transport calls of a device, which may go through somebody who does more than the device."""

    def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:
        """`VirtioDevice.activate`."""

    def notified(self, queue: int) -> None:
        """`VirtioDevice.notified`."""

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        """`VirtioDevice.stop_queue`."""

    def reset(self) -> Awaitable[None] | None:
        """`VirtioDevice.reset`."""


class _Setup:
    """What the driver has written about a queue. A size of 0 is none that could be."""

    def __init__(self) -> None:
        self.size = 0
        self.ready = False
        # Descriptor, driver and device area, by the offsets of their registers.
        self.areas = {
            VIRTIO_MMIO_QUEUE_DESC_LOW: 0,
            VIRTIO_MMIO_QUEUE_AVAIL_LOW: 0,
            VIRTIO_MMIO_QUEUE_USED_LOW: 0,
        }


class VirtioMmio:
    """The registers of ``device``, whose queues lie in ``memory``.

    ``shared`` holds (gpa, size in bytes) of its shared memory regions by shmid. ``on_needs_reset`` is told
    why DEVICE_NEEDS_RESET was set. ``calls`` takes the place of the device in what `Calls` lists.

    Raises ConfigError for queues that cannot be.

    ``dropped_notifies`` counts notifications of queues that are not there or not in use.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: Memory,
        interrupts: Interrupts,
        *,
        shared: Mapping[int, tuple[int, int]] | None = None,
        on_needs_reset: Callable[[str], None] = lambda _: None,
        calls: Calls | None = None,
    ) -> None:
        for size in device.queue_size_max:
            if not 0 < size <= MAX_SIZE or size & (size - 1):
                raise ConfigError(
                    f"{type(device).__name__} has a queue of {size}: use a power of two, up to {MAX_SIZE}"
                )
        self.device = device
        self.queues = tuple(Virtqueue(memory, size) for size in device.queue_size_max)
        self.features = (
            VIRTIO_F_VERSION_1
            | device.device_features & DEVICE_FEATURES
            | device.ring_features & _RING_FEATURES
        )
        self.status = 0
        self.dropped_notifies = 0
        self.config_generation = 0
        self._interrupts = interrupts
        self._shared = shared or {}
        self._on_needs_reset = on_needs_reset
        self._calls: Calls = calls or device
        # A reset has begun, and buffers may still be in use.
        self._draining = False
        self._resets = 0
        self._clear()

    def _clear(self) -> None:
        self.status = 0
        self._driver_features = 0
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._queue_sel = 0
        self._shm_sel = 0
        self._setups = tuple(_Setup() for _ in self.queues)

    @property
    def active(self) -> bool:
        """Whether driver and device may use the queues."""
        return (
            self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET)
            == VIRTIO_CONFIG_S_DRIVER_OK
            and not self._draining
        )

    # The device's side.

    def interrupt(self) -> None:
        """Used buffers: `VirtioHost.interrupt`."""
        if self.active:
            self._interrupts.notify(VIRTIO_MMIO_INT_VRING)

    def config_changed(self) -> None:
        """`VirtioHost.config_changed`."""
        self.config_generation = (self.config_generation + 1) & 0xFFFF_FFFF
        if self.active:
            self._interrupts.notify(VIRTIO_MMIO_INT_CONFIG)

    def needs_reset(self, reason: str) -> None:
        """`VirtioHost.needs_reset`; nothing happens if the driver knows already, or resets the device."""
        if self.status & VIRTIO_CONFIG_S_NEEDS_RESET or self._draining:
            return
        tell = self.active
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET
        if tell:
            self._interrupts.notify(VIRTIO_MMIO_INT_CONFIG)
        self._on_needs_reset(reason)

    # The driver's side.

    def notify(self, queue: int) -> None:
        """The driver has written to QueueNotify."""
        if not self.active or queue >= len(self.queues) or not self.queues[queue].ready:
            self.dropped_notifies += 1
            return
        try:
            self._calls.notified(queue)
        except VirtqueueError as error:
            self.needs_reset(f"queue {queue}: {error}")

    def read(self, offset: int, size: int) -> int:
        """A register, or configuration space; zero where a register cannot be read, or not so."""
        if offset >= VIRTIO_MMIO_CONFIG:
            if size not in (1, 2, 4) or offset % size:
                return (1 << 8 * size) - 1
            return self.device.read_config(offset - VIRTIO_MMIO_CONFIG, size)
        if size != 4 or offset % 4:
            return 0
        return self._read(offset) & 0xFFFF_FFFF

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:
        """A register, or configuration space; ignored where nothing can be written, or not so.

        What is returned has still to be awaited before the access is over: buffers are in use.
        """
        if offset >= VIRTIO_MMIO_CONFIG:
            if size in (1, 2, 4) and offset % size == 0:
                self.device.write_config(offset - VIRTIO_MMIO_CONFIG, size, value)
        elif size == 4 and offset % 4 == 0:
            return self._write(offset, value)
        return None

    def reset(self) -> Awaitable[None] | None:
        """The driver's reset, or the machine's (2.4); as `write`, what is returned has to be awaited."""
        self._draining = True
        self._resets += 1
        done = self._calls.reset()
        if done is None:
            self._finish_reset()
            return None
        return self._drain(done, self._finish_reset)

    async def _drain(self, done: Awaitable[None], finish: Callable[[], None]) -> None:
        """Cancelled, it has still to be done: the machine's end resets once more."""
        resets = self._resets
        failure: Exception | None = None
        try:
            await done
        except Exception as error:
            failure = error
        # Another vCPU may have reset it meanwhile: then its reset tells when that is over.
        if resets == self._resets:
            finish()
        if failure is not None:
            raise failure

    def _finish_reset(self) -> None:
        for queue in self.queues:
            queue.stop()
        self.device.features, self.device.queues = 0, ()
        self._clear()
        self._interrupts.acknowledge(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG)
        self._draining = False

    def close(self) -> None:
        """The machine is gone, and its memory unless that is in use: the device could not be reset then."""
        if not self._draining:
            for queue in self.queues:
                queue.close()
        self.queues = ()
        self._clear()

    def _read(self, offset: int) -> int:
        if offset == VIRTIO_MMIO_INTERRUPT_STATUS:
            return self._interrupts.status()
        if offset == VIRTIO_MMIO_STATUS:
            return self.status
        if offset == VIRTIO_MMIO_DEVICE_FEATURES:
            return self.features >> 32 * self._device_features_sel if self._device_features_sel < 2 else 0
        if offset in (VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY):
            setup = self._selected()
            if setup is None:
                return 0
            return setup.ready if offset == VIRTIO_MMIO_QUEUE_READY else self.queues[self._queue_sel].max_size
        if VIRTIO_MMIO_SHM_LEN_LOW <= offset <= VIRTIO_MMIO_SHM_BASE_HIGH:
            base, length = self._shared.get(self._shm_sel, (_ONES, _ONES))
            value = base if offset >= VIRTIO_MMIO_SHM_BASE_LOW else length
            return value >> 32 if offset & 4 else value
        return {
            VIRTIO_MMIO_MAGIC_VALUE: MAGIC,
            VIRTIO_MMIO_VERSION: VERSION,
            VIRTIO_MMIO_DEVICE_ID: self.device.device_id,
            VIRTIO_MMIO_VENDOR_ID: VENDOR_ID,
            VIRTIO_MMIO_CONFIG_GENERATION: self.config_generation,
        }.get(offset, 0)

    def _write(self, offset: int, value: int) -> Awaitable[None] | None:
        if offset == VIRTIO_MMIO_QUEUE_NOTIFY:
            self.notify(value)
        elif offset == VIRTIO_MMIO_INTERRUPT_ACK:
            self._interrupts.acknowledge(value)
        elif offset == VIRTIO_MMIO_STATUS:
            return self._write_status(value)
        elif offset == VIRTIO_MMIO_DEVICE_FEATURES_SEL:
            self._device_features_sel = value
        elif offset == VIRTIO_MMIO_DRIVER_FEATURES_SEL:
            self._driver_features_sel = value
        elif offset == VIRTIO_MMIO_DRIVER_FEATURES:
            self._write_driver_features(value)
        elif offset == VIRTIO_MMIO_QUEUE_SEL:
            self._queue_sel = value
        elif offset == VIRTIO_MMIO_SHM_SEL:
            self._shm_sel = value
        elif (setup := self._selected()) is not None:
            return self._write_queue(setup, offset, value)
        return None

    def _selected(self) -> _Setup | None:
        return self._setups[self._queue_sel] if self._queue_sel < len(self.queues) else None

    def _write_driver_features(self, value: int) -> None:
        # After FEATURES_OK they stand until the device is reset (2.2).
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK:
            return
        # Words that do not exist are one more, of which nothing is offered.
        shift = 32 * min(self._driver_features_sel, 2)
        self._driver_features = self._driver_features & ~(0xFFFF_FFFF << shift) | value << shift

    def _write_status(self, value: int) -> Awaitable[None] | None:
        if value == 0:
            return self.reset()
        # Bits are only ever set; a driver that clears some has not reset the device.
        new = value & _DRIVER_STATUS & ~self.status
        if self._draining:
            return None
        if new & VIRTIO_CONFIG_S_FEATURES_OK and not self._features_fit():
            new &= ~VIRTIO_CONFIG_S_FEATURES_OK
        if not (self.status | new) & VIRTIO_CONFIG_S_FEATURES_OK:
            new &= ~VIRTIO_CONFIG_S_DRIVER_OK
        self.status |= new
        if new & VIRTIO_CONFIG_S_DRIVER_OK:
            self._activate()
        return None

    def _features_fit(self) -> bool:
        accepted = self._driver_features
        if accepted & ~self.features or not accepted & VIRTIO_F_VERSION_1:
            return False
        return self.device.accept_features(accepted)

    def _write_queue(self, setup: _Setup, offset: int, value: int) -> Awaitable[None] | None:
        if offset == VIRTIO_MMIO_QUEUE_READY:
            if not value & 1:
                return self._stop_queue(setup)
            # Queues are set up before DRIVER_OK (3.1.1).
            if setup.size and not self._in_use():
                setup.ready = True
        elif setup.ready or self._in_use():
            return None
        elif offset == VIRTIO_MMIO_QUEUE_NUM:
            setup.size = value if self._size_fits(value) else 0
        elif offset & ~4 in setup.areas:
            shift = 32 if offset & 4 else 0
            area = setup.areas[offset & ~4]
            setup.areas[offset & ~4] = area & ~(0xFFFF_FFFF << shift) | value << shift
        return None

    def _in_use(self) -> bool:
        return self._draining or bool(self.status & VIRTIO_CONFIG_S_DRIVER_OK)

    def _size_fits(self, size: int) -> bool:
        packed = self._driver_features & VIRTIO_F_RING_PACKED
        return 0 < size <= self.queues[self._queue_sel].max_size and bool(packed or size & (size - 1) == 0)

    def _stop_queue(self, setup: _Setup) -> Awaitable[None] | None:
        """The driver takes a queue back: once QueueReady reads zero, nothing of it is touched (4.2.2.1)."""
        index = self._setups.index(setup)
        if self._draining or not self.queues[index].ready:
            setup.ready = self._draining and setup.ready
            return None
        done = self._calls.stop_queue(index)
        if done is None:
            self._finish_stop(index)
            return None
        return self._drain(done, lambda: self._finish_stop(index))

    def _finish_stop(self, index: int) -> None:
        self.queues[index].stop()
        self._setups[index].ready = False

    def _activate(self) -> None:
        features = self._driver_features
        try:
            for queue, setup in zip(self.queues, self._setups, strict=True):
                if setup.ready:
                    desc, driver, device = setup.areas.values()
                    queue.start(setup.size, desc, driver, device, features)
            self.device.features, self.device.queues = features, self.queues
            self._calls.activate(features, self.queues)
        except VirtqueueError as error:
            self.needs_reset(str(error))
            return
        except Exception as error:
            self.needs_reset(f"it cannot be activated: {error!r}")
            raise
        # What the driver has put there before DRIVER_OK it may have notified of too early. Only the first is
        # served at once, so that full queues do not add up to one long write.
        ready = [index for index, queue in enumerate(self.queues) if queue.ready]
        later = self.device._host.again if self.device._host else self.notify
        for count, index in enumerate(ready):
            if self.active:
                (later if count else self.notify)(index)
