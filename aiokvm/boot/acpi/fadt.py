"""The FADT: fixed power management hardware and the addresses of DSDT and FACS (ACPI 6.5, section 5.2.9)."""

from __future__ import annotations

from enum import IntFlag
from struct import pack
from typing import TYPE_CHECKING

from aiokvm.boot.acpi.table import table

if TYPE_CHECKING:
    from aiokvm.boot.acpi.config import Platform

_REVISION = 6
_MINOR_VERSION = 5

_PM1_EVT_LEN = 4
_PM1_CNT_LEN = 2
_PM1_CNT = 4
_RESET_REG = 8
_RESET_VALUE = 1

# Latencies in us above which the specification says that the state is not supported.
_NO_C2 = 101
_NO_C3 = 1001

_CMOS_CENTURY = 0x32

_SYSTEM_IO = 1
_BYTE_ACCESS = 1
_WORD_ACCESS = 2
_NO_REGISTER = bytes(12)


class Flags(IntFlag):
    """Fixed feature flags (table 5.10)."""

    WBINVD = 1 << 0
    PROC_C1 = 1 << 2
    SLP_BUTTON = 1 << 5
    FIX_RTC = 1 << 6
    RESET_REG_SUP = 1 << 10


class BootArch(IntFlag):
    """IA-PC boot architecture flags (table 5.11)."""

    LEGACY_DEVICES = 1 << 0
    I8042 = 1 << 1
    VGA_NOT_PRESENT = 1 << 2
    CMOS_RTC_NOT_PRESENT = 1 << 5


def _io_register(port: int, length: int, access: int) -> bytes:
    """Encode a generic address structure of ``length`` bytes of I/O ports (5.2.3.2)."""
    return pack("<BBBBQ", _SYSTEM_IO, 8 * length, 0, access, port)


def fadt(platform: Platform, facs: int, dsdt: int) -> bytes:
    """Build the FADT, 276 bytes, of hardware that is always in ACPI mode; both addresses are below 4 GiB."""
    pm1_evt = platform.pm_port
    pm1_cnt = platform.pm_port + _PM1_CNT

    # PWR_BUTTON clear: PM1 has a power button. SLP_BUTTON, FIX_RTC set: no sleep button, no alarm.
    flags = Flags.WBINVD | Flags.PROC_C1 | Flags.SLP_BUTTON | Flags.FIX_RTC | Flags.RESET_REG_SUP
    boot_arch = BootArch.LEGACY_DEVICES | BootArch.VGA_NOT_PRESENT
    if platform.i8042:
        boot_arch |= BootArch.I8042
    if not platform.rtc:
        boot_arch |= BootArch.CMOS_RTC_NOT_PRESENT

    fields = (
        pack("<II", facs, dsdt),  # FIRMWARE_CTRL, DSDT
        pack("<BBH", 0, 0, platform.sci_gsi),  # reserved, Preferred_PM_Profile (unspecified), SCI_INT
        pack("<IBBBB", 0, 0, 0, 0, 0),  # SMI_CMD (none), ACPI_ENABLE, ACPI_DISABLE, S4BIOS_REQ, PSTATE_CNT
        pack("<II", pm1_evt, 0),  # PM1a_EVT_BLK, PM1b_EVT_BLK
        pack("<II", pm1_cnt, 0),  # PM1a_CNT_BLK, PM1b_CNT_BLK
        pack("<IIII", 0, 0, 0, 0),  # PM2_CNT_BLK, PM_TMR_BLK, GPE0_BLK, GPE1_BLK
        pack("<BBBB", _PM1_EVT_LEN, _PM1_CNT_LEN, 0, 0),  # ..., PM2_CNT_LEN, PM_TMR_LEN
        pack("<BBBB", 0, 0, 0, 0),  # GPE0_BLK_LEN, GPE1_BLK_LEN, GPE1_BASE, CST_CNT
        pack("<HH", _NO_C2, _NO_C3),  # P_LVL2_LAT, P_LVL3_LAT
        pack("<HHBB", 0, 0, 0, 0),  # FLUSH_SIZE, FLUSH_STRIDE, DUTY_OFFSET, DUTY_WIDTH
        pack("<BBB", 0, 0, _CMOS_CENTURY if platform.rtc else 0),  # DAY_ALRM, MON_ALRM, CENTURY
        pack("<HBI", boot_arch, 0, flags),  # IAPC_BOOT_ARCH, reserved, Flags
        _io_register(platform.pm_port + _RESET_REG, 1, _BYTE_ACCESS),  # RESET_REG
        pack("<BHB", _RESET_VALUE, 0, _MINOR_VERSION),  # RESET_VALUE, ARM_BOOT_ARCH, FADT Minor Version
        pack("<QQ", facs, dsdt),  # X_FIRMWARE_CTRL, X_DSDT
        _io_register(pm1_evt, _PM1_EVT_LEN, _WORD_ACCESS),  # X_PM1a_EVT_BLK
        _NO_REGISTER,  # X_PM1b_EVT_BLK
        _io_register(pm1_cnt, _PM1_CNT_LEN, _WORD_ACCESS),  # X_PM1a_CNT_BLK
        _NO_REGISTER,  # X_PM1b_CNT_BLK
        _NO_REGISTER * 4,  # X_PM2_CNT_BLK, X_PM_TMR_BLK, X_GPE0_BLK, X_GPE1_BLK
        _NO_REGISTER * 2,  # SLEEP_CONTROL_REG, SLEEP_STATUS_REG
        b"AIOKVM\0\0",  # Hypervisor Vendor Identity
    )
    return table(b"FACP", _REVISION, b"".join(fields))
