"""Virtqueues for devices that are written in Python: a thin layer over ``_core/vring.c``.

virtio 1.2, sections 2.6 to 2.8. A queue belongs to the thread of the event loop, or, by ``core``, to one
thread in C; never to both at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aiokvm._core import ffi, lib
from aiokvm.errors import VirtqueueError
from aiokvm.memory import core_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from aiokvm._core import Pointer
    from aiokvm.memory import RamRegion

MAX_SIZE = lib.AIOKVM_VRING_MAX_SIZE


class Memory(Protocol):
    """What a queue needs of guest RAM: `aiokvm.memory.GuestMemory`, or anything that has such ranges."""

    @property
    def regions(self) -> Sequence[RamRegion]: ...


class Virtqueue:
    """The device's side of one virtqueue, split or packed.

    ``max_size`` is the largest queue size in entries, 1 to 1024; ``size`` is the present one, 0 while the
    queue is not ``ready``. ``broken`` says what the driver has done wrong, and is empty otherwise: the queue
    then does nothing until it is started again. ``core`` is the ``struct aiokvm_vring *`` for those who
    move data in C; it lives as long as this object.
    """

    def __init__(self, memory: Memory, max_size: int) -> None:
        # Its ranges stay mapped while this object lives.
        self._regions = tuple(memory.regions)
        ranges = core_ranges(self._regions)
        vring = lib.aiokvm_vring_new(ranges, len(self._regions), max_size)
        if not vring:
            if not 1 <= max_size <= MAX_SIZE:
                raise ValueError(f"a queue has 1 to {MAX_SIZE} entries, not {max_size}")
            raise MemoryError(f"no memory for a queue of {max_size} entries")
        self.max_size = max_size
        self.size = 0
        self.core: Pointer = ffi.gc(vring, lib.aiokvm_vring_free)
        self._next = ffi.new("struct aiokvm_chain **")
        self._chains: set[Chain] = set()

    @property
    def ready(self) -> bool:
        """Whether the queue has been started and not been stopped since."""
        return self.size > 0

    @property
    def broken(self) -> str:
        """What is wrong with what the driver put into its rings; empty if nothing is."""
        error = lib.aiokvm_vring_error(self.core)
        return _words(error) if error else ""

    def start(self, size: int, desc: int, driver: int, device: int, features: int) -> None:
        """Use the rings at these guest physical addresses: descriptor, driver and device area.

        ``size`` is the queue size in entries, a power of two if split; ``features`` are the negotiated ones.
        Raises VirtqueueError, and the queue is not ready, if the size cannot be, an area is not aligned or
        not in RAM, or too many chains of earlier starts are still held in C.
        """
        self.stop()
        code = lib.aiokvm_vring_start(self.core, size, desc, driver, device, features)
        if code:
            raise VirtqueueError(_words(code))
        self.size = size

    def stop(self) -> None:
        """Touch the rings no more. Chains that are still out are void: see `Chain`."""
        self.size = 0
        lib.aiokvm_vring_stop(self.core)
        for chain in tuple(self._chains):
            chain.drop()

    def close(self) -> None:
        """Stop for good, and let go of the guest's RAM. Nobody uses ``core`` any more. Idempotent."""
        self.stop()
        self.max_size = 0
        self._regions = ()

    def pop(self) -> Chain | None:
        """The next chain that the driver has made available, None if there is none or the queue is not ready.

        After None the driver notifies when there is one, unless `disable_notify` was called. Raises
        VirtqueueError if the driver has done what it must not; from then on the queue is ``broken``.
        """
        code = lib.aiokvm_vring_pop(self.core, self._next)
        if code < 0:
            raise VirtqueueError(_words(code))
        if not code:
            return None
        chain = Chain(self, self._next[0])
        self._chains.add(chain)
        return chain

    def publish(self) -> bool:
        """Show the driver all chains that were pushed; whether it wants an interrupt for them."""
        return bool(lib.aiokvm_vring_publish(self.core))

    def enable_notify(self) -> bool:
        """Ask the driver to notify of new chains; whether some are there already, of which it will not."""
        return bool(lib.aiokvm_vring_enable_notify(self.core))

    def disable_notify(self) -> None:
        """Tell the driver that it need not notify."""
        lib.aiokvm_vring_disable_notify(self.core)

    def _views(self, iov: Pointer, first: int, count: int) -> list[memoryview]:
        """The guest's memory behind iovecs; views of its ranges, which keep them mapped."""
        views = []
        for i in range(first, first + count):
            address = int(ffi.cast("uintptr_t", iov[i].iov_base))
            for region in self._regions:
                offset = address - region.host_address
                if 0 <= offset < region.size:
                    views.append(region.bytes[offset : offset + iov[i].iov_len])
                    break
        return views


