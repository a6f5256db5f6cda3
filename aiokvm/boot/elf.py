"""ELF kernels: the headers, what is to be loaded, and the PVH entry (System V ABI, chapters 4 and 5)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from aiokvm.errors import BootError

ELFMAG = b"\x7fELF"
EM_386 = 3
EM_X86_64 = 62
_ELFCLASS32, _ELFCLASS64 = 1, 2
_ELFDATA2LSB = 1
_ET_EXEC = 2
_PT_LOAD, _PT_NOTE = 1, 4

_XEN_ELFNOTE_PHYS32_ENTRY = 18
_XEN = b"Xen\0"

# A kernel has about five program headers and a few hundred bytes of notes. The limits bound the time that a
# hostile file takes.
_PHNUM_MAX = 64
_NOTES_MAX = 16384

# e_type to e_phnum.
_EHDR = {_ELFCLASS32: struct.Struct("<HHIIIIIHHH"), _ELFCLASS64: struct.Struct("<HHIQQQIHHH")}
_PHDR = {_ELFCLASS32: struct.Struct("<8I"), _ELFCLASS64: struct.Struct("<2I6Q")}
_EI_NIDENT = 16
_NHDR = struct.Struct("<III")


class LoadSegment(NamedTuple):
    """A PT_LOAD: ``data`` goes to the physical address ``paddr``, zeros follow up to ``memsz`` bytes."""

    paddr: int
    data: memoryview
    memsz: int


class _ProgramHeader(NamedTuple):
    type: int
    offset: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Elf(NamedTuple):
    """An ELF kernel whose headers were found to be consistent.

    ``pvh_entry`` is the address in the PVH note, None where there is none. Whether the segments fit
    into RAM is not known here.
    """

    machine: int
    entry: int
    pvh_entry: int | None
    segments: tuple[LoadSegment, ...]

    @classmethod
    def parse(cls, data: bytes) -> Elf:
        """Check ``data``, the whole file. Raises BootError if it is truncated, contradictory or not x86."""
        machine, entry, headers = _headers(data)
        view = memoryview(data)
        segments = []
        pvh_entry = None
        for i, header in enumerate(headers):
            if header.type not in (_PT_LOAD, _PT_NOTE):
                continue
            end = header.offset + header.filesz
            if end > len(data):
                raise BootError(
                    f"ELF: program header {i} has {header.filesz} bytes at {header.offset}, "
                    f"the file ends at {len(data)}"
                )
            content = view[header.offset : end]
            if header.type == _PT_NOTE:
                if pvh_entry is None:
                    pvh_entry = _find_pvh_entry(content, header.align)
            elif header.memsz < header.filesz:
                raise BootError(f"ELF: program header {i} has memsz {header.memsz} < filesz {header.filesz}")
            elif header.memsz:
                segments.append(LoadSegment(header.paddr, content, header.memsz))
        start = entry if pvh_entry is None else pvh_entry
        if not any(s.paddr <= start < s.paddr + len(s.data) for s in segments):
            raise BootError(f"ELF: the entry {start:#x} is not the physical address of loaded code")
        return cls(machine, entry, pvh_entry, tuple(segments))


def _headers(data: bytes) -> tuple[int, int, list[_ProgramHeader]]:
    elf_class, encoding, version = data[4:7] if len(data) >= 7 else (0, 0, 0)
    if data[:4] != ELFMAG or elf_class not in _EHDR or encoding != _ELFDATA2LSB or version != 1:
        raise BootError(f"ELF: not a little-endian ELF file: it begins with {data[:7].hex(' ') or 'nothing'}")
    ehdr, phdr = _EHDR[elf_class], _PHDR[elf_class]
    if len(data) < _EI_NIDENT + ehdr.size:
        raise BootError(f"ELF: the file has {len(data)} bytes and ends inside its header")
    e_type, machine, _, entry, phoff, _, _, _, phentsize, phnum = ehdr.unpack_from(data, _EI_NIDENT)
    if machine != (EM_X86_64 if elf_class == _ELFCLASS64 else EM_386):
        raise BootError(f"ELF: machine {machine} in class {elf_class}: need x86-64 (62) or i386 (3)")
    if e_type != _ET_EXEC:
        raise BootError(f"ELF: type {e_type}, need an executable (2)")
    if phentsize != phdr.size or not 1 <= phnum <= _PHNUM_MAX:
        raise BootError(
            f"ELF: {phnum} program headers of {phentsize} bytes, need 1 to {_PHNUM_MAX} of {phdr.size}"
        )
    if phoff + phnum * phentsize > len(data):
        raise BootError(f"ELF: {phnum} program headers at {phoff}, but the file ends at {len(data)}")
    headers = []
    for values in phdr.iter_unpack(data[phoff : phoff + phnum * phentsize]):
        if elf_class == _ELFCLASS64:
            kind, _, offset, _, paddr, filesz, memsz, align = values
        else:
            kind, offset, _, paddr, filesz, memsz, _, align = values
        headers.append(_ProgramHeader(kind, offset, paddr, filesz, memsz, align))
    return machine, entry, headers


def _find_pvh_entry(notes: memoryview, alignment: int) -> int | None:
    if len(notes) > _NOTES_MAX:
        raise BootError(f"ELF: {len(notes)} bytes of notes, a kernel has at most {_NOTES_MAX}")
    align = 8 if alignment == 8 else 4
    at = 0
    while at + _NHDR.size <= len(notes):
        namesz, descsz, kind = _NHDR.unpack_from(notes, at)
        name = at + _NHDR.size
        desc = (name + namesz + align - 1) & -align
        end = desc + descsz
        if end > len(notes):
            raise BootError(f"ELF: the note at {at} ends at {end}, the notes at {len(notes)}")
        if kind == _XEN_ELFNOTE_PHYS32_ENTRY and notes[name : name + namesz] == _XEN:
            if descsz not in (4, 8):
                raise BootError(f"ELF: the PVH entry has {descsz} bytes, need 4 or 8")
            return int.from_bytes(notes[desc:end], "little")
        at = (end + align - 1) & -align
    return None
