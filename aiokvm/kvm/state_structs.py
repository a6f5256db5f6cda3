"""The rest of a vCPU's state, for those who save, restore or debug it.

Structures of asm/kvm.h, spelled as there (KVM API, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aiokvm.kvm.convert import Struct
from aiokvm.kvm.structs import DTable, Segment

_SEGMENT = Segment()
_DTABLE = DTable()


@dataclass(frozen=True, slots=True)
class Sregs2(Struct):
    """Sregs with the PAE page directory pointers instead of the pending interrupt (struct kvm_sregs2).

    ``pdptrs`` count only where ``flags`` has KVM_SREGS2_FLAGS_PDPTRS_VALID.
    """

    c_name: ClassVar[str] = "kvm_sregs2"
    cs: Segment = _SEGMENT
    ds: Segment = _SEGMENT
    es: Segment = _SEGMENT
    fs: Segment = _SEGMENT
    gs: Segment = _SEGMENT
    ss: Segment = _SEGMENT
    tr: Segment = _SEGMENT
    ldt: Segment = _SEGMENT
    gdt: DTable = _DTABLE
    idt: DTable = _DTABLE
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
