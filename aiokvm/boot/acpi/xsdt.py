"""The lists of all tables (ACPI 6.5, sections 5.2.7 and 5.2.8)."""

from __future__ import annotations

import struct

from aiokvm.boot.acpi.table import table


def xsdt(addresses: tuple[int, ...]) -> bytes:
    """Build the XSDT, with pointers of 64 bits."""
    return table(b"XSDT", 1, struct.pack(f"<{len(addresses)}Q", *addresses))


def rsdt(addresses: tuple[int, ...]) -> bytes:
    """Build the RSDT, its 32-bit forerunner, for kernels that read no XSDT."""
    return table(b"RSDT", 1, struct.pack(f"<{len(addresses)}I", *addresses))
