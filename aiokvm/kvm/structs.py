"""What every machine sets of a vCPU, as the structures of asm/kvm.h spell it (KVM API, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from aiokvm.kvm.convert import Struct


@dataclass(frozen=True, slots=True)
class Regs(Struct):
    """General registers (struct kvm_regs)."""

    c_name: ClassVar[str] = "kvm_regs"
    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


@dataclass(frozen=True, slots=True)
class Segment(Struct):
    """A segment register with its hidden part (struct kvm_segment); ``limit`` in bytes whatever ``g`` is."""

    c_name: ClassVar[str] = "kvm_segment"
    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the UAPI's spelling
    g: int = 0
    avl: int = 0
    unusable: int = 0


@dataclass(frozen=True, slots=True)
class DTable(Struct):
    """GDTR or IDTR (struct kvm_dtable)."""

    c_name: ClassVar[str] = "kvm_dtable"
    base: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Sregs(Struct):
    """Segments, descriptor tables and control registers (struct kvm_sregs).

    ``interrupt_bitmap`` has one bit, at most, for the pending external interrupt: 4 numbers of 64 bits.
    """

    c_name: ClassVar[str] = "kvm_sregs"
    cs: Segment = Segment()
    ds: Segment = Segment()
    es: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ss: Segment = Segment()
    tr: Segment = Segment()
    ldt: Segment = Segment()
    gdt: DTable = DTable()
    idt: DTable = DTable()
    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0
    interrupt_bitmap: tuple[int, ...] = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class MsrEntry(Struct):
    """A model specific register and its value (struct kvm_msr_entry)."""

    c_name: ClassVar[str] = "kvm_msr_entry"
    index: int
    data: int = 0


@dataclass(frozen=True, slots=True)
class CpuidEntry(Struct):
    """What CPUID answers (struct kvm_cpuid_entry2).

    ``index`` (ECX) counts only where ``flags`` has KVM_CPUID_FLAG_SIGNIFICANT_INDEX.
    """

    c_name: ClassVar[str] = "kvm_cpuid_entry2"
    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class MpState(IntEnum):
    """Whether a vCPU runs, sleeps or waits for a start-up interrupt (KVM API, section 4.38)."""

    KVM_MP_STATE_RUNNABLE = 0
    KVM_MP_STATE_UNINITIALIZED = 1
    KVM_MP_STATE_INIT_RECEIVED = 2
    KVM_MP_STATE_HALTED = 3
    KVM_MP_STATE_SIPI_RECEIVED = 4
    KVM_MP_STATE_STOPPED = 5
    KVM_MP_STATE_CHECK_STOP = 6
    KVM_MP_STATE_OPERATING = 7
    KVM_MP_STATE_LOAD = 8
    KVM_MP_STATE_AP_RESET_HOLD = 9
    KVM_MP_STATE_SUSPENDED = 10
