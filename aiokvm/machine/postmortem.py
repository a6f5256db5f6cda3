"""What a vCPU that cannot go on tells about itself, for people."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from aiokvm.boot.cpu import CR0_PE
from aiokvm.errors import AiokvmError
from aiokvm.kvm import KvmExit

if TYPE_CHECKING:
    from aiokvm import kvm
    from aiokvm.memory import GuestMemory

INSTRUCTION_BYTES = 15
# Where a processor begins after INIT (Intel SDM volume 3, section 10.1.1).
_RESET_CS, _RESET_IP = 0xF000, 0xFFF0


def explain(run: kvm.RunState, reason: int, error: int) -> str:
    """Why KVM_RUN came back with what no device answers: an exit_reason, or errno ``error``."""
    if error:
        return f"KVM_RUN failed: {os.strerror(error)} (errno {error})"
    if reason == KvmExit.KVM_EXIT_INTERNAL_ERROR:
        internal = run.internal_error
        data = " ".join(f"{word:#x}" for word in internal.data)
        return f"KVM internal error, suberror {internal.suberror}, data {data}"
    if reason == KvmExit.KVM_EXIT_FAIL_ENTRY:
        return f"the CPU refused to enter the guest, reason {run.fail_entry.hardware_entry_failure_reason:#x}"
    return f"exit_reason {reason}, which this machine has no use for"


def describe(what: str, vcpu: kvm.Vcpu, memory: GuestMemory) -> str:
    """``what`` happened, with registers and the bytes at rip as far as they can be had."""
    parts = [what]
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    except AiokvmError as failure:
        return "; ".join([*parts, f"no registers: {failure}"])
    general = ("rip", "rflags", "rsp", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
    parts.append(" ".join(f"{name}={getattr(regs, name):#x}" for name in general))
    control = ("cr0", "cr2", "cr3", "cr4", "efer")
    parts.append(" ".join(f"{name}={getattr(sregs, name):#x}" for name in control))
    parts.append(f"cs={sregs.cs.selector:#x} base={sregs.cs.base:#x}")
    if (regs.rip, sregs.cs.selector, sregs.cr0 & CR0_PE) == (_RESET_IP, _RESET_CS, 0):
        # AMD-V leaves the state of a shutdown undefined, and KVM initializes the vCPU.
        parts.append("these are of a processor that was reset: this host does not tell those of before")
    else:
        parts.append(f"code: {_code(vcpu, memory, sregs.cs.base + regs.rip)}")
    return "; ".join(parts)


def _code(vcpu: kvm.Vcpu, memory: GuestMemory, linear: int) -> str:
    try:
        translated = vcpu.translate(linear & (1 << 64) - 1)
        if not translated.valid:
            return "not mapped"
        # Not across the page: the next one may lie elsewhere.
        size = min(INSTRUCTION_BYTES, 0x1000 - translated.physical_address % 0x1000)
        return memory.read(translated.physical_address, size).hex(" ")
    except AiokvmError as failure:
        return str(failure)
