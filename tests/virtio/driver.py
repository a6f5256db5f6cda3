"""The driver's side of a virtqueue, for tests: split and packed, well-behaved unless it is told otherwise.

    memory = FakeMemory((0, 1 << 20))
    driver = SplitDriver(memory, size=8, features=VIRTIO_F_INDIRECT_DESC)
    queue = Virtqueue(memory, 8)
    driver.start(queue)
    token = driver.add([b"request"], [512])        # one readable buffer, one of 512 writable bytes
    ...                                            # the device: queue.pop(), chain.push(), queue.publish()
    [used] = driver.used()                         # used.token == token, used.data is what was written

A driver takes its rings and buffers from ``memory`` by itself, from the address ``base`` on. Everything that
it knows is in its own attributes: a test that wants to be hostile writes to ``memory``, or calls `expose`
with descriptors of its own.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aiokvm._core import ffi
from aiokvm.memory import RamRegion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokvm.virtio.queue import Virtqueue

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4
VIRTQ_DESC_F_AVAIL = 1 << 7
VIRTQ_DESC_F_USED = 1 << 15
VIRTIO_F_INDIRECT_DESC = 1 << 28
VIRTIO_F_EVENT_IDX = 1 << 29
VIRTIO_F_VERSION_1 = 1 << 32
VIRTIO_F_RING_PACKED = 1 << 34
VIRTIO_F_IN_ORDER = 1 << 35

DESC_SIZE = 16
ENABLE, DISABLE, DESC = 0, 1, 2  # RING_EVENT_FLAGS_*


class Memory(Protocol):
    @property
    def regions(self) -> Sequence[RamRegion]: ...
    def read(self, gpa: int, size: int) -> bytes: ...
    def write(self, gpa: int, data: bytes) -> None: ...


class FakeMemory:
    """Guest RAM in bytearrays: ranges of (gpa, size), page-aligned for the host as real ones are."""

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self.regions = tuple(self._range(gpa, size) for gpa, size in ranges)

    @staticmethod
    def _range(gpa: int, size: int) -> RamRegion:
        whole = bytearray(size + 4096)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer("char[]", whole)))
        pad = -address % 4096
        return RamRegion(gpa, size, address + pad, memoryview(whole)[pad : pad + size])

    def view(self, gpa: int, size: int) -> memoryview:
        for region in self.regions:
            offset = gpa - region.gpa
            if offset >= 0 and offset + size <= region.size:
                return region.bytes[offset : offset + size]
        raise ValueError(f"{size:#x} bytes at {gpa:#x} are not in RAM")

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        self.view(gpa, len(data))[:] = data


@dataclass(frozen=True)
class Descriptor:
    """What a descriptor says, whatever the layout; the next one and the id are the ring's."""

    addr: int
    len: int
    flags: int = 0


@dataclass(frozen=True)
class Used:
    """A completion: the token of `add`, how many bytes the device says it has written, and these."""

    token: int
    written: int
    data: bytes


@dataclass
class Buffer:
    """What a driver remembers of a chain that it has made available."""

    id: int
    token: int
    slots: tuple[int, ...]  # of the descriptor table
    writable: list[Descriptor]
    places: list[tuple[int, int]]  # allocated memory: gpa, size


class QueueFullError(Exception):
    """There are not enough free descriptors."""


