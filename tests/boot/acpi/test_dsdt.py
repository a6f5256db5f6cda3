from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from aiokvm.boot.acpi import Platform, SerialPort, VirtioMmio, aml
from aiokvm.boot.acpi.dsdt import device, dsdt

if TYPE_CHECKING:
    from collections.abc import Callable

SERIAL = SerialPort(0x3F8, 4, 0), SerialPort(0x2F8, 3, 1), SerialPort(0x3E8, 20, 2)


def test_header() -> None:
    data = dsdt(Platform((0,)))
    assert data[:4] == b"DSDT"
    assert data[8] == 2
    assert int.from_bytes(data[4:8], "little") == len(data)
    assert sum(data) % 256 == 0


def test_shutdown_writes_5_to_slp_typ() -> None:
    assert dsdt(Platform((0,)))[36:].startswith(b"\x08_S5_\x12\x07\x04\x0a\x05\0\0\0")


def test_processor() -> None:
    assert b"\x5b\x82\x1aC000\x08_HID\x0dACPI0007\0\x08_UID\0" in dsdt(Platform((0,)))
    assert b"\x5b\x82\x1cC12B\x08_HID\x0dACPI0007\0\x08_UID\x0b\x2b\x01" in dsdt(Platform(tuple(range(300))))


def test_device() -> None:
    hid, uid, sta = b"\x08_HID\x0dLNRO0005\0", b"\x08_UID\x0a\x02", b"\x08_STA\x0a\x0f"
    crs = b"\x08_CRS" + aml.resource_template(aml.irq_no_flags(5))
    terms = b"VR02" + hid + uid + sta + crs
    assert (
        device("VR02", "LNRO0005", aml.irq_no_flags(5), uid=2)
        == b"\x5b\x82" + bytes([len(terms) + 1]) + terms
    )


def test_absent_devices_are_not_described() -> None:
    pnp0303, pnp0b00, debug_exit = bytes.fromhex("41d00303"), bytes.fromhex("41d00b00"), aml.io(0xF4, 4)
    full = dsdt(Platform((0,)))
    bare = dsdt(Platform((0,), i8042=False, rtc=False, debug_exit_port=None))
    for part in pnp0303, pnp0b00, debug_exit:
        assert part in full
        assert part not in bare


def test_virtio_devices(iasl: Callable[[bytes], str]) -> None:
    virtio = (
        VirtioMmio(0xD000_0000, 0x1000, 16, shared=True),
        VirtioMmio(0xD000_1000, 0x1000, 5),
        VirtioMmio(0xD000_2000, 0x1000, 16, shared=True),
    )
    asl = iasl(dsdt(Platform((0,), virtio=virtio)))
    assert re.findall(r"Device \((VR\w+)\)", asl) == ["VR00", "VR01", "VR02"]
    assert asl.count('Name (_HID, "LNRO0005")') == 3
    devices = asl[asl.index("VR00") : asl.index("MBRS")]
    assert re.findall(r"_UID, (\w+)\)", devices) == ["Zero", "One", "0x02"]
    assert re.findall(r"0x(\w{8}), +// Address Base", devices) == ["D0000000", "D0001000", "D0002000"]
    assert re.findall(r"0x(\w{8}), +// Address Length", devices) == ["00001000"] * 3
    interrupts = re.findall(
        r"Interrupt \(ResourceConsumer, Edge, ActiveHigh, (\w+), .*?{\s+(\w+),", devices, re.DOTALL
    )
    assert interrupts == [("Shared", "0x00000010"), ("Exclusive", "0x00000005"), ("Shared", "0x00000010")]


@pytest.mark.parametrize("count", [1, 8, 255, 300])
def test_iasl(iasl: Callable[[bytes], str], count: int) -> None:
    asl = iasl(dsdt(Platform(tuple(range(count)), SERIAL)))
    names = re.findall(r"Device \((\w+)\)", asl)
    assert names == [f"C{uid:03X}" for uid in range(count)] + ["SE00", "SE01", "SE02", "KBD", "RTC", "MBRS"]
    ports = [int(port, 16) for port in re.findall(r"0x(\w{4}), +// Range Minimum", asl)]
    assert ports == [0x3F8, 0x2F8, 0x3E8, 0x60, 0x64, 0x70, 0x600, 0xF4]
    assert re.findall(r"IRQNoFlags \(\)\s+{(\d+)}", asl) == ["4", "3", "1", "8"]
    assert asl.count("Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive") == 1
