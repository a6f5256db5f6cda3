"""The modes in which a guest is entered: registers, and the structures in memory that they need.

Segments are flat; the GDT holds code at selector 0x10 and data at 0x18, as Linux's boot protocols demand
(Documentation/arch/x86/boot.rst, "32-bit Boot Protocol", "64-bit Boot Protocol"). Interrupts are off and
the IDT of protected and long mode is empty: an exception there is a triple fault.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from aiokvm.boot.cpu import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    CpuState,
    DescriptorTable,
    SegmentRegister,
)
from aiokvm.boot.layout import FOUR_GIB, GDT, PAGE_SIZE, PAGE_TABLES, STACK, STACK_SIZE

if TYPE_CHECKING:
    from aiokvm.boot.plan import PlanBuilder

_CODE, _DATA, _TSS_BUSY = 0xB, 0x3, 0xB

CODE_32 = SegmentRegister(selector=0x10, limit=0xFFFF_FFFF, type=_CODE, s=1, present=1, db=1, g=1)
CODE_64 = SegmentRegister(selector=0x10, limit=0xFFFF_FFFF, type=_CODE, s=1, present=1, l=1, g=1)
DATA = SegmentRegister(selector=0x18, limit=0xFFFF_FFFF, type=_DATA, s=1, present=1, db=1, g=1)
# VMX enters no guest without a busy TSS; the size is the one that the PVH protocol names.
TSS = SegmentRegister(limit=0x67, type=_TSS_BUSY, present=1)
NO_LDT = SegmentRegister(unusable=1)

_PTE_PRESENT, _PTE_WRITABLE, _PDE_2MIB = 1 << 0, 1 << 1, 1 << 7
_TWO_MIB = 1 << 21
_PAGE_DIRECTORIES = 4


def real_mode(builder: PlanBuilder, entry: int) -> CpuState:
    """Enter ``entry``, below 1 MiB, in real mode, with SS:SP at the end of the stack.

    Below 64 KiB CS is 0 and IP the address, above it CS is the paragraph; DS, ES, FS and GS are as CS.
    """
    builder.claim("the stack", STACK, STACK_SIZE)
    selector, ip = (0, entry) if entry < 0x1_0000 else (entry >> 4, entry & 0xF)
    data = _real_segment(selector, _DATA)
    return CpuState(
        rip=ip,
        rsp=STACK_SIZE - 16,
        cr0=CR0_ET,
        cs=_real_segment(selector, _CODE),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=_real_segment(STACK >> 4, _DATA),
        tr=TSS,
        ldt=NO_LDT,
        gdt=DescriptorTable(0, 0xFFFF),
        idt=DescriptorTable(0, 0xFFFF),
    )


def protected_mode(builder: PlanBuilder, entry: int, *, rbx: int = 0, rsi: int = 0) -> CpuState:
    """Enter ``entry`` in 32-bit protected mode with paging off."""
    return _flat(builder, entry, CODE_32, cr0=CR0_ET | CR0_PE, rbx=rbx, rsi=rsi)


def long_mode(builder: PlanBuilder, entry: int, *, rsi: int = 0) -> CpuState:
    """Enter ``entry`` in 64-bit mode, the first 4 GiB mapped to themselves in pages of 2 MiB."""
    builder.copy("the page tables", PAGE_TABLES, identity_map(PAGE_TABLES))
    return _flat(
        builder,
        entry,
        CODE_64,
        cr0=CR0_ET | CR0_PE | CR0_PG,
        cr3=PAGE_TABLES,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
        rsi=rsi,
    )


def descriptor(segment: SegmentRegister) -> int:
    """Return the 8-byte descriptor of a code or data segment (Intel SDM volume 3, section 3.4.5)."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    low = limit & 0xFFFF | (segment.base & 0xFF_FFFF) << 16 | access << 40
    return low | (limit >> 16) << 48 | flags << 52 | (segment.base >> 24) << 56


def identity_map(gpa: int) -> bytes:
    """Return page tables to be put at ``gpa`` that map 4 GiB (SDM volume 3, section 4.5)."""
    flags = _PTE_PRESENT | _PTE_WRITABLE
    pdpt = gpa + PAGE_SIZE
    directories = [pdpt + PAGE_SIZE * (i + 1) | flags for i in range(_PAGE_DIRECTORIES)]
    pages = [address | flags | _PDE_2MIB for address in range(0, FOUR_GIB, _TWO_MIB)]
    return _table([pdpt | flags]) + _table(directories) + _table(pages)


def _table(entries: list[int]) -> bytes:
    data = struct.pack(f"<{len(entries)}Q", *entries)
    return data + bytes(-len(data) % PAGE_SIZE)


def _real_segment(selector: int, kind: int) -> SegmentRegister:
    return SegmentRegister(selector=selector, base=selector << 4, limit=0xFFFF, type=kind, s=1, present=1)


def _flat(
    builder: PlanBuilder,
    entry: int,
    code: SegmentRegister,
    *,
    cr0: int,
    cr3: int = 0,
    cr4: int = 0,
    efer: int = 0,
    rbx: int = 0,
    rsi: int = 0,
) -> CpuState:
    gdt = struct.pack("<4Q", 0, 0, descriptor(code), descriptor(DATA))
    builder.copy("the GDT", GDT, gdt)
    builder.claim("the stack", STACK, STACK_SIZE)
    return CpuState(
        rip=entry,
        rsp=STACK + STACK_SIZE,
        rbx=rbx,
        rsi=rsi,
        cr0=cr0,
        cr3=cr3,
        cr4=cr4,
        efer=efer,
        cs=code,
        ds=DATA,
        es=DATA,
        fs=DATA,
        gs=DATA,
        ss=DATA,
        tr=TSS,
        ldt=NO_LDT,
        gdt=DescriptorTable(GDT, len(gdt) - 1),
        idt=DescriptorTable(0, 0),
    )