class Allocator:
    """Guest memory, first fit."""

    def __init__(self, start: int, end: int) -> None:
        self._free = [(start, end - start)]

    def take(self, size: int, align: int = 16) -> int:
        for i, (gpa, room) in enumerate(self._free):
            lead = -gpa % align
            if lead + size <= room:
                rest = [(gpa, lead), (gpa + lead + size, room - lead - size)]
                self._free[i : i + 1] = [piece for piece in rest if piece[1]]
                return gpa + lead
        raise MemoryError(f"the driver has no {size} bytes left")

    def give(self, gpa: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (gpa, size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged


class FakeDriver(ABC):
    """What both layouts have in common.

    ``desc``, ``driver`` and ``device`` are the guest physical addresses of the areas; ``features`` what was
    negotiated. Rings and buffers are allocated from ``base`` to the end of its range.
    """

    def __init__(self, memory: Memory, size: int, features: int = 0, base: int = 0x1000) -> None:
        self.memory = memory
        self.size = size
        self.features = features | VIRTIO_F_VERSION_1
        [end] = [r.gpa + r.size for r in memory.regions if r.gpa <= base < r.gpa + r.size]
        self.allocator = Allocator(base, end)
        self.desc = self._area(size * DESC_SIZE, 16)
        self.buffers: dict[int, Buffer] = {}  # by the id that the device sees
        self._tokens = 0

    @property
    def event_idx(self) -> bool:
        return bool(self.features & VIRTIO_F_EVENT_IDX)

    @property
    def in_order(self) -> bool:
        return bool(self.features & VIRTIO_F_IN_ORDER)

    def start(self, queue: Virtqueue) -> None:
        """Start a queue with this driver's rings, as a transport does it."""
        queue.start(self.size, self.desc, self.driver, self.device, self.features)

    def add(
        self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), indirect: bool = False
    ) -> int:
        """Make one chain available: buffers with these bytes, then buffers of these sizes. Gives a token.

        ``indirect`` puts the descriptors into a table of their own. Raises QueueFullError.
        """
        if (1 if indirect else len(readable) + len(writable)) > self.free:
            raise QueueFullError
        places: list[tuple[int, int]] = []
        descriptors = []
        for data in readable:
            descriptors.append(Descriptor(self._allocate(len(data), places), len(data)))
            self.memory.write(descriptors[-1].addr, data)
        sink = [Descriptor(self._allocate(n, places), n, VIRTQ_DESC_F_WRITE) for n in writable]
        descriptors += sink
        if indirect:
            table = self.table(descriptors)
            gpa = self._allocate(len(table), places)
            self.memory.write(gpa, table)
            descriptors = [Descriptor(gpa, len(table), VIRTQ_DESC_F_INDIRECT)]
        id_, slots = self.expose(descriptors)
        self._tokens += 1
        self.buffers[id_] = Buffer(id_, self._tokens, slots, sink, places)
        return self._tokens

    def used(self) -> list[Used]:
        """What the device has completed since it was last asked, in its order. Their memory is free again."""
        found = []
        while (completion := self._next_used()) is not None:
            id_, written = completion
            # In order, those that were left out had their buffers written completely.
            while self.in_order and next(iter(self.buffers)) != id_:
                skipped = next(iter(self.buffers))
                total = sum(descriptor.len for descriptor in self.buffers[skipped].writable)
                found.append(self._finish(skipped, total))
            found.append(self._finish(id_, written))
        return found

    def _finish(self, id_: int, written: int) -> Used:
        buffer = self.buffers.pop(id_)
        data = b"".join(self.memory.read(d.addr, d.len) for d in buffer.writable)[:written]
        for place in buffer.places:
            self.allocator.give(*place)
        self._free_slots(buffer)
        return Used(buffer.token, written, data)

    def _allocate(self, size: int, places: list[tuple[int, int]]) -> int:
        gpa = self.allocator.take(size)
        if size:
            places.append((gpa, size))
        return gpa

    def _area(self, size: int, align: int) -> int:
        gpa = self.allocator.take(size, align)
        self.memory.write(gpa, bytes(size))
        return gpa

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def _put16(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))

    driver: int
    device: int

    @property
    @abstractmethod
    def free(self) -> int:
        """Descriptors that can be added."""

    @abstractmethod
    def table(self, descriptors: Sequence[Descriptor]) -> bytes:
        """An indirect table, as the layout has it."""

    @abstractmethod
    def expose(self, descriptors: Sequence[Descriptor]) -> tuple[int, tuple[int, ...]]:
        """Make a chain of these descriptors available, whatever they say; its id and its slots."""

    @abstractmethod
    def notifies(self) -> bool:
        """Whether the device wants to be notified of what was added since this was last asked."""

    @abstractmethod
    def want_interrupt(self, wanted: bool) -> None:
        """Ask for an interrupt at the next completion (with EVENT_IDX: of the oldest one), or for none."""

    @abstractmethod
    def _next_used(self) -> tuple[int, int] | None:
        """The next completion: id and bytes written."""

    @abstractmethod
    def _free_slots(self, buffer: Buffer) -> None: ...


class SplitDriver(FakeDriver):
    """virtio 1.2, section 2.7."""

    def __init__(self, memory: Memory, size: int, features: int = 0, base: int = 0x1000) -> None:
        super().__init__(memory, size, features & ~VIRTIO_F_RING_PACKED, base)
        self.driver = self._area(6 + 2 * size, 2)
        self.device = self._area(6 + 8 * size, 4)
        self.avail_idx = 0
        self.used_idx = 0
        self._kicked = 0
        self._free = list(range(size))

    @property
    def free(self) -> int:
        return len(self._free)

    def table(self, descriptors: Sequence[Descriptor]) -> bytes:
        last = len(descriptors) - 1
        return b"".join(
            struct.pack("<QIHH", d.addr, d.len, d.flags | (VIRTQ_DESC_F_NEXT if i < last else 0), i + 1)
            for i, d in enumerate(descriptors)
        )

    def expose(self, descriptors: Sequence[Descriptor]) -> tuple[int, tuple[int, ...]]:
        slots = tuple(self._free[: len(descriptors)])
        del self._free[: len(descriptors)]
        for slot, next_, d in zip(slots, (*slots[1:], None), descriptors, strict=True):
            flags = d.flags | (0 if next_ is None else VIRTQ_DESC_F_NEXT)
            self.write_descriptor(slot, d.addr, d.len, flags, next_ or 0)
        self.make_available(slots[0])
        return slots[0], slots

    def write_descriptor(self, slot: int, addr: int, len_: int, flags: int, next_: int = 0) -> None:
        self.memory.write(self.desc + slot * DESC_SIZE, struct.pack("<QIHH", addr, len_, flags, next_))

    def make_available(self, head: int) -> None:
        """Put a head into the available ring, and move its index."""
        self._put16(self.driver + 4 + self.avail_idx % self.size * 2, head)
        self.set_avail_idx(self.avail_idx + 1)

    def set_avail_idx(self, idx: int) -> None:
        self.avail_idx = idx & 0xFFFF
        self._put16(self.driver + 2, idx)

    def notifies(self) -> bool:
        old, self._kicked = self._kicked, self.avail_idx
        if self.event_idx:
            event = self._u16(self.device + 4 + 8 * self.size)
            return passes_event(event, self.avail_idx, old)
        return self._u16(self.device) & 1 == 0  # VIRTQ_USED_F_NO_NOTIFY

    def want_interrupt(self, wanted: bool) -> None:
        if self.event_idx:
            self._put16(self.driver + 4 + 2 * self.size, self.used_idx + (0 if wanted else 0x8000))
        else:
            self._put16(self.driver, 0 if wanted else 1)  # VIRTQ_AVAIL_F_NO_INTERRUPT

    def _next_used(self) -> tuple[int, int] | None:
        if self._u16(self.device + 2) == self.used_idx:
            return None
        entry = self.memory.read(self.device + 4 + self.used_idx % self.size * 8, 8)
        id_, written = struct.unpack("<II", entry)
        return id_, written

    def _free_slots(self, buffer: Buffer) -> None:
        self._free += buffer.slots
        self.used_idx = (self.used_idx + 1) & 0xFFFF