class Chain:
    """One buffer of the driver's: a part that the device reads, then a part that it writes.

    ``readable_bytes`` and ``writable_bytes`` are the parts' lengths in bytes; ``readable`` and ``writable``
    are their pieces, the guest's own memory with no copy: the guest may change it at any time, so a device
    reads each byte once. `read` and `write` go through them from the beginning on, and cost the same in
    however many pieces the driver has cut them.

    A chain is pushed once, in any order with others. A chain that was pushed or dropped, or whose queue was
    stopped, is void: nothing is read or written, and pushing it does nothing.
    """

    __slots__ = ("_core", "_queue", "_read", "readable_bytes", "writable_bytes", "written")

    def __init__(self, queue: Virtqueue, core: Pointer) -> None:
        self._queue = queue
        self._core: Pointer | None = core
        self.readable_bytes: int = core.readable_bytes
        self.writable_bytes: int = core.writable_bytes
        self.written = 0
        """Bytes that `write` has put into the writable part."""
        self._read = 0

    @property
    def void(self) -> bool:
        """Whether the chain was pushed or dropped, or its queue stopped."""
        return self._core is None

    @property
    def readable(self) -> list[memoryview]:
        """The pieces of the readable part, as many as the driver has descriptors for: up to 1024."""
        return self._queue._views(self._core.iov, 0, self._core.readable) if self._core else []

    @property
    def writable(self) -> list[memoryview]:
        """The pieces of the writable part, as many as the driver has descriptors for: up to 1024."""
        core = self._core
        return self._queue._views(core.iov, core.readable, core.writable) if core else []

    def read(self, n: int = -1) -> bytes:
        """The next ``n`` bytes of the readable part; all that are left if there are fewer, or ``n`` is -1.

        How many that is, up to 4 GiB, is the driver's choice: bound it.
        """
        return bytes(self.take(n))

    def take(self, n: int = -1) -> bytearray:
        """As `read`, without a copy of the copy."""
        if self._core is None:
            return bytearray()
        left = self.readable_bytes - self._read
        data = bytearray(left if n < 0 else min(n, left))
        lib.aiokvm_chain_read(self._core, self._read, ffi.from_buffer("uint8_t[]", data), len(data))
        self._read += len(data)
        return data

    def write(self, data: Buffer) -> int:
        """Put data next into the writable part; how many bytes fitted."""
        done = self.put(self.written, data)
        self.written += done
        return done

    def put(self, offset: int, data: Buffer) -> int:
        """Put data at ``offset`` of the writable part, whatever `write` does; how many bytes fitted."""
        if self._core is None:
            return 0
        with memoryview(data).cast("B") as view, ffi.from_buffer("uint8_t[]", view) as source:
            return lib.aiokvm_chain_write(self._core, offset, source, len(view))

    def push(self, written: int | None = None) -> None:
        """Complete the chain, of whose writable part the first ``written`` bytes were written.

        Default: as many as `write` has put there. The driver sees it after `Virtqueue.publish`.
        """
        core = self._leave()
        if core is not None:
            total = self.written if written is None else written
            lib.aiokvm_vring_push(self._queue.core, core, min(total, 0xFFFF_FFFF))

    def drop(self) -> None:
        """Let go of the chain without completing it: the driver does not get it back before it resets."""
        core = self._leave()
        if core is not None:
            lib.aiokvm_vring_drop(self._queue.core, core)

    def _leave(self) -> Pointer | None:
        core, self._core = self._core, None
        self._queue._chains.discard(self)
        return core


def _words(code: int) -> str:
    return ffi.string(lib.aiokvm_vring_strerror(code)).decode()
