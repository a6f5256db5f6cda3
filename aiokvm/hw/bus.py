"""The address map of a bus, and what the devices on it share.

A device sees offsets, never addresses: :class:`Bus` only knows which region an address falls into.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from aiokvm.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIO_LIMIT = 0x10000
MMIO_LIMIT = 1 << 52  # the architectural maximum of a physical address, Intel SDM volume 3, section 4.1.4


class BusDevice(Protocol):
    """What a region of a bus leads to.

    ``size`` is 1, 2, 4 or 8 bytes; values are little-endian, unsigned and fit in ``size`` bytes.
    """

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads at ``offset`` bytes from the region's base."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest wrote at ``offset`` bytes from the region's base."""

    def reset(self) -> None:
        """Return to the state after a system reset."""


class PostedWrites(BusDevice, Protocol):
    """A :class:`BusDevice` with registers that the vCPU does not have to wait for.

    ``posted_offsets``, below 8: a byte written there is queued and the vCPU runs on; the device gets it
    before any later access to it that does reach it. What the guest reads at a latched offset comes from the
    latch.
    """

    posted_offsets: ClassVar[tuple[int, ...]]

    def write_posted(self, offset: int, data: bytes) -> None:
        """Take bytes that the guest wrote one after the other at one of ``posted_offsets``."""

    def connect_latch(self, latch: Callable[[int, int | None], None]) -> None:
        """Take what sets the byte that reads at an offset below 8 give; None makes them reach the device."""


class ByteRegisters(ABC):
    """A :class:`BusDevice` whose registers are one byte wide.

    A wider access becomes byte accesses at consecutive offsets, lowest first, as on an ISA bus. Beyond
    ``registers`` reads give ones and writes are ignored.
    """

    registers: ClassVar[int]

    @abstractmethod
    def read_byte(self, offset: int) -> int:
        """Return the register at ``offset``, which is below ``registers``."""

    @abstractmethod
    def write_byte(self, offset: int, value: int) -> None:
        """Write one byte to the register at ``offset``, which is below ``registers``."""

    @abstractmethod
    def reset(self) -> None:
        """Return to the state after a system reset."""

    def read(self, offset: int, size: int) -> int:
        """Return ``size`` bytes from ``offset``, as :class:`BusDevice` has it."""
        value = 0
        for i in range(size):
            byte = self.read_byte(offset + i) if offset + i < self.registers else 0xFF
            value |= byte << (8 * i)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes from ``offset``, as :class:`BusDevice` has it."""
        for i in range(min(size, self.registers - offset)):
            self.write_byte(offset + i, (value >> (8 * i)) & 0xFF)


class IrqLine:
    """A device's interrupt output: ``irq`` is called with the new level, only when the level changes."""

    def __init__(self, irq: Callable[[bool], None]) -> None:
        self._irq = irq
        self._level = False

    @property
    def level(self) -> bool:
        """Whether the line is asserted."""
        return self._level

    def set(self, level: bool) -> None:
        """Drive the line."""
        if level != self._level:
            self._level = level
            self._irq(level)


def check_version(device: str, version: int, supported: int) -> None:
    """Raise DeviceError unless a saved state has the version that this code writes."""
    if version != supported:
        raise DeviceError(
            f"{device}: saved state has version {version}, only {supported} can be restored; "
            f"restore it with the aiokvm that saved it"
        )


@dataclass(frozen=True, eq=False)
class Region:
    """``size`` addresses from ``base`` that lead to ``device``; compared by identity.

    ``posted``: all writes are queued for the device and the vCPU runs on, as with :class:`PostedWrites`.
    """

    id: int
    base: int
    size: int
    device: BusDevice
    posted: bool = False

    def __str__(self) -> str:
        return _span(self.base, self.size)


class Bus:
    """Which device answers at which address, for addresses from 0 up to and excluding ``limit``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._next_id = 0
        self._bases: list[int] = []
        self._regions: list[Region] = []

    def attach(self, device: BusDevice, base: int, size: int, *, posted: bool = False) -> Region:
        """Give ``device`` the ``size`` addresses from ``base``.

        The region's id is new for this bus: an exit that names a detached region is never taken for
        another's. DeviceError if the range is empty, leaves the bus or overlaps another.
        """
        if size <= 0 or base < 0 or base + size > self._limit:
            raise DeviceError(
                f"{size:#x} bytes at {base:#x} are no range of this bus: "
                f"it has addresses from 0 to {self._limit - 1:#x}, and a range is not empty"
            )
        index = bisect_right(self._bases, base)
        for neighbour in self._regions[max(index - 1, 0) : index + 1]:
            if neighbour.base < base + size and base < neighbour.base + neighbour.size:
                raise DeviceError(
                    f"{_span(base, size)} for {device_name(device)} overlaps {neighbour} of "
                    f"{device_name(neighbour.device)}; choose another address"
                )
        region = Region(self._next_id, base, size, device, posted)
        self._next_id += 1
        self._bases.insert(index, base)
        self._regions.insert(index, region)
        return region

    def detach(self, region: Region) -> None:
        """Take ``region`` off the bus; DeviceError if it is not on it."""
        index = bisect_right(self._bases, region.base) - 1
        if index < 0 or self._regions[index] is not region:
            raise DeviceError(f"region {region.id} ({region}) is not attached to this bus")
        del self._bases[index], self._regions[index]

    def lookup(self, address: int) -> Region | None:
        """Return the region that ``address`` falls into."""
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return None
        region = self._regions[index]
        return region if address < region.base + region.size else None

    def __iter__(self) -> Iterator[Region]:
        """Iterate over the regions as they are now, in address order."""
        return iter(tuple(self._regions))

    def __len__(self) -> int:
        return len(self._regions)


def device_name(device: BusDevice) -> str:
    """The class of what is at a region of a bus: of a device of the user's own, if it is one."""
    owner = getattr(device, "attachment", device)
    return type(getattr(owner, "device", owner)).__name__


def _span(base: int, size: int) -> str:
    return f"{base:#x}-{base + size - 1:#x}"
