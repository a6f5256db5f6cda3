"""struct kvm_run: what a vCPU's exit was, and the answer to it (KVM API, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from aiokvm._core import ffi
from aiokvm.kvm.constants import (
    KVM_EXIT_IO_OUT,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
)
from aiokvm.kvm.convert import Struct, from_c, to_initializer
from aiokvm.kvm.state_structs import VcpuEvents
from aiokvm.kvm.structs import Regs, Sregs

if TYPE_CHECKING:
    from aiokvm.kvm.vcpu import Vcpu


@dataclass(frozen=True, slots=True)
class IoExit:
    """KVM_EXIT_IO: ``count`` accesses of ``size`` bytes to ``port``; ``data`` is what an OUT wrote."""

    direction: int
    size: int
    port: int
    count: int
    data: bytes

    @property
    def is_write(self) -> bool:
        """Whether it is an OUT."""
        return self.direction == KVM_EXIT_IO_OUT


@dataclass(frozen=True, slots=True)
class MmioExit:
    """KVM_EXIT_MMIO; ``data`` is what was written, or zeros as long as what is to be read."""

    phys_addr: int
    data: bytes
    is_write: bool


@dataclass(frozen=True, slots=True)
class DebugExit(Struct):
    """KVM_EXIT_DEBUG: exception 1 or 3 at ``pc``; ``dr6`` tells the breakpoint or step."""

    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM_EXIT_INTERNAL_ERROR; ``suberror`` of KVM_INTERNAL_ERROR_*."""

    suberror: int
    data: tuple[int, ...]

    @property
    def insn_bytes(self) -> bytes:
        """The instruction that KVM could not emulate (KVM_INTERNAL_ERROR_EMULATION); else empty."""
        if self.suberror != KVM_INTERNAL_ERROR_EMULATION or len(self.data) < 3:
            return b""
        if not self.data[0] & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            return b""
        raw = b"".join(word.to_bytes(8, "little") for word in self.data[1:3])
        return raw[1 : 1 + min(raw[0], 15)]


@dataclass(frozen=True, slots=True)
class FailEntry(Struct):
    """KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state; the reason is the processor's number."""

    hardware_entry_failure_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class ExceptionExit(Struct):
    """KVM_EXIT_EXCEPTION."""

    exception: int
    error_code: int


@dataclass(frozen=True, slots=True)
class HypercallExit(Struct):
    """KVM_EXIT_HYPERCALL."""

    nr: int
    args: tuple[int, ...]
    longmode: int


@dataclass(frozen=True, slots=True)
class TprAccess(Struct):
    """KVM_EXIT_TPR_ACCESS."""

    rip: int
    is_write: int


@dataclass(frozen=True, slots=True)
class MsrExit(Struct):
    """KVM_EXIT_X86_RDMSR and _WRMSR; ``reason`` of KVM_MSR_EXIT_REASON_*, ``data`` is what was written."""

    reason: int
    index: int
    data: int


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """KVM_EXIT_SYSTEM_EVENT; ``type`` of KVM_SYSTEM_EVENT_*."""

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryFault(Struct):
    """KVM_EXIT_MEMORY_FAULT: the guest reached ``size`` bytes at ``gpa`` that have no memory."""

    c_name: ClassVar[str] = "aiokvm_memory_fault"
    flags: int
    gpa: int
    size: int


