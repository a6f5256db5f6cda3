from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aiokvm.boot.acpi import MAX_PROCESSORS, MAX_VIRTIO, Platform, SerialPort, VirtioMmio
from aiokvm.errors import ConfigError

PLATFORM = Platform((0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apic_ids": ()}, "0 processors"),
        ({"apic_ids": tuple(range(4097))}, "4097 processors"),
        ({"apic_ids": (0, 2, 1)}, "ascending"),
        ({"apic_ids": (0, 1, 1)}, "ascending"),
        ({"apic_ids": (-1, 0)}, "APIC ids -0x1 to 0x0"),
        ({"apic_ids": (0, 0xFFFF_FFFF)}, "0xffffffff"),
        ({"pm_port": 0}, "pm_port 0x0"),
        ({"pm_port": 0xFFF8}, "pm_port 0xfff8"),
        ({"sci_gsi": 2}, "sci_gsi 2"),
        ({"sci_gsi": 8}, "sci_gsi 8"),
        ({"sci_gsi": 16}, "sci_gsi 16"),
        ({"serial": (SerialPort(0x3F8, 9, 0),)}, "serial port 0x3f8 is edge triggered"),
        ({"serial": (SerialPort(0x3F8, 4, 1), SerialPort(0x2F8, 3, 1))}, r"\[1, 1\]"),
        ({"virtio": (VirtioMmio(0xD000_0000, 0x1000, 9),)}, "virtio device 0xd0000000 is edge triggered"),
        ({"virtio": (VirtioMmio(0, 1, 16),) * (MAX_VIRTIO + 1)}, "257 virtio devices"),
        ({"ioapic_address": 1 << 32}, "ioapic_address 0x100000000"),
        ({"lapic_address": -1}, "lapic_address -0x1"),
        ({"ioapic_id": 16}, "ioapic_id 16"),
        ({"debug_exit_port": 0xFFFD}, "debug_exit_port 0xfffd"),
    ],
)
def test_platform_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PLATFORM, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"apic_ids": tuple(range(MAX_PROCESSORS))},
        {"apic_ids": (0xFFFF_FFFE,)},
        {"pm_port": 0xFFF7},
        {"debug_exit_port": 0xFFFC},
        {"debug_exit_port": None},
        {"ioapic_id": 15},
    ],
)
def test_platform_accepts_the_extremes(change: dict[str, Any]) -> None:
    replace(PLATFORM, **change)


@pytest.mark.parametrize("gsi", [0, 2, 24])
def test_serial_port_refuses_a_gsi(gsi: int) -> None:
    with pytest.raises(ConfigError, match=f"GSI {gsi}:"):
        SerialPort(0x3F8, gsi, 0)


@pytest.mark.parametrize("port", [-1, 0xFFF9])
def test_serial_port_refuses_a_port(port: int) -> None:
    with pytest.raises(ConfigError, match="8 ports"):
        SerialPort(port, 4, 0)


@pytest.mark.parametrize(("base", "size"), [(-1, 4), (0, 0), (0xFFFF_F000, 0x1001)])
def test_virtio_device_refuses_a_place(base: int, size: int) -> None:
    with pytest.raises(ConfigError, match="below 4 GiB"):
        VirtioMmio(base, size, 16)


@pytest.mark.parametrize("gsi", [0, 2, 24])
def test_virtio_device_refuses_a_gsi(gsi: int) -> None:
    with pytest.raises(ConfigError, match=f"GSI {gsi}:"):
        VirtioMmio(0xD000_0000, 0x1000, gsi)
