"""What all system description tables begin with (ACPI 6.5, section 5.2.6)."""

from __future__ import annotations

import struct

OEM_ID = b"AIOKVM"

_OEM_TABLE_ID = b"AIOKVM  "
_OEM_REVISION = 1
_CREATOR_ID = b"AIOK"
_CREATOR_REVISION = 1
_HEADER = struct.Struct("<4sIBB6s8sI4sI")


def checksum(data: bytes) -> int:
    """Return the byte that makes the sum of ``data`` and itself zero, modulo 256."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Put ``body`` behind its 36-byte header, checksum included."""

    def header(check: int) -> bytes:
        return _HEADER.pack(
            signature,
            _HEADER.size + len(body),
            revision,
            check,
            OEM_ID,
            _OEM_TABLE_ID,
            _OEM_REVISION,
            _CREATOR_ID,
            _CREATOR_REVISION,
        )

    return header(checksum(header(0) + body)) + body
