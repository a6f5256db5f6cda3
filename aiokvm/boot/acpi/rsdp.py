"""The root pointer, which the guest finds by its signature or is told of (ACPI 6.5, section 5.2.5.3)."""

from __future__ import annotations

import struct

from aiokvm.boot.acpi.table import OEM_ID, checksum

_REVISION = 2
_ACPI_1 = struct.Struct("<8sB6sBI")
RSDP_SIZE = 36


def rsdp(rsdt: int, xsdt: int) -> bytes:
    """Build the 36 bytes, to be aligned to 16, that point to the RSDT and XSDT at these addresses."""
    # ACPI 1.0 knows the first 20 bytes, and their checksum, only.
    first = _ACPI_1.pack(b"RSD PTR ", 0, OEM_ID, _REVISION, rsdt)
    first = _ACPI_1.pack(b"RSD PTR ", checksum(first), OEM_ID, _REVISION, rsdt)
    second = struct.pack("<IQ", RSDP_SIZE, xsdt)
    return first + second + bytes([checksum(first + second), 0, 0, 0])
