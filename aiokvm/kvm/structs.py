"""The state of a vCPU, as the structures of asm/kvm.h spell it (KVM API, section 4)."""

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
class Sregs2(Struct):
    """Sregs with the PAE page directory pointers instead of the pending interrupt (struct kvm_sregs2).

    ``pdptrs`` count only where ``flags`` has KVM_SREGS2_FLAGS_PDPTRS_VALID.
    """

    c_name: ClassVar[str] = "kvm_sregs2"
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
    flags: int = 0
    pdptrs: tuple[int, ...] = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Fpu(Struct):
    """x87 and SSE registers (struct kvm_fpu): 8 of 16 bytes in ``fpr``, 16 of 16 bytes in ``xmm``.

    x86 KVM neither gives nor takes ``mxcsr`` here: it is in the XSAVE state.
    """

    c_name: ClassVar[str] = "kvm_fpu"
    fpr: tuple[bytes, ...] = (bytes(16),) * 8
    fcw: int = 0x37F
    fsw: int = 0
    ftwx: int = 0
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    xmm: tuple[bytes, ...] = (bytes(16),) * 16
    mxcsr: int = 0x1F80


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


@dataclass(frozen=True, slots=True)
class EventException(Struct):
    """The exception of VcpuEvents; ``nr`` is its vector."""

    injected: int = 0
    nr: int = 0
    has_error_code: int = 0
    pending: int = 0
    error_code: int = 0


@dataclass(frozen=True, slots=True)
class EventInterrupt(Struct):
    """The interrupt of VcpuEvents; ``nr`` is its vector, ``shadow`` of KVM_X86_SHADOW_INT_*."""

    injected: int = 0
    nr: int = 0
    soft: int = 0
    shadow: int = 0


@dataclass(frozen=True, slots=True)
class EventNmi(Struct):
    """The NMI of VcpuEvents."""

    injected: int = 0
    pending: int = 0
    masked: int = 0


@dataclass(frozen=True, slots=True)
class EventSmi(Struct):
    """System management mode in VcpuEvents."""

    smm: int = 0
    pending: int = 0
    smm_inside_nmi: int = 0
    latched_init: int = 0


@dataclass(frozen=True, slots=True)
class EventTripleFault(Struct):
    """A triple fault that waits in VcpuEvents."""

    pending: int = 0


@dataclass(frozen=True, slots=True)
class VcpuEvents(Struct):
    """What waits to be delivered (struct kvm_vcpu_events); KVM_VCPUEVENT_VALID_* say what counts."""

    c_name: ClassVar[str] = "kvm_vcpu_events"
    exception: EventException = EventException()
    interrupt: EventInterrupt = EventInterrupt()
    nmi: EventNmi = EventNmi()
    sipi_vector: int = 0
    flags: int = 0
    smi: EventSmi = EventSmi()
    triple_fault: EventTripleFault = EventTripleFault()
    exception_has_payload: int = 0
    exception_payload: int = 0


@dataclass(frozen=True, slots=True)
class DebugRegs(Struct):
    """The guest's debug registers (struct kvm_debugregs); ``db`` are DR0 to DR3."""

    c_name: ClassVar[str] = "kvm_debugregs"
    db: tuple[int, ...] = (0, 0, 0, 0)
    dr6: int = 0
    dr7: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Xcr(Struct):
    """An extended control register (struct kvm_xcr); 0 is XCR0."""

    c_name: ClassVar[str] = "kvm_xcr"
    xcr: int
    value: int


@dataclass(frozen=True, slots=True)
class TranslateResult(Struct):
    """Where a linear address leads (struct kvm_translation); ``physical_address`` counts where ``valid``."""

    c_name: ClassVar[str] = "kvm_translation"
    linear_address: int
    physical_address: int = 0
    valid: int = 0
    writeable: int = 0
    usermode: int = 0


@dataclass(frozen=True, slots=True)
class X86Mce(Struct):
    """A machine check to inject (struct kvm_x86_mce)."""

    c_name: ClassVar[str] = "kvm_x86_mce"
    status: int
    addr: int = 0
    misc: int = 0
    mcg_status: int = 0
    bank: int = 0


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
