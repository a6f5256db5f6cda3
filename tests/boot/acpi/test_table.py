from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot.acpi.table import checksum, table


@given(st.binary(max_size=300))
def test_table_sums_up_to_zero(body: bytes) -> None:
    data = table(b"TEST", 7, body)
    assert sum(data) % 256 == 0
    assert data[36:] == body


def test_header() -> None:
    data = table(b"TEST", 7, b"body")
    assert data[:9] == b"TEST" + bytes([40, 0, 0, 0, 7])
    assert data[10:36] == b"AIOKVMAIOKVM  \1\0\0\0AIOK\1\0\0\0"


def test_checksum() -> None:
    assert checksum(b"") == 0
    assert checksum(b"\x01") == 0xFF
    assert checksum(b"\xff\x02") == 0xFF
