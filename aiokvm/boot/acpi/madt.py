"""The MADT: interrupt controllers and how they are wired (ACPI 6.5, section 5.2.12)."""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from aiokvm.boot.acpi.table import table

if TYPE_CHECKING:
    from aiokvm.boot.acpi.config import Platform

_REVISION = 6
_PCAT_COMPAT = 1 << 0
_ENABLED = 1 << 0

_FIRST_X2APIC_ID = 255

# MPS INTI flags (5.2.12.5).
_CONFORMS = 0
_ACTIVE_HIGH = 0b01
_LEVEL = 0b11 << 2

_ISA = 0
_LINT1 = 1
_ALL_LAPICS = 0xFF
_ALL_X2APICS = 0xFFFF_FFFF


def _processor(uid: int, apic_id: int) -> bytes:
    if apic_id < _FIRST_X2APIC_ID:
        return pack("<BBBBI", 0, 8, uid, apic_id, _ENABLED)
    return pack("<BBHIII", 9, 16, 0, apic_id, _ENABLED, uid)


def _ioapic(apic_id: int, address: int) -> bytes:
    return pack("<BBBBII", 1, 12, apic_id, 0, address, 0)


def _source_override(irq: int, gsi: int, flags: int) -> bytes:
    return pack("<BBBBIH", 2, 10, _ISA, irq, gsi, flags)


def madt(platform: Platform) -> bytes:
    """Build the MADT; its GSIs are pins of the I/O APIC, so the PIT's IRQ 0 must be routed to pin 2 there."""
    entries = [_processor(uid, apic_id) for uid, apic_id in enumerate(platform.apic_ids)]
    entries += (
        _ioapic(platform.ioapic_id, platform.ioapic_address),
        _source_override(0, 2, _CONFORMS),
        _source_override(platform.sci_gsi, platform.sci_gsi, _ACTIVE_HIGH | _LEVEL),
        pack("<BBBHB", 4, 6, _ALL_LAPICS, _CONFORMS, _LINT1),
    )
    if platform.apic_ids[-1] >= _FIRST_X2APIC_ID:
        entries.append(pack("<BBHIB3x", 10, 12, _CONFORMS, _ALL_X2APICS, _LINT1))
    return table(b"APIC", _REVISION, pack("<II", platform.lapic_address, _PCAT_COMPAT) + b"".join(entries))