class RunState:
    """A typed view of a vCPU's struct kvm_run.

    The properties named after an exit are meaningful after that exit only, and until the vCPU runs again.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu

    @property
    def _run(self) -> Any:
        return self._vcpu.run_pointer

    @property
    def exit_reason(self) -> int:
        """Why KVM_RUN returned: a KvmExit, or a number newer than that."""
        return int(self._run.exit_reason)

    @property
    def immediate_exit(self) -> bool:
        """Whether the next KVM_RUN completes the exit before and returns (KVM_CAP_IMMEDIATE_EXIT)."""
        return bool(self._run.immediate_exit)

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._run.immediate_exit = value

    @property
    def request_interrupt_window(self) -> bool:
        """Whether KVM_RUN returns when the guest can take an interrupt."""
        return bool(self._run.request_interrupt_window)

    @request_interrupt_window.setter
    def request_interrupt_window(self, value: bool) -> None:
        self._run.request_interrupt_window = value

    @property
    def ready_for_interrupt_injection(self) -> bool:
        """Whether ``Vcpu.interrupt`` can be called."""
        return bool(self._run.ready_for_interrupt_injection)

    @property
    def if_flag(self) -> bool:
        """The guest's interrupt flag."""
        return bool(self._run.if_flag)

    @property
    def flags(self) -> int:
        """KVM_RUN_X86_*."""
        return int(self._run.flags)

    @property
    def cr8(self) -> int:
        """The guest's task priority, without an in-kernel local APIC; read and written at each KVM_RUN."""
        return int(self._run.cr8)

    @cr8.setter
    def cr8(self, value: int) -> None:
        self._run.cr8 = value

    @property
    def apic_base(self) -> int:
        """The guest's IA32_APIC_BASE."""
        return int(self._run.apic_base)

    @property
    def io(self) -> IoExit:
        """KVM_EXIT_IO."""
        io = self._run.io
        data = bytes(self._io_data()) if io.direction == KVM_EXIT_IO_OUT else b""
        return IoExit(io.direction, io.size, io.port, io.count, data)

    def reply_io(self, data: bytes) -> None:
        """Answer an IN: ``size * count`` bytes, that the guest gets at the next KVM_RUN."""
        target = self._io_data()
        if len(data) != len(target):
            raise ValueError(f"{len(data)} bytes in reply to an IN of {len(target)}")
        target[:] = data

    def _io_data(self) -> memoryview:
        io = self._run.io
        size = io.size * io.count
        if io.data_offset + size > self._vcpu.run_size:
            raise ValueError("the last exit was no KVM_EXIT_IO")
        return memoryview(ffi.buffer(ffi.cast("char *", self._run) + io.data_offset, size))

    @property
    def mmio(self) -> MmioExit:
        """KVM_EXIT_MMIO."""
        mmio = self._run.mmio
        return MmioExit(mmio.phys_addr, bytes(ffi.buffer(mmio.data))[: mmio.len], bool(mmio.is_write))

    def reply_mmio(self, data: bytes) -> None:
        """Answer a read: as many bytes as it asked for, that the guest gets at the next KVM_RUN."""
        mmio = self._run.mmio
        if len(data) != mmio.len:
            raise ValueError(f"{len(data)} bytes in reply to a read of {mmio.len}")
        ffi.memmove(mmio.data, data, len(data))

    @property
    def hardware_exit_reason(self) -> int:
        """KVM_EXIT_UNKNOWN: the processor's number."""
        return int(self._run.hw.hardware_exit_reason)

    @property
    def fail_entry(self) -> FailEntry:
        """KVM_EXIT_FAIL_ENTRY."""
        return from_c(FailEntry, self._run.fail_entry)

    @property
    def exception(self) -> ExceptionExit:
        """KVM_EXIT_EXCEPTION."""
        return from_c(ExceptionExit, self._run.ex)

    @property
    def debug(self) -> DebugExit:
        """KVM_EXIT_DEBUG."""
        return from_c(DebugExit, self._run.debug.arch)

    @property
    def internal_error(self) -> InternalError:
        """KVM_EXIT_INTERNAL_ERROR."""
        internal = self._run.internal
        return InternalError(internal.suberror, tuple(internal.data[0 : min(internal.ndata, 16)]))

    @property
    def hypercall(self) -> HypercallExit:
        """KVM_EXIT_HYPERCALL."""
        return from_c(HypercallExit, self._run.hypercall)

    def reply_hypercall(self, value: int) -> None:
        """Set what the hypercall returns."""
        self._run.hypercall.ret = value

    @property
    def tpr_access(self) -> TprAccess:
        """KVM_EXIT_TPR_ACCESS."""
        return from_c(TprAccess, self._run.tpr_access)

    @property
    def msr(self) -> MsrExit:
        """KVM_EXIT_X86_RDMSR or KVM_EXIT_X86_WRMSR."""
        return from_c(MsrExit, self._run.msr)

    def reply_msr(self, data: int = 0, *, error: bool = False) -> None:
        """Answer an MSR access: ``data`` to a read; ``error`` raises #GP in the guest."""
        self._run.msr.data = data
        self._run.msr.error = error

    @property
    def system_event(self) -> SystemEvent:
        """KVM_EXIT_SYSTEM_EVENT."""
        event = self._run.system_event
        return SystemEvent(event.type, tuple(event.data[0 : min(event.ndata, 16)]))

    @property
    def ioapic_eoi_vector(self) -> int:
        """KVM_EXIT_IOAPIC_EOI: the vector whose interrupt ended, with a split irqchip."""
        return int(self._run.eoi.vector)

    @property
    def notify_flags(self) -> int:
        """KVM_EXIT_NOTIFY: KVM_NOTIFY_CONTEXT_INVALID."""
        return int(self._run.notify.flags)

    @property
    def memory_fault(self) -> MemoryFault:
        """KVM_EXIT_MEMORY_FAULT."""
        fault = ffi.cast(f"struct {MemoryFault.c_name} *", ffi.addressof(self._run, "padding"))
        return from_c(MemoryFault, fault)

    @property
    def kvm_valid_regs(self) -> int:
        """What each exit stores into ``regs``, ``sregs``, ``events``: KVM_SYNC_X86_* (KVM_CAP_SYNC_REGS)."""
        return int(self._run.kvm_valid_regs)

    @kvm_valid_regs.setter
    def kvm_valid_regs(self, value: int) -> None:
        self._run.kvm_valid_regs = value

    @property
    def kvm_dirty_regs(self) -> int:
        """What the next KVM_RUN loads first; setting ``regs``, ``sregs`` or ``events`` adds to it."""
        return int(self._run.kvm_dirty_regs)

    @kvm_dirty_regs.setter
    def kvm_dirty_regs(self, value: int) -> None:
        self._run.kvm_dirty_regs = value

    @property
    def regs(self) -> Regs:
        """The general registers, as of the last exit."""
        return from_c(Regs, self._run.s.regs.regs)

    @regs.setter
    def regs(self, value: Regs) -> None:
        self._store("regs", value, KVM_SYNC_X86_REGS)

    @property
    def sregs(self) -> Sregs:
        """Segments and control registers, as of the last exit."""
        return from_c(Sregs, self._run.s.regs.sregs)

    @sregs.setter
    def sregs(self, value: Sregs) -> None:
        self._store("sregs", value, KVM_SYNC_X86_SREGS)

    @property
    def events(self) -> VcpuEvents:
        """What waits to be delivered, as of the last exit."""
        return from_c(VcpuEvents, self._run.s.regs.events)

    @events.setter
    def events(self, value: VcpuEvents) -> None:
        self._store("events", value, KVM_SYNC_X86_EVENTS)

    def _store(self, name: str, value: Struct, bit: int) -> None:
        setattr(self._run.s.regs, name, to_initializer(value))
        self._run.kvm_dirty_regs |= bit
