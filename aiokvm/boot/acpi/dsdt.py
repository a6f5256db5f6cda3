"""The DSDT: the devices that cannot be found by probing (ACPI 6.5, section 5.2.11.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.boot.acpi import aml
from aiokvm.boot.acpi.config import PM_PORTS
from aiokvm.boot.acpi.table import table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiokvm.boot.acpi.config import Platform, SerialPort, VirtioMmio

# 2 or more: AML integers have 64 bits.
_REVISION = 2

_SLP_TYP_S5 = 5
_DEBUG_EXIT_PORTS = 4

_PRESENT_AND_WORKING = 0x0F


def device(name: str, hid: aml.Data, *resources: bytes, uid: int = 0) -> bytes:
    """Encode a device that is present and uses ``resources``; ``hid`` is an EISA id, or a string."""
    return aml.device(
        name,
        aml.name("_HID", hid),
        aml.name("_UID", uid),
        aml.name("_STA", _PRESENT_AND_WORKING),
        aml.name("_CRS", aml.resource_template(*resources)),
    )


def _processor(uid: int) -> bytes:
    # There may be thousands, so this is the least that a processor needs.
    return aml.device(f"C{uid:03X}", aml.name("_HID", "ACPI0007"), aml.name("_UID", uid))


def _serial(index: int, port: SerialPort) -> bytes:
    irq = aml.irq_no_flags(port.gsi) if port.gsi < 16 else aml.interrupt(port.gsi)
    return device(f"SE{index:02X}", aml.eisa_id("PNP0501"), aml.io(port.port, 8), irq, uid=port.uid)


def _virtio(index: int, at: VirtioMmio) -> bytes:
    # The id that Linux and others bind virtio-mmio by; the interrupt of virtio 1.2, 4.2.3.4, is an edge here.
    resources = aml.memory32_fixed(at.base, at.size), aml.interrupt(at.gsi, shared=at.shared)
    return device(f"VR{index:02X}", "LNRO0005", *resources, uid=index)


def _devices(platform: Platform) -> Iterator[bytes]:
    for uid in range(len(platform.apic_ids)):
        yield _processor(uid)
    for index, port in enumerate(platform.serial):
        yield _serial(index, port)
    if platform.i8042:
        yield device("KBD", aml.eisa_id("PNP0303"), aml.io(0x60, 1), aml.io(0x64, 1), aml.irq_no_flags(1))
    if platform.rtc:
        yield device("RTC", aml.eisa_id("PNP0B00"), aml.io(0x70, 2), aml.irq_no_flags(8))
    for index, virtio in enumerate(platform.virtio):
        yield _virtio(index, virtio)
    reserved = [aml.io(platform.pm_port, PM_PORTS)]
    if platform.debug_exit_port is not None:
        reserved.append(aml.io(platform.debug_exit_port, _DEBUG_EXIT_PORTS))
    yield device("MBRS", aml.eisa_id("PNP0C02"), *reserved)


def dsdt(platform: Platform) -> bytes:
    r"""Build the DSDT: ``\_S5`` for shutting down, and the devices in ``\_SB``."""
    s5 = aml.name("_S5", aml.package(_SLP_TYP_S5, 0, 0, 0))
    return table(b"DSDT", _REVISION, s5 + aml.scope("_SB", *_devices(platform)))
