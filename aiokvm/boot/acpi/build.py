"""Lays the tables out in guest memory."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from aiokvm.boot.acpi.dsdt import dsdt
from aiokvm.boot.acpi.facs import facs
from aiokvm.boot.acpi.fadt import fadt
from aiokvm.boot.acpi.madt import madt
from aiokvm.boot.acpi.rsdp import RSDP_SIZE, rsdp
from aiokvm.boot.acpi.xsdt import rsdt, xsdt
from aiokvm.errors import ConfigError

if TYPE_CHECKING:
    from aiokvm.boot.acpi.config import Platform

_ALIGN = 16
_FACS_ALIGN = 64


class Tables(NamedTuple):
    """``data`` belongs at guest physical address ``gpa``, in RAM; ``rsdp`` is the RSDP's address in it."""

    gpa: int
    data: bytes
    rsdp: int


# Machines of one kind have the same; a program that makes many makes them of few kinds.
@functools.lru_cache(16)
def build(platform: Platform, gpa: int = 0xE_0000, limit: int = 0x10_0000) -> Tables:
    """Build the tables of ``platform`` between guest physical addresses ``gpa`` and ``limit`` (exclusive).

    The default is the BIOS area, which a kernel searches for the RSDP; one that is told the RSDP's address
    takes the tables anywhere below 4 GiB. The area must not be given to the guest as usable RAM.

    Raises ConfigError when the tables do not fit, or the area is not aligned to 16 bytes or not below 4 GiB.
    """
    if gpa % _ALIGN or not 0 <= gpa < limit <= 1 << 32:
        raise ConfigError(
            f"ACPI tables from {gpa:#x} to {limit:#x}: use an area below 4 GiB, aligned to 16 bytes"
        )
    data = bytearray()

    def place(content: bytes, align: int = _ALIGN) -> int:
        data.extend(bytes(-(gpa + len(data)) % align))
        address = gpa + len(data)
        data.extend(content)
        if address + len(content) > limit:
            raise ConfigError(
                f"ACPI tables of {len(platform.apic_ids)} processors do not fit in {gpa:#x} to {limit:#x}: "
                "use fewer processors or a larger area"
            )
        return address

    # First, so that it stays where it is however many devices the tables describe; who boots has its address.
    rsdp_gpa = place(bytes(RSDP_SIZE))
    # Each table after those that it points to.
    fadt_gpa = place(fadt(platform, place(facs(), _FACS_ALIGN), place(dsdt(platform))))
    pointers = fadt_gpa, place(madt(platform))
    data[:RSDP_SIZE] = rsdp(place(rsdt(pointers)), place(xsdt(pointers)))
    return Tables(gpa, bytes(data), rsdp_gpa)
