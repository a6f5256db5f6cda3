"""bzImage: the setup header of a compressed Linux kernel (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from aiokvm.boot import zeropage as zp
from aiokvm.boot.layout import FOUR_GIB, HIGH_MEMORY
from aiokvm.errors import BootError

_SECTOR = 512
_PARAGRAPH = 16
# The 64-bit entry, from the start of the protected-mode code.
_ENTRY_64 = 0x200
# The last field that each protocol version has, and which is needed here.
_CMDLINE_SIZE_END = zp.CMDLINE_SIZE + 4
_PAYLOAD_END = zp.PAYLOAD_LENGTH + 4
_INIT_SIZE_END = zp.INIT_SIZE + 4


class BzImage(NamedTuple):
    """A bzImage that was found to be consistent.

    ``setup`` is the setup header from offset 0x1f1 on, ``code`` the protected-mode kernel, which goes to
    ``load``. The kernel unpacks itself to ``runtime`` and needs ``init_size`` bytes there, before it can
    know what else is in memory. ``cmdline_size`` is in bytes, without the terminating NUL.
    """

    setup: bytes
    code: memoryview
    load: int
    runtime: int
    init_size: int
    entry: int
    is_64bit: bool
    cmdline_size: int
    initrd_addr_max: int

    @classmethod
    def parse(cls, data: bytes) -> BzImage:
        """Check ``data``, the whole file. Raises BootError if it is truncated, contradictory or too old."""
        version, setup = _setup_header(data)
        code = _protected_mode_code(data, version)
        load = runtime = HIGH_MEMORY
        init_size = len(code)
        if version >= 0x020A:
            runtime, init_size = struct.unpack_from("<QI", data, zp.PREF_ADDRESS)
        if data[zp.RELOCATABLE_KERNEL]:
            (alignment,) = struct.unpack_from("<I", data, zp.KERNEL_ALIGNMENT)
            if alignment.bit_count() != 1:
                raise BootError(f"bzImage: kernel_alignment {alignment:#x} is not a power of two")
            load = runtime = (runtime + alignment - 1) & -alignment
        if not HIGH_MEMORY <= runtime <= FOUR_GIB - max(init_size, len(code)):
            raise BootError(
                f"bzImage: the kernel wants to run at {runtime:#x} with init_size {init_size:#x}, "
                "which is not between 1 MiB and 4 GiB"
            )
        (xloadflags,) = struct.unpack_from("<H", data, zp.XLOADFLAGS)
        is_64bit = version >= 0x020C and bool(xloadflags & zp.XLF_KERNEL_64)
        if is_64bit and len(code) <= _ENTRY_64:
            raise BootError(
                f"bzImage: {len(code)} bytes of code end before the 64-bit entry at {_ENTRY_64:#x}"
            )
        (initrd_addr_max,) = struct.unpack_from("<I", data, zp.INITRD_ADDR_MAX)
        (cmdline_size,) = struct.unpack_from("<I", data, zp.CMDLINE_SIZE)
        return cls(
            setup=setup,
            code=code,
            load=load,
            runtime=runtime,
            init_size=init_size,
            entry=load + (_ENTRY_64 if is_64bit else 0),
            is_64bit=is_64bit,
            cmdline_size=cmdline_size,
            initrd_addr_max=initrd_addr_max,
        )

    @property
    def span(self) -> tuple[int, int]:
        """The (gpa, size in bytes) that the kernel needs for itself, loaded and unpacked."""
        end = max(self.load + len(self.code), self.runtime + self.init_size)
        start = min(self.load, self.runtime)
        return start, end - start


def _setup_header(data: bytes) -> tuple[int, bytes]:
    if len(data) < _CMDLINE_SIZE_END:
        raise BootError(f"bzImage: the file has {len(data)} bytes and ends inside its setup header")
    (boot_flag,) = struct.unpack_from("<H", data, zp.BOOT_FLAG)
    if boot_flag != zp.BOOT_MAGIC:
        raise BootError(f"bzImage: boot_flag is {boot_flag:#06x}, not {zp.BOOT_MAGIC:#06x}")
    (version,) = struct.unpack_from("<H", data, zp.VERSION)
    if version < 0x0206:
        raise BootError(
            f"bzImage: boot protocol {version >> 8}.{version & 0xFF:02}, need 2.06 (Linux 2.6.22) or later"
        )
    if not data[zp.LOADFLAGS] & zp.LOADED_HIGH:
        raise BootError("bzImage: a zImage, which loads below 1 MiB: build a bzImage")
    end = zp.HEADER + data[zp.JUMP_OFFSET]
    needed = _CMDLINE_SIZE_END
    if version >= 0x0208:
        needed = _PAYLOAD_END
    if version >= 0x020A:
        needed = _INIT_SIZE_END
    if not needed <= end <= zp.SETUP_END_MAX:
        raise BootError(
            f"bzImage: the setup header ends at {end:#x}; protocol {version >> 8}.{version & 0xFF:02} "
            f"needs {needed:#x}, boot_params has room to {zp.SETUP_END_MAX:#x}"
        )
    if len(data) < end:
        raise BootError(f"bzImage: the file has {len(data)} bytes, its setup header ends at {end}")
    return version, data[zp.SETUP_SECTS : end]


def _protected_mode_code(data: bytes, version: int) -> memoryview:
    # A setup_sects of 0 means 4, and the boot sector is not counted.
    start = ((data[zp.SETUP_SECTS] or 4) + 1) * _SECTOR
    (syssize,) = struct.unpack_from("<I", data, zp.SYSSIZE)
    size = syssize * _PARAGRAPH
    if not size:
        raise BootError("bzImage: syssize is 0, there is no kernel in the file")
    # The file may end within the last paragraph: the rest of it is padding.
    if start + size - (_PARAGRAPH - 1) > len(data):
        raise BootError(
            f"bzImage: truncated: setup_sects and syssize say {start} + {size} bytes, "
            f"the file has {len(data)}"
        )
    there = min(size, len(data) - start)
    if version >= 0x0208:
        offset, length = struct.unpack_from("<II", data, zp.PAYLOAD_OFFSET)
        if offset + length > there:
            raise BootError(
                f"bzImage: the payload ({length} bytes at {offset}) goes beyond the kernel's {there} bytes"
            )
    if there < size:
        return memoryview(data[start:] + bytes(size - there))
    return memoryview(data)[start : start + size]
