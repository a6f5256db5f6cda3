"""A virtio device as its author sees it: what it offers, what it is told, and what it may ask for.

Virtio 1.2, section 2. A device is a synchronous state machine. It knows queues, features and its
configuration space; registers, addresses and interrupts are the transport's (:mod:`aiokvm.virtio.mmio`).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from aiokvm.errors import DeviceError
from aiokvm.virtio.constants import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from aiokvm.virtio.queue import Virtqueue


class Cancellable(Protocol):
    """Something under way that can be ended."""

    def cancel(self) -> None:
        """End it. Idempotent."""


class VirtioHost(Protocol):
    """What an attached device is given, as ``device.host``. All of it belongs to the machine's loop."""

    def interrupt(self, queue: int) -> None:
        """Tell the driver of used buffers in ``queue``, if `Virtqueue.publish` has said that it wants it."""

    def config_changed(self) -> None:
        """The configuration space has changed: a new config generation, and an interrupt (2.5)."""

    def needs_reset(self, reason: str) -> None:
        """The device cannot go on, and says so: DEVICE_NEEDS_RESET (2.1.2). Nothing is notified any more."""

    def again(self, queue: int) -> None:
        """Call `VirtioDevice.notified` for ``queue`` once more when the loop has looked at everything else.

        For a device that has served enough at once: a driver that keeps a queue full must not hold the loop.
        """

    def now_ns(self) -> int:
        """The loop's monotonic clock, in nanoseconds."""

    def timer(self, deadline_ns: int, callback: Callable[[], object], period_ns: int = 0) -> Cancellable:
        """Call back when `now_ns` has reached ``deadline_ns``; as `aiokvm.Device.timer`."""

    def spawn(self, work: Callable[[], Awaitable[None]], name: str) -> Cancellable:
        """Run a coroutine function beside the guest; what it raises is told as a failure of the device.

        A reset of the device calls `VirtioDevice.reset`, which may cancel it, and then waits for its end.
        """

    def take_queue(self, queue: int) -> int:
        """The eventfd that the driver's notifications of ``queue`` count up, for a data mover in C.

        From here on until the device is reset `VirtioDevice.notified` is not called for this queue.
        """

    @property
    def notifier(self) -> Any:
        """The ``struct aiokvm_notifier *`` by which a data mover in C interrupts the driver."""

    def shared_memory(self, shmid: int) -> memoryview:
        """The bytes of one of `VirtioDevice.shared_memory`, that the driver sees, too (2.10)."""


class VirtioRequest(Protocol):
    """Buffers from the driver: first a part that the device reads, then one that it writes; lengths in bytes.

    To be completed with `push`, in any order with others. After a reset of the device nothing is read or
    written any more, and completing it does nothing.
    """

    @property
    def readable_bytes(self) -> int:
        """How long the readable part is."""

    @property
    def writable_bytes(self) -> int:
        """How long the writable part is."""

    def read(self, n: int = -1) -> bytes:
        """The next ``n`` bytes of the readable part, or all the rest; the driver says how many: bound it."""

    def write(self, data: Buffer) -> int:
        """Put data next into the writable part; how many bytes fitted."""

    def push(self, written: int | None = None) -> None:
        """Complete it, and interrupt the driver if it wants that.

        ``written``: how many bytes of the writable part were; unless given, those that `write` has put there.
        """


class VirtioQueue(Protocol):
    """The requests of one queue, as they come: ``async for request in queue``; see `VirtioDevice.serve`."""

    index: int
    """Which queue of the device it is."""

    def __aiter__(self) -> AsyncIterator[VirtioRequest]:
        """Each request, once, until the device is reset."""


class VirtioDevice:
    """A virtio device: derive from it, and override what the device has.

    A driver that has come up calls `activate`, then there is `notified` whenever it has put buffers into a
    queue, until `reset`. What `read_config`, `write_config`, `activate` and `notified` raise is logged and
    emitted as `aiokvm.DeviceFailed`.
    """

    device_id: int
    """The device type, VIRTIO_ID_* (5)."""

    queue_size_max: tuple[int, ...] = ()
    """For each queue the most descriptors that it may have: a power of two, up to 1024."""

    device_features: int = 0
    """The features that the device offers, of its type's own bits: 0 to 23 and 50 to 63 (2.2)."""

    ring_features: int = (
        VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_RING_PACKED | VIRTIO_F_IN_ORDER
    )
    """What its queues may be; VIRTIO_F_VERSION_1 comes with it."""

    shared_memory: Mapping[int, int] = MappingProxyType({})
    """Shared memory regions (2.10): the size in bytes of each, a multiple of 4096, by its shmid."""

    config: bytearray
    """The configuration space, little-endian (2.5); call ``host.config_changed()`` after changing it."""

    # Set by the transport.
    features: int = 0
    """What was negotiated, from `activate` to `reset`."""
    queues: Sequence[Virtqueue] = ()
    """From `activate` to `reset`; a queue that the driver did not set up is not ``ready``."""

    _host: VirtioHost | None = None

    @property
    def host(self) -> VirtioHost:
        """The machine's side. Raises DeviceError unless the device is attached to a machine."""
        if self._host is None:
            raise DeviceError(f"{type(self).__name__} is not attached to a machine")
        return self._host

    def accept_features(self, features: int) -> bool:  # noqa: ARG002
        """Whether the device works with this subset of what was offered (2.2.2). Unless overridden: yes."""
        return True

    def read_config(self, offset: int, size: int) -> int:
        """What the driver reads: ``size`` bytes (1, 2 or 4) at ``offset``, a multiple of it.

        Unless overridden it is `config`, and ones beyond its end.
        """
        data = bytes(getattr(self, "config", b"")[offset : offset + size])
        return int.from_bytes(data.ljust(size, b"\xff"), "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver wrote ``value``, sized and aligned as in a read. Unless overridden it is ignored."""

    def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:
        """The driver is ready (DRIVER_OK) with these negotiated features; `features` and `queues` are set.

        `notified` follows for each queue that is ready, as the driver may have filled them before.
        """

    def notified(self, queue: int) -> None:
        """The driver says that there are buffers in ``queue``; maybe there are none, or more than one."""

    async def serve(self, queue: VirtioQueue) -> None:
        """Overridden, it is a task for each queue that is ready, from DRIVER_OK until the device is reset.

        ``async for request in queue`` gives the requests. It is cancelled by a reset; requests that it has
        taken and not completed are dropped then. With it, `notified` is not called.
        """

    def reset(self) -> Awaitable[None] | None:
        """Be as new. The driver waits until no buffer is touched any more (2.4).

        What the device still has in flight is waited for by what is returned; None: there is nothing. Chains
        that are completed meanwhile do not reach the driver. It may be called again before the wait is over,
        when the machine ends.
        """
        return None

    def stop_queue(self, queue: int) -> Awaitable[None] | None:  # noqa: ARG002
        """The driver takes back one queue (QueueReady is zero): as `reset`, for its buffers alone."""
        return None

    async def run(self) -> None:
        """A task beside the guest, from the machine's start to its end; the driver's resets do not end it."""

    def close(self) -> Awaitable[None] | None:
        """The machine is at its end, after a last `reset`: give back what the device holds."""
        return None
