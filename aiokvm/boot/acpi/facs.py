"""The FACS, where a guest keeps its waking vector and the global lock (ACPI 6.5, section 5.2.10)."""

from __future__ import annotations

import struct

_VERSION = 2
_LENGTH = 64


def facs() -> bytes:
    """Build the 64 bytes, to be aligned to 64 bytes; the FACS has a header of its own and no checksum."""
    return struct.pack("<4sI24xB31x", b"FACS", _LENGTH, _VERSION)
