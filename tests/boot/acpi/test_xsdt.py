from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.boot.acpi.xsdt import rsdt, xsdt

if TYPE_CHECKING:
    from collections.abc import Callable


def test_xsdt() -> None:
    data = xsdt((0xE_0040, 0xE_1000))
    assert data[:4] == b"XSDT"
    assert data[8] == 1
    assert data[36:].hex() == "40000e000000000000100e0000000000"
    assert sum(data) % 256 == 0


def test_rsdt() -> None:
    data = rsdt((0xE_0040, 0xE_1000))
    assert data[:4] == b"RSDT"
    assert data[8] == 1
    assert data[36:].hex() == "40000e0000100e00"
    assert sum(data) % 256 == 0


def test_iasl(iasl: Callable[[bytes], str]) -> None:
    assert "ACPI Table Address   1 : 00000000000E1000" in iasl(xsdt((0xE_0040, 0xE_1000)))
    assert "ACPI Table Address   1 : 000E1000" in iasl(rsdt((0xE_0040, 0xE_1000)))
