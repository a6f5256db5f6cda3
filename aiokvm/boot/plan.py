"""What every boot protocol makes: a plan of guest memory and registers, and the builder that checks it."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aiokvm.arguments import checked, checked_init
from aiokvm.boot.layout import ACPI, HIGH_MEMORY, PAGE_SIZE
from aiokvm.errors import BootError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from aiokvm.boot.cpu import CpuState
    from aiokvm.errors import ConfigError


@checked_init
@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes to be copied into guest RAM at ``gpa``."""

    gpa: int
    data: bytes | memoryview


@checked_init
@dataclass(frozen=True, slots=True)
class GuestInfo:
    """What a loader knows of the machine.

    ``ram`` holds (gpa, size in bytes) of each range of RAM, sorted and disjoint; ``rsdp`` is the gpa of the
    ACPI root pointer, 0 for a machine without ACPI tables. ``virtio_mmio`` holds (gpa, size in bytes, GSI) of
    each virtio device, for a kernel that is told of them by its command line.
    """

    ram: tuple[tuple[int, int], ...]
    rsdp: int = 0
    virtio_mmio: tuple[tuple[int, int, int], ...] = ()


@checked_init
@dataclass(frozen=True, slots=True)
class BootPlan:
    """What has to be in RAM and in the boot processor's registers before it runs.

    ``zero`` holds (gpa, size in bytes) of what must read as zero although no segment covers it; RAM that was
    never written to is zero already, after a reset of the machine it has to be cleared. Segments and zero
    ranges lie inside RAM and never overlap, so their order does not matter.
    """

    segments: tuple[Segment, ...]
    cpu: CpuState
    zero: tuple[tuple[int, int], ...] = ()


class BootProtocol(Protocol):
    """A way to boot a machine. Pure: whoever uses it reads the files."""

    def files(self) -> tuple[Path, ...]:
        """Return the files that have to be read for ``plan``, in order."""
        ...

    def plan(self, files: Mapping[Path, bytes], guest: GuestInfo) -> BootPlan:
        """Return the plan for a machine; ``files`` holds the content of each of ``files()``.

        Raises BootError for content that cannot be booted on this machine, ConfigError for settings that
        do not fit it.
        """
        ...


@checked
def check_plan(plan: BootPlan, guest: GuestInfo) -> None:
    """Check that a plan can be carried out on the machine, as `VM.create` does with every plan.

    What is copied and what is zeroed lies in RAM, not over the ACPI tables, and nothing over something else.
    Raises BootError.
    """
    checker = PlanBuilder(guest, BootError)
    for number, segment in enumerate(plan.segments):
        checker.claim(f"segment {number} of the boot plan", segment.gpa, memoryview(segment.data).nbytes)
    for number, (gpa, size) in enumerate(plan.zero):
        checker.claim(f"zero range {number} of the boot plan", gpa, size)


class PlanBuilder:
    """Collects a plan, and refuses with ``error`` whatever is outside RAM or overlaps something else."""

    @checked
    def __init__(self, guest: GuestInfo, error: type[BootError | ConfigError] = BootError) -> None:
        self._ram = guest.ram
        self._error = error
        self._claims: list[tuple[int, int, str]] = []
        self._segments: list[Segment] = []
        self._zero: list[tuple[int, int]] = []
        if guest.rsdp:
            self.claim("the ACPI tables", ACPI, HIGH_MEMORY - ACPI)

    @checked
    def claim(self, what: str, gpa: int, size: int) -> None:
        """Take ``size`` bytes at ``gpa``, for which nothing is planned yet; ``what`` names them in errors."""
        if size < 0:
            raise self._error(f"{what} has {size} bytes")
        end = gpa + size
        if not any(start <= gpa and end <= start + length for start, length in self._ram):
            raise self._error(
                f"{what} ({gpa:#x} to {end:#x}) is not inside RAM ({_ranges(self._ram)}): "
                "give the machine more memory there"
            )
        at = bisect(self._claims, (gpa, end, what))
        for start, stop, other in self._claims[max(at - 1, 0) : at + 1]:
            if gpa < stop and start < end:
                raise self._error(f"{what} ({gpa:#x} to {end:#x}) overlaps {other} ({start:#x} to {stop:#x})")
        self._claims.insert(at, (gpa, end, what))

    @checked
    def place(self, gpa: int, data: bytes | memoryview) -> None:
        """Have ``data`` copied to ``gpa``, inside what was claimed."""
        self._segments.append(Segment(gpa, data))

    @checked
    def copy(self, what: str, gpa: int, data: bytes | memoryview, size: int = 0) -> None:
        """Claim ``gpa`` and have ``data`` copied there, followed by zeros where ``size`` is larger."""
        size = max(size, len(data))
        self.claim(what, gpa, size)
        if data:
            self.place(gpa, data)
        if size > len(data):
            self._zero.append((gpa + len(data), size - len(data)))

    @checked
    def highest(self, size: int, limit: int) -> int | None:
        """Return the highest page with ``size`` free bytes of RAM, from 1 MiB to ``limit``, or None."""
        for base, length in reversed(self._ram):
            top = min(limit, base + length)
            for start, end, _ in [*reversed(self._claims), (0, HIGH_MEMORY, "")]:
                gpa = (top - size) & -PAGE_SIZE
                if gpa >= max(base, end, HIGH_MEMORY):
                    return gpa
                top = min(top, start)
        return None

    @checked
    def build(self, cpu: CpuState) -> BootPlan:
        """Return the plan that was collected, with the registers ``cpu``."""
        return BootPlan(tuple(self._segments), cpu, tuple(self._zero))


def _ranges(ram: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{gpa:#x} to {gpa + size:#x}" for gpa, size in ram) or "none"
