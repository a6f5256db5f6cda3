from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiokvm.boot.acpi import Platform
from aiokvm.boot.acpi.madt import madt

if TYPE_CHECKING:
    from collections.abc import Callable

IOAPIC = bytes.fromhex("010c 00 00 0000c0fe 00000000")
IRQ0_IS_GSI2 = bytes.fromhex("020a 00 00 02000000 0000")
SCI_LEVEL_HIGH = bytes.fromhex("020a 00 09 09000000 0d00")
LAPIC_NMI = bytes.fromhex("0406 ff 0000 01")
X2APIC_NMI = bytes.fromhex("0a0c 0000 ffffffff 01 000000")


def entries(data: bytes) -> list[bytes]:
    found = []
    offset = 44
    while offset < len(data):
        length = data[offset + 1]
        found.append(data[offset : offset + length])
        assert len(found[-1]) == length >= 2
        offset += length
    return found


def test_header() -> None:
    data = madt(Platform((0,), lapic_address=0xFEE1_0000))
    assert data[:4] == b"APIC"
    assert data[8] == 6
    assert data[36:44].hex() == "0000e1fe01000000"
    assert sum(data) % 256 == 0


def test_entries_of_a_small_machine() -> None:
    assert entries(madt(Platform((0, 4)))) == [
        bytes.fromhex("0008 00 00 01000000"),
        bytes.fromhex("0008 01 04 01000000"),
        IOAPIC,
        IRQ0_IS_GSI2,
        SCI_LEVEL_HIGH,
        LAPIC_NMI,
    ]


def test_ids_from_255_on_are_x2apic_entries() -> None:
    assert entries(madt(Platform((254, 255, 0x1_2345)))) == [
        bytes.fromhex("0008 00 fe 01000000"),
        bytes.fromhex("0910 0000 ff000000 01000000 01000000"),
        bytes.fromhex("0910 0000 45230100 01000000 02000000"),
        IOAPIC,
        IRQ0_IS_GSI2,
        SCI_LEVEL_HIGH,
        LAPIC_NMI,
        X2APIC_NMI,
    ]


@pytest.mark.parametrize("count", [1, 255, 256, 4096])
def test_every_processor_is_there_once(count: int) -> None:
    found = entries(madt(Platform(tuple(range(count)))))
    lapics = [(entry[2], entry[3]) for entry in found if entry[0] == 0]
    x2apics = [
        (int.from_bytes(entry[12:16], "little"), int.from_bytes(entry[4:8], "little"))
        for entry in found
        if entry[0] == 9
    ]
    assert lapics == [(index, index) for index in range(min(count, 255))]
    assert x2apics == [(index, index) for index in range(255, count)]
    assert (X2APIC_NMI in found) == (count > 255)


def test_ioapic_and_sci_are_where_the_platform_says() -> None:
    found = entries(madt(Platform((0,), ioapic_address=0xFED0_0000, ioapic_id=15, sci_gsi=11)))
    assert bytes.fromhex("010c 0f 00 0000d0fe 00000000") in found
    assert bytes.fromhex("020a 00 0b 0b000000 0d00") in found
    assert SCI_LEVEL_HIGH not in found


@pytest.mark.parametrize("count", [1, 8, 255, 300])
def test_iasl(iasl: Callable[[bytes], str], count: int) -> None:
    asl = iasl(madt(Platform(tuple(range(count)))))
    assert asl.count("[Processor Local APIC]") == min(count, 255)
    assert asl.count("[Processor Local x2APIC]") == max(count - 255, 0)
    assert asl.count("[Interrupt Source Override]") == 2
