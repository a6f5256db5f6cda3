from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiokvm.boot.acpi import Platform
from aiokvm.boot.acpi.fadt import fadt

if TYPE_CHECKING:
    from collections.abc import Callable

FACS = 0xE_0040
DSDT = 0xE_0080


def number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def test_header() -> None:
    data = fadt(Platform((0,)), FACS, DSDT)
    assert data[:4] == b"FACP"
    assert len(data) == number(data, 4, 4) == 276
    assert data[8] == 6
    assert data[131] == 5
    assert sum(data) % 256 == 0


def test_addresses_of_tables_in_both_widths() -> None:
    data = fadt(Platform((0,)), FACS, DSDT)
    assert number(data, 36, 4) == number(data, 132, 8) == FACS
    assert number(data, 40, 4) == number(data, 140, 8) == DSDT


@pytest.mark.parametrize("pm_port", [0x600, 0xB000])
def test_fixed_hardware_in_both_forms(pm_port: int) -> None:
    data = fadt(Platform((0,), pm_port=pm_port), FACS, DSDT)
    low, high = pm_port & 0xFF, pm_port >> 8
    assert number(data, 56, 4) == pm_port
    assert number(data, 64, 4) == pm_port + 4
    assert data[88:90] == bytes([4, 2])
    # Address space (system I/O), bit width, bit offset, access size, address.
    assert data[148:160] == bytes([1, 32, 0, 2, low, high, 0, 0, 0, 0, 0, 0])
    assert data[172:184] == bytes([1, 16, 0, 2, low + 4, high, 0, 0, 0, 0, 0, 0])
    assert data[116:128] == bytes([1, 8, 0, 1, low + 8, high, 0, 0, 0, 0, 0, 0])
    assert data[128] == 1


def test_what_the_machine_has_not() -> None:
    data = fadt(Platform((0,)), FACS, DSDT)
    assert not any(data[48:56])  # SMI_CMD and its values
    assert not any(data[60:64] + data[68:88])  # PM1b, PM2, PM timer, GPE blocks
    assert not any(data[90:96])
    assert not any(data[160:172] + data[184:268])
    assert number(data, 96, 2) > 100  # C2
    assert number(data, 98, 2) > 1000  # C3


def test_sci() -> None:
    assert number(fadt(Platform((0,)), FACS, DSDT), 46, 2) == 9
    assert number(fadt(Platform((0,), sci_gsi=11), FACS, DSDT), 46, 2) == 11


def test_flags() -> None:
    wbinvd, proc_c1, slp_button, fix_rtc, reset_reg_sup = 0, 2, 5, 6, 10
    flags = number(fadt(Platform((0,)), FACS, DSDT), 112, 4)
    assert flags == sum(1 << bit for bit in (wbinvd, proc_c1, slp_button, fix_rtc, reset_reg_sup))


@pytest.mark.parametrize(
    ("i8042", "rtc", "boot_arch", "century"),
    [(True, True, 0b00_0111, 0x32), (False, True, 0b00_0101, 0x32), (True, False, 0b10_0111, 0)],
)
def test_legacy_devices(i8042: bool, rtc: bool, boot_arch: int, century: int) -> None:
    data = fadt(Platform((0,), i8042=i8042, rtc=rtc), FACS, DSDT)
    assert number(data, 109, 2) == boot_arch
    assert data[108] == century


def test_iasl(iasl: Callable[[bytes], str]) -> None:
    asl = iasl(fadt(Platform((0,)), FACS, DSDT))
    assert "Control Method Power Button (V1) : 0" in asl
    assert "Control Method Sleep Button (V1) : 1" in asl
    assert "Reset Register Supported (V2) : 1" in asl
    assert "VGA Not Present (V4) : 1" in asl
    assert "Hardware Reduced (V5) : 0" in asl
    assert asl.count("FACS Address : ") == asl.count("000E0040\n") == 2
