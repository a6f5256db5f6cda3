"""The boot processor's initial registers, with the field names of ``struct kvm_regs`` and ``kvm_sregs``."""

from __future__ import annotations

from dataclasses import dataclass

from aiokvm.arguments import checked_init

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10


@checked_init
@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRegister:
    """A segment register with its hidden part (``struct kvm_segment``); ``limit`` is in bytes."""

    selector: int = 0
    base: int = 0
    limit: int = 0
    type: int = 0
    s: int = 0
    dpl: int = 0
    present: int = 0
    l: int = 0  # noqa: E741
    db: int = 0
    g: int = 0
    avl: int = 0
    unusable: int = 0


@checked_init
@dataclass(frozen=True, slots=True)
class DescriptorTable:
    """GDTR or IDTR (``struct kvm_dtable``); ``limit`` is the offset of the last byte."""

    base: int
    limit: int


@checked_init
@dataclass(frozen=True, slots=True, kw_only=True)
class CpuState:
    """The boot processor's registers, all general ones among them, before its first instruction."""

    rip: int
    rsp: int
    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rflags: int = 2
    cr0: int
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    cs: SegmentRegister
    ds: SegmentRegister
    es: SegmentRegister
    fs: SegmentRegister
    gs: SegmentRegister
    ss: SegmentRegister
    tr: SegmentRegister
    ldt: SegmentRegister
    gdt: DescriptorTable
    idt: DescriptorTable
