"""KVM's binary statistics (KVM API, section 4.133 KVM_GET_STATS_FD)."""

from __future__ import annotations

import errno
import functools
import os
from dataclasses import dataclass
from enum import IntEnum

from aiokvm._core import ffi
from aiokvm.errors import KvmError
from aiokvm.kvm.ioctl import Handle


class StatType(IntEnum):
    """What a statistic's value is."""

    KVM_STATS_TYPE_CUMULATIVE = 0
    KVM_STATS_TYPE_INSTANT = 1
    KVM_STATS_TYPE_PEAK = 2
    KVM_STATS_TYPE_LINEAR_HIST = 3
    KVM_STATS_TYPE_LOG_HIST = 4


class StatUnit(IntEnum):
    """What a statistic counts in."""

    KVM_STATS_UNIT_NONE = 0
    KVM_STATS_UNIT_BYTES = 1
    KVM_STATS_UNIT_SECONDS = 2
    KVM_STATS_UNIT_CYCLES = 3
    KVM_STATS_UNIT_BOOLEAN = 4


@dataclass(frozen=True, slots=True)
class StatDescriptor:
    """One statistic (struct kvm_stats_desc).

    A value counts in ``base ** exponent`` of ``unit``: nanoseconds are base 10, exponent -9, seconds.
    ``size`` is the number of values: the buckets of a histogram, of ``bucket_size`` each or by powers of two.
    ``type`` and ``unit`` are plain ints where the kernel is newer than this enumeration.
    """

    name: str
    type: StatType | int
    unit: StatUnit | int
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int


class Stats(Handle):
    """The statistics of a VM or a vCPU: what there are, read once, and their values, read whenever asked."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        header = ffi.new("struct kvm_stats_header *")
        size = ffi.sizeof("struct kvm_stats_header")
        ffi.memmove(header, self._read(size, 0), size)
        self.id: str = _text(self._read(header.name_size, header.id_offset))
        """Whose they are: "kvm-" and the process, then "/vcpu-" and the vCPU's id."""
        self._data_offset: int = header.data_offset
        step = ffi.sizeof("struct kvm_stats_desc") + header.name_size
        block = self._read(step * header.num_desc, header.desc_offset)
        self.descriptors: tuple[StatDescriptor, ...] = _descriptors(block, step)
        self._data_bytes = max((d.offset + 8 * d.size for d in self.descriptors), default=0)

    def read(self) -> dict[str, int | tuple[int, ...]]:
        """Return all values by name: a number, or a tuple of numbers where ``size`` is not 1."""
        data = memoryview(self._read(self._data_bytes, self._data_offset))
        values: dict[str, int | tuple[int, ...]] = {}
        for stat in self.descriptors:
            numbers = data[stat.offset : stat.offset + 8 * stat.size].cast("Q")
            values[stat.name] = numbers[0] if stat.size == 1 else tuple(numbers)
        return values

    def _read(self, size: int, offset: int) -> bytes:
        data = os.pread(self._open_fd("KVM_GET_STATS_FD"), size, offset)
        if len(data) != size:
            raise KvmError("KVM_GET_STATS_FD", errno.EIO, f"{len(data)} of {size} bytes at offset {offset}")
        return data


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("ascii", "replace")


# All vCPUs of a host have the same, and so have all VMs.
@functools.lru_cache(4)
def _descriptors(block: bytes, step: int) -> tuple[StatDescriptor, ...]:
    fixed = ffi.sizeof("struct kvm_stats_desc")
    return tuple(_descriptor(block[at : at + step], fixed) for at in range(0, len(block), step))


def _descriptor(raw: bytes, fixed: int) -> StatDescriptor:
    c = ffi.from_buffer("struct kvm_stats_desc *", raw)
    kind, unit, base = c.flags & 0xF, c.flags >> 4 & 0xF, c.flags >> 8 & 0xF
    return StatDescriptor(
        name=_text(raw[fixed:]),
        type=StatType(kind) if kind in tuple(StatType) else kind,
        unit=StatUnit(unit) if unit in tuple(StatUnit) else unit,
        base=2 if base else 10,
        exponent=c.exponent,
        size=c.size,
        offset=c.offset,
        bucket_size=c.bucket_size,
    )
