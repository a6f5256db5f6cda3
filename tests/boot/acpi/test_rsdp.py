from __future__ import annotations

from aiokvm.boot.acpi.rsdp import rsdp


def test_rsdp() -> None:
    data = rsdp(0x000E_1230, 0x7_000E_4560)
    assert len(data) == 36
    assert data[:8] == b"RSD PTR "
    assert data[9:15] == b"AIOKVM"
    assert data[15] == 2
    assert data[16:20].hex() == "30120e00"
    assert data[20:24] == bytes([36, 0, 0, 0])
    assert data[24:32].hex() == "60450e0007000000"
    assert data[33:] == bytes(3)


def test_rsdp_has_a_checksum_for_each_of_its_versions() -> None:
    data = rsdp(0x000E_1230, 0x000E_4560)
    assert sum(data[:20]) % 256 == 0
    assert sum(data) % 256 == 0
    assert data[8] != 0
    assert data[32] != 0
