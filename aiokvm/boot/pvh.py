"""The PVH boot protocol: ``struct hvm_start_info`` (Xen, public/arch-x86/hvm/start_info.h, docs/misc/pvh)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from aiokvm.boot.e820 import memory_map
from aiokvm.boot.layout import CMDLINE, START_INFO

if TYPE_CHECKING:
    from aiokvm.boot.plan import GuestInfo

XEN_HVM_START_MAGIC_VALUE = 0x336E_C578
_VERSION = 1

_START_INFO = struct.Struct("<IIIIQQQQII")
_MODLIST_ENTRY = struct.Struct("<QQQQ")
_MEMMAP_ENTRY = struct.Struct("<QQII")


def start_info(guest: GuestInfo, *, initrd_gpa: int, initrd_size: int) -> bytes:
    """Return the start info to be put at ``START_INFO``, with the memory map and the module list behind it.

    The command line is expected at ``CMDLINE``; an ``initrd_size`` of 0 stands for no initrd. At most
    a page long. Raises ConfigError for RAM in too many ranges.
    """
    modules = [_MODLIST_ENTRY.pack(initrd_gpa, initrd_size, 0, 0)] if initrd_size else []
    memmap = [_MEMMAP_ENTRY.pack(*entry, 0) for entry in memory_map(guest)]
    modlist_gpa = START_INFO + _START_INFO.size
    memmap_gpa = modlist_gpa + len(modules) * _MODLIST_ENTRY.size
    info = _START_INFO.pack(
        XEN_HVM_START_MAGIC_VALUE,
        _VERSION,
        0,
        len(modules),
        modlist_gpa if modules else 0,
        CMDLINE,
        guest.rsdp,
        memmap_gpa,
        len(memmap),
        0,
    )
    return b"".join([info, *modules, *memmap])
