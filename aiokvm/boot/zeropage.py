"""The zero page, ``struct boot_params`` (Documentation/arch/x86/zero-page.rst, boot.rst).

The setup header lies at the same offsets in the zero page and in a bzImage; its fields are named here.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from aiokvm.boot.e820 import memory_map
from aiokvm.boot.layout import CMDLINE, PAGE_SIZE

if TYPE_CHECKING:
    from aiokvm.boot.plan import GuestInfo

ACPI_RSDP_ADDR = 0x070
E820_ENTRIES = 0x1E8
E820_TABLE = 0x2D0

SETUP_SECTS = 0x1F1
SYSSIZE = 0x1F4
VID_MODE = 0x1FA
BOOT_FLAG = 0x1FE
JUMP_OFFSET = 0x201
HEADER = 0x202
VERSION = 0x206
TYPE_OF_LOADER = 0x210
LOADFLAGS = 0x211
CODE32_START = 0x214
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
EXT_LOADER_VER = 0x226
EXT_LOADER_TYPE = 0x227
CMD_LINE_PTR = 0x228
INITRD_ADDR_MAX = 0x22C
KERNEL_ALIGNMENT = 0x230
RELOCATABLE_KERNEL = 0x234
XLOADFLAGS = 0x236
CMDLINE_SIZE = 0x238
PAYLOAD_OFFSET = 0x248
PAYLOAD_LENGTH = 0x24C
PREF_ADDRESS = 0x258
INIT_SIZE = 0x260
# What follows the setup header in struct boot_params (edd_mbr_sig_buffer).
SETUP_END_MAX = 0x290

BOOT_MAGIC = 0xAA55
HEADER_MAGIC = b"HdrS"
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
_LOADER_UNDEFINED = 0xFF
_VIDEO_NORMAL = 0xFFFF


def zero_page(guest: GuestInfo, setup: bytes, *, load: int, initrd_gpa: int, initrd_size: int) -> bytes:
    """Return the 4096 bytes of the zero page for a kernel at ``load``.

    ``setup`` is the kernel's setup header, from offset 0x1f1 on; the command line is expected at ``CMDLINE``.
    Raises ConfigError for RAM in too many ranges.
    """
    page = bytearray(PAGE_SIZE)
    page[SETUP_SECTS : SETUP_SECTS + len(setup)] = setup
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, guest.rsdp)
    struct.pack_into("<H", page, VID_MODE, _VIDEO_NORMAL)
    page[TYPE_OF_LOADER] = _LOADER_UNDEFINED
    page[EXT_LOADER_VER] = page[EXT_LOADER_TYPE] = 0
    page[LOADFLAGS] = LOADED_HIGH
    struct.pack_into("<III", page, CODE32_START, load, initrd_gpa, initrd_size)
    struct.pack_into("<I", page, CMD_LINE_PTR, CMDLINE)
    entries = memory_map(guest)
    page[E820_ENTRIES] = len(entries)
    for i, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * i, *entry)
    return bytes(page)


def minimal_setup() -> bytes:
    """Return a setup header for a kernel that comes without one, an ELF vmlinux."""
    page = bytearray(CMDLINE_SIZE + 4)
    struct.pack_into("<H", page, BOOT_FLAG, BOOT_MAGIC)
    # 2.12, the protocol that brought the 64-bit entry; the kernel only looks for setup_data, which is 0.
    struct.pack_into("<4sH", page, HEADER, HEADER_MAGIC, 0x020C)
    return bytes(page[SETUP_SECTS:])
