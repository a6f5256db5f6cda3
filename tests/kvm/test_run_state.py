from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import Cap, InternalError, KvmExit, MsrFilterRange, Vcpu
from aiokvm.kvm.constants import (
    KVM_EXIT_IO_IN,
    KVM_EXIT_IO_OUT,
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_FILTER_WRITE,
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kvm.conftest import Guest

pytestmark = pytest.mark.kvm

HLT = b"\xf4"


def test_out(guest: Callable[..., Guest]) -> None:
    g = guest(bytes.fromhex("ba1203 b84142 ef") + HLT)  # mov dx, 0x312; mov ax, 0x4241; out dx, ax
    assert g.run() == KvmExit.KVM_EXIT_IO
    state = g.vcpu.run_state
    assert state.exit_reason == KvmExit.KVM_EXIT_IO
    assert (state.io.direction, state.io.size, state.io.port, state.io.count) == (
        KVM_EXIT_IO_OUT,
        2,
        0x312,
        1,
    )
    assert state.io.data == b"AB"
    assert state.io.is_write
    g.run_to_hlt()


def test_in(guest: Callable[..., Guest]) -> None:
    g = guest(bytes.fromhex("ba1203 ec") + HLT)  # mov dx, 0x312; in al, dx
    assert g.run() == KvmExit.KVM_EXIT_IO
    io = g.vcpu.run_state.io
    assert (io.direction, io.size, io.count, io.data, io.is_write) == (KVM_EXIT_IO_IN, 1, 1, b"", False)
    with pytest.raises(ValueError, match="2 bytes in reply to an IN of 1"):
        g.vcpu.run_state.reply_io(b"ab")
    g.vcpu.run_state.reply_io(b"\x5a")
    g.run_to_hlt()
    assert g.vcpu.get_regs().rax & 0xFF == 0x5A


def test_a_string_of_ins(guest: Callable[..., Guest]) -> None:
    # mov dx, 0x312; mov di, 0x2000; mov cx, 4; rep insb
    g = guest(bytes.fromhex("ba1203 bf0020 b90400 f36c") + HLT)
    assert g.run() == KvmExit.KVM_EXIT_IO
    assert g.vcpu.run_state.io.count == 4
    g.vcpu.run_state.reply_io(b"abcd")
    g.run_to_hlt()
    assert bytes(g.memory[0x2000:0x2004]) == b"abcd"


def test_mmio(guest: Callable[..., Guest]) -> None:
    # mov ax, 0x2000; mov ds, ax; mov word [0x10], 0x7788; mov al, [0x20]
    g = guest(bytes.fromhex("b80020 8ed8 c70610008877 a02000") + HLT)
    assert g.run() == KvmExit.KVM_EXIT_MMIO
    mmio = g.vcpu.run_state.mmio
    assert (mmio.phys_addr, mmio.data, mmio.is_write) == (0x20010, b"\x88\x77", True)
    assert g.run() == KvmExit.KVM_EXIT_MMIO
    mmio = g.vcpu.run_state.mmio
    assert (mmio.phys_addr, len(mmio.data), mmio.is_write) == (0x20020, 1, False)
    with pytest.raises(ValueError, match="2 bytes in reply to a read of 1"):
        g.vcpu.run_state.reply_mmio(b"ab")
    g.vcpu.run_state.reply_mmio(b"\x99")
    g.run_to_hlt()
    assert g.vcpu.get_regs().rax & 0xFF == 0x99


def test_immediate_exit_completes_the_exit_before(guest: Callable[..., Guest]) -> None:
    g = guest(bytes.fromhex("ba1203 ec") + HLT)
    assert g.run() == KvmExit.KVM_EXIT_IO
    state = g.vcpu.run_state
    state.reply_io(b"\x21")
    state.immediate_exit = True
    assert state.immediate_exit
    assert g.run() == KvmExit.KVM_EXIT_INTR
    assert g.vcpu.get_regs().rax & 0xFF == 0x21
    assert g.vcpu.get_regs().rip == 0x1004
    state.immediate_exit = False
    g.run_to_hlt()


def test_sync_regs(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    all_of_them = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS
    assert requires(Cap.KVM_CAP_SYNC_REGS) & all_of_them == all_of_them
    g = guest(bytes.fromhex("b83412") + HLT + bytes.fromhex("40") + HLT)  # mov ax, 0x1234; hlt; inc ax; hlt
    state = g.vcpu.run_state
    state.kvm_valid_regs = all_of_them
    g.run_to_hlt()
    assert (state.regs.rax, state.regs.rip) == (0x1234, 0x1004)
    assert state.regs == g.vcpu.get_regs()
    assert state.sregs == g.vcpu.get_sregs()
    assert state.events == g.vcpu.get_vcpu_events()
    state.regs = replace(state.regs, rax=0x50)
    state.sregs = replace(state.sregs, cr2=0x77)
    state.events = state.events
    assert state.kvm_dirty_regs == all_of_them
    g.run_to_hlt()
    assert state.regs.rax == 0x51
    assert g.vcpu.get_sregs().cr2 == 0x77


def test_msr_exit(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_X86_MSR_FILTER)
    requires(Cap.KVM_CAP_X86_USER_SPACE_MSR)
    # mov ecx, 0x174; mov eax, 0x55; xor edx, edx; wrmsr
    g = guest(bytes.fromhex("66b974010000 66b855000000 6631d2 0f30") + HLT)
    g.vm.enable_cap(Cap.KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER)
    g.vm.set_msr_filter([MsrFilterRange(KVM_MSR_FILTER_WRITE, base=0x174, nmsrs=3, bitmap=b"\x06")])
    assert g.run() == KvmExit.KVM_EXIT_X86_WRMSR
    msr = g.vcpu.run_state.msr
    assert (msr.reason, msr.index, msr.data) == (KVM_MSR_EXIT_REASON_FILTER, 0x174, 0x55)
    g.vcpu.run_state.reply_msr()
    g.run_to_hlt()
    assert g.vcpu.get_msrs([0x174])[0].data == 0


def test_the_instruction_that_could_not_be_emulated() -> None:
    flags, size_and_bytes, rest = 1, 0x0000_0000_00C7_0F03, 0
    error = InternalError(1, (flags, size_and_bytes, rest))
    assert error.insn_bytes == b"\x0f\xc7\x00"
    assert InternalError(1, (0, size_and_bytes, rest)).insn_bytes == b""
    assert InternalError(2, (flags, size_and_bytes, rest)).insn_bytes == b""
    assert len(InternalError(1, (flags, 0xFF, rest)).insn_bytes) == 15


def test_simple_fields(vcpu: Vcpu) -> None:
    state = vcpu.run_state
    assert not state.request_interrupt_window
    state.request_interrupt_window = True
    assert state.request_interrupt_window
    state.cr8 = 5
    assert state.cr8 == 5
    assert (state.flags, state.if_flag, state.ready_for_interrupt_injection, state.apic_base) == (
        0,
        False,
        False,
        0,
    )
    assert (state.hardware_exit_reason, state.ioapic_eoi_vector, state.notify_flags) == (0, 0, 0)
    assert (state.fail_entry.cpu, state.exception.error_code, state.debug.pc, state.tpr_access.rip) == (
        0,
        0,
        0,
        0,
    )
    assert (state.hypercall.args, state.system_event.data, state.memory_fault.size) == ((0,) * 6, (), 0)
    state.reply_hypercall(7)


def test_nothing_is_read_after_close(vcpu: Vcpu) -> None:
    state = vcpu.run_state
    vcpu.close()
    for use in (lambda: state.exit_reason, lambda: state.io, lambda: vcpu.run_pointer, vcpu.run):
        with pytest.raises(KvmError, match="the Vcpu is closed"):
            use()
