"""The memory map that a kernel is given: E820 types, used by the zero page and by PVH alike."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from aiokvm.boot.layout import ACPI, EBDA, HIGH_MEMORY, VIDEO
from aiokvm.errors import ConfigError

if TYPE_CHECKING:
    from aiokvm.boot.plan import GuestInfo

# The room in struct boot_params (E820_MAX_ENTRIES_ZEROPAGE).
E820_MAX_ENTRIES = 128


class E820Type(IntEnum):
    """The type of a range (ACPI specification, section 15, "Address Range Types")."""

    RAM = 1
    RESERVED = 2


class E820Entry(NamedTuple):
    """A range of guest memory; ``size`` is in bytes."""

    gpa: int
    size: int
    type: E820Type


def memory_map(guest: GuestInfo) -> list[E820Entry]:
    """Return the sorted map of ``guest``: its RAM without the EBDA and what lies above it up to 1 MiB.

    Raises ConfigError for RAM in more pieces than the zero page can list.
    """
    entries = [
        E820Entry(EBDA, VIDEO - EBDA, E820Type.RESERVED),
        E820Entry(ACPI, HIGH_MEMORY - ACPI, E820Type.RESERVED),
    ]
    for gpa, size in guest.ram:
        end = gpa + size
        for start, stop in ((gpa, min(end, EBDA)), (max(gpa, HIGH_MEMORY), end)):
            if start < stop:
                entries.append(E820Entry(start, stop - start, E820Type.RAM))
    if len(entries) > E820_MAX_ENTRIES:
        raise ConfigError(
            f"the memory map has {len(entries)} entries, a kernel takes {E820_MAX_ENTRIES}: "
            "give the machine RAM in fewer ranges"
        )
    return sorted(entries)