class PackedDriver(FakeDriver):
    """virtio 1.2, section 2.8."""

    def __init__(self, memory: Memory, size: int, features: int = 0, base: int = 0x1000) -> None:
        super().__init__(memory, size, features | VIRTIO_F_RING_PACKED, base)
        self.driver = self._area(4, 4)
        self.device = self._area(4, 4)
        self.avail_slot, self.avail_wrap = 0, True
        self.used_slot, self.used_wrap = 0, True
        self._added = 0
        self._free = size
        self._ids = list(range(size))

    @property
    def free(self) -> int:
        return self._free

    def table(self, descriptors: Sequence[Descriptor]) -> bytes:
        return b"".join(struct.pack("<QIHH", d.addr, d.len, 0, d.flags) for d in descriptors)

    def expose(self, descriptors: Sequence[Descriptor]) -> tuple[int, tuple[int, ...]]:
        id_ = self._ids.pop(0)
        slots, writes = [], []
        for i, d in enumerate(descriptors):
            flags = d.flags | (VIRTQ_DESC_F_NEXT if i < len(descriptors) - 1 else 0)
            flags |= VIRTQ_DESC_F_AVAIL if self.avail_wrap else VIRTQ_DESC_F_USED
            slots.append(self.avail_slot)
            writes.append((self.avail_slot, struct.pack("<QIHH", d.addr, d.len, id_, flags)))
            self.avail_slot, self.avail_wrap = self._advance(self.avail_slot, self.avail_wrap, 1)
        for slot, data in reversed(writes):  # the first descriptor last
            self.memory.write(self.desc + slot * DESC_SIZE, data)
        self._added += len(slots)
        self._free -= len(slots)
        return id_, tuple(slots)

    def notifies(self) -> bool:
        new, old, self._added = self.avail_slot, self.avail_slot - self._added, 0
        off_wrap, flags = self._u16(self.device), self._u16(self.device + 2)
        if flags & 3 != DESC or not self.event_idx:
            return flags & 3 != DISABLE
        event = off_wrap & 0x7FFF
        if bool(off_wrap >> 15) != self.avail_wrap:
            event -= self.size
        return passes_event(event, new, old)

    def want_interrupt(self, wanted: bool) -> None:
        flags = DISABLE if not wanted else DESC if self.event_idx else ENABLE
        off_wrap = self.used_slot | self.used_wrap << 15
        self.memory.write(self.driver, struct.pack("<HH", off_wrap, flags))

    def _next_used(self) -> tuple[int, int] | None:
        slot = self.memory.read(self.desc + self.used_slot * DESC_SIZE, DESC_SIZE)
        _, written, id_, flags = struct.unpack("<QIHH", slot)
        avail, used = bool(flags & VIRTQ_DESC_F_AVAIL), bool(flags & VIRTQ_DESC_F_USED)
        if avail != self.used_wrap or used != self.used_wrap:
            return None
        return id_, written if flags & VIRTQ_DESC_F_WRITE else 0

    def _free_slots(self, buffer: Buffer) -> None:
        count = len(buffer.slots)
        self._free += count
        self.used_slot, self.used_wrap = self._advance(self.used_slot, self.used_wrap, count)
        self._ids.append(buffer.id)

    def _advance(self, slot: int, wrap: bool, by: int) -> tuple[int, bool]:
        return (slot + by) % self.size, wrap != (slot + by >= self.size)


def passes_event(event: int, new: int, old: int) -> bool:
    """vring_need_event of the specification, section 2.7.10."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
