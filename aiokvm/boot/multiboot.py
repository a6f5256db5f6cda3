"""Multiboot: kernels of hobby and research systems (Multiboot Specification 0.6.96).

Section numbers are those of the specification.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aiokvm.arguments import checked_init
from aiokvm.boot.e820 import memory_map
from aiokvm.boot.elf import Elf
from aiokvm.boot.entry import protected_mode
from aiokvm.boot.layout import CMDLINE, CMDLINE_SIZE, FOUR_GIB, HIGH_MEMORY, PAGE_SIZE, START_INFO
from aiokvm.boot.plan import PlanBuilder
from aiokvm.errors import BootError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from aiokvm.boot.plan import BootPlan, GuestInfo

# 3.1: where the header may be, and what is in it.
_SEARCH_BYTES = 8192
_HEADER_MAGIC = 0x1BAD_B002
_HEADER = struct.Struct("<3I")
_ADDRESSES = struct.Struct("<5I")
_PAGE_ALIGN, _MEMORY_INFO, _ADDRESSES_VALID = 1 << 0, 1 << 1, 1 << 16
# A kernel may ask for what bits 0 to 15 mean, and is to be refused what its loader does not know.
_MUST_KNOW = 0xFFFF

# 3.2 and 3.3: what the kernel finds in EAX, and where EBX leads.
_LOADER_MAGIC = 0x2BAD_B002
_INFO_SIZE = 88
_INFO_MEMORY, _INFO_CMDLINE, _INFO_MODS, _INFO_MMAP, _INFO_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_MODULE = struct.Struct("<4I")
_MMAP_ENTRY = struct.Struct("<IQQI")
_LOADER_NAME = b"aiokvm\0"
# Up to the page tables of long mode, which is not entered here.
_INFO_AREA_SIZE = PAGE_SIZE


class _Part(NamedTuple):
    """``data`` goes to ``gpa``, zeros follow up to ``size`` bytes."""

    gpa: int
    data: memoryview
    size: int


@checked_init
@dataclass(frozen=True)
class Multiboot:
    """Boot a Multiboot kernel: an ELF file, or another whose header says what goes where.

    ``modules`` are files that the kernel finds in memory: a path each, or a pair of a path and the string
    that the kernel is given with it, which else is the path's last part.

    Raises ConfigError for text with a NUL or that UTF-8 cannot express.
    """

    kernel: str | PathLike[str]
    cmdline: str = ""
    modules: Sequence[str | PathLike[str] | tuple[str | PathLike[str], str]] = ()

    def __post_init__(self) -> None:
        for text in (self.cmdline, *(string for _, string in self._modules())):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"{text!r} cannot be encoded as UTF-8 at position {error.start}") from error
            if "\0" in text:
                raise ConfigError(f"{text!r} has a NUL: remove it")

    def _modules(self) -> list[tuple[Path, str]]:
        pairs = (one if isinstance(one, tuple) else (one, Path(one).name) for one in self.modules)
        return [(Path(path), string) for path, string in pairs]

    def files(self) -> tuple[Path, ...]:
        """Return the kernel and the modules."""
        return (Path(self.kernel), *(path for path, _ in self._modules()))

    def plan(self, files: Mapping[Path, bytes], guest: GuestInfo) -> BootPlan:
        """Return what goes where in ``guest``'s RAM, and the registers of 3.2.

        Raises BootError for a kernel that is none, that asks for what is not there, or that does not fit.
        """
        builder = PlanBuilder(guest)
        entry, parts = _parse(files[Path(self.kernel)])
        for number, part in enumerate(parts):
            builder.copy(f"part {number} of the kernel", part.gpa, part.data, part.size)
        cmdline = self.cmdline.encode() + b"\0"
        if len(cmdline) > CMDLINE_SIZE:
            raise BootError(f"cmdline has {len(cmdline)} bytes with its NUL, {CMDLINE_SIZE} at most fit")
        builder.copy("the command line", CMDLINE, cmdline)
        modules = [
            (_place(builder, path, files[path]), len(files[path]), string.encode() + b"\0")
            for path, string in self._modules()
        ]
        builder.copy("the Multiboot information", START_INFO, _information(guest, modules))
        cpu = protected_mode(builder, entry, rbx=START_INFO)
        return builder.build(replace(cpu, rax=_LOADER_MAGIC))


def _parse(data: bytes) -> tuple[int, list[_Part]]:
    """The entry, and what goes where."""
    at, flags = _find_header(data)
    if unknown := flags & _MUST_KNOW & ~(_PAGE_ALIGN | _MEMORY_INFO):
        raise BootError(f"Multiboot: the kernel needs what flags {unknown:#x} stand for; there is no display")
    if not flags & _ADDRESSES_VALID:
        elf = Elf.parse(data)
        return elf.entry, [_Part(*segment) for segment in elf.segments]
    if len(data) < at + _HEADER.size + _ADDRESSES.size:
        raise BootError("Multiboot: the file ends inside its header")
    header, load, load_end, bss_end, entry = _ADDRESSES.unpack_from(data, at + _HEADER.size)
    start = at - (header - load)
    size = (load_end or load + len(data) - start) - load
    if not 0 <= start <= start + size <= len(data) or (bss_end and bss_end < load + size):
        raise BootError(
            f"Multiboot: the header says that {size} bytes from {start} go to {load:#x}, "
            f"with zeros up to {bss_end:#x}; the file has {len(data)}"
        )
    if not load <= entry < load + size:
        raise BootError(f"Multiboot: the entry {entry:#x} is not in what is loaded to {load:#x}")
    content = memoryview(data)[start : start + size]
    return entry, [_Part(load, content, max(size, bss_end - load))]


def _find_header(data: bytes) -> tuple[int, int]:
    """Where the header is, and its flags."""
    for at in range(0, min(len(data), _SEARCH_BYTES) - _HEADER.size + 1, 4):
        magic, flags, checksum = _HEADER.unpack_from(data, at)
        if magic == _HEADER_MAGIC and not (magic + flags + checksum) & 0xFFFF_FFFF:
            return at, flags
    raise BootError(f"Multiboot: no header in the first {_SEARCH_BYTES} of the kernel's {len(data)} bytes")


def _place(builder: PlanBuilder, path: Path, data: bytes) -> int:
    gpa = builder.highest(len(data), FOUR_GIB)
    if gpa is None:
        raise BootError(
            f"the module {path} ({len(data)} bytes) does not fit into RAM beside the rest: "
            "give the machine more memory"
        )
    builder.copy(f"the module {path}", gpa, data)
    return gpa


def _information(guest: GuestInfo, modules: list[tuple[int, int, bytes]]) -> bytes:
    """The structure of 3.3, to be put at START_INFO, and what it points to."""
    entries = [_MMAP_ENTRY.pack(_MMAP_ENTRY.size - 4, *entry) for entry in memory_map(guest)]
    mmap = b"".join(entries)
    mods_gpa = START_INFO + _INFO_SIZE
    mmap_gpa = mods_gpa + _MODULE.size * len(modules)
    name_gpa = mmap_gpa + len(mmap)
    string_gpa = name_gpa + len(_LOADER_NAME)
    mods = b""
    for gpa, size, string in modules:
        mods += _MODULE.pack(gpa, gpa + size, string_gpa, 0)
        string_gpa += len(string)
    low, above = guest.ram[0][1], max(0, guest.ram[0][1] - HIGH_MEMORY)
    info = struct.pack(
        "<13I12x2I16x",
        _INFO_MEMORY | _INFO_CMDLINE | _INFO_MODS | _INFO_MMAP | _INFO_NAME,
        min(low, 640 << 10) >> 10,
        above >> 10,
        0,
        CMDLINE,
        len(modules),
        mods_gpa,
        *(0, 0, 0, 0),
        len(mmap),
        mmap_gpa,
        name_gpa,
        0,
    )
    data = b"".join([info, mods, mmap, _LOADER_NAME, *(string for _, _, string in modules)])
    if len(data) > _INFO_AREA_SIZE:
        raise BootError(f"{len(modules)} modules with their strings take more than {_INFO_AREA_SIZE} bytes")
    return data
