from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import Cap, KvmExit, Vcpu, Vm, X86Mce
from aiokvm.kvm.constants import KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kvm.conftest import Guest

pytestmark = pytest.mark.kvm

DR6_BS = 1 << 14
# At 0x2000, of the vector that the interrupt vector table names: mov al, 0x66; out 0x50, al.
HANDLER = bytes.fromhex("b066 e650")


def install_handler(guest: Guest, vector: int) -> None:
    guest.memory[0x2000 : 0x2000 + len(HANDLER)] = HANDLER
    guest.memory[4 * vector : 4 * vector + 4] = b"\x00\x20\x00\x00"


def assert_handler_ran(guest: Guest) -> None:
    assert guest.run() == KvmExit.KVM_EXIT_IO
    assert (guest.vcpu.run_state.io.port, guest.vcpu.run_state.io.data) == (0x50, b"\x66")


def test_run_ends_at_a_halt(guest: Callable[..., Guest]) -> None:
    g = guest(b"\x90\xf4")
    assert g.run() == KvmExit.KVM_EXIT_HLT
    assert g.vcpu.get_regs().rip == 0x1002
    assert g.vcpu.run_size == g.vm.system.get_vcpu_mmap_size()
    assert g.vcpu.id == 0


def test_a_signal_ends_run(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xeb\xfe")  # 1: jmp 1b
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        assert g.vcpu.run() == KvmExit.KVM_EXIT_INTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert g.vcpu.get_regs().rip == 0x1000


def test_single_step(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_SET_GUEST_DEBUG)
    g = guest(b"\x90\x90\x90\xf4")
    g.vcpu.set_guest_debug(KVM_GUESTDBG_SINGLESTEP)
    for pc in (0x1001, 0x1002):
        assert g.run() == KvmExit.KVM_EXIT_DEBUG
        debug = g.vcpu.run_state.debug
        assert (debug.exception, debug.pc, debug.dr6 & DR6_BS) == (1, pc, DR6_BS)
    g.vcpu.set_guest_debug(0)
    g.run_to_hlt()


def test_hardware_breakpoint(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_SET_GUEST_DEBUG)
    if "QEMU TCG" in Path("/proc/cpuinfo").read_text():
        pytest.skip("QEMU's TCG does not arm the breakpoints of a nested guest")
    g = guest(b"\x90\x90\x90\xf4")
    g.vcpu.set_guest_debug(KVM_GUESTDBG_USE_HW_BP, [0x1002, 0, 0, 0, 0, 0, 0, 0x402])
    assert g.run() == KvmExit.KVM_EXIT_DEBUG
    debug = g.vcpu.run_state.debug
    assert (debug.exception, debug.pc, debug.dr6 & 1) == (1, 0x1002, 1)
    g.vcpu.set_guest_debug(0)
    g.run_to_hlt()


def test_interrupt(guest: Callable[..., Guest]) -> None:
    g = guest(b"\x90\x90\xf4")
    install_handler(g, 0x20)
    g.go(rflags=0x202)
    g.vcpu.interrupt(0x20)
    with pytest.raises(KvmError) as caught:
        g.vcpu.interrupt(256)
    assert caught.value.errno == errno.EINVAL
    assert_handler_ran(g)


def test_interrupt_window(guest: Callable[..., Guest]) -> None:
    g = guest(bytes.fromhex("fb 90 90 ebfc"))  # sti; nop; 1: nop; jmp 1b
    g.vcpu.run_state.request_interrupt_window = True
    assert g.run() == KvmExit.KVM_EXIT_IRQ_WINDOW_OPEN
    assert g.vcpu.run_state.ready_for_interrupt_injection
    assert g.vcpu.run_state.if_flag


def test_interrupt_with_irqchip_is_refused(chips: Vm) -> None:
    with chips.create_vcpu(0) as vcpu, pytest.raises(KvmError, match="use irq_line or signal_msi"):
        vcpu.interrupt(0x20)


def test_nmi(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_USER_NMI)
    g = guest(b"\x90\x90\xf4")
    install_handler(g, 2)
    g.vcpu.nmi()
    assert_handler_ran(g)


def test_smi(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_X86_SMM)
    vcpu.smi()
    assert vcpu.get_vcpu_events().smi.pending == 1


def test_signal_mask(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xf4")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.raise_signal(signal.SIGUSR1)
    try:
        g.vcpu.set_signal_mask([signal.SIGRTMIN + 3])
        assert g.run() == KvmExit.KVM_EXIT_INTR
        g.vcpu.set_signal_mask([signal.SIGUSR1])
        g.run_to_hlt()
        g.go()
        g.vcpu.set_signal_mask(None)
        g.run_to_hlt()
    finally:
        signal.sigwait([signal.SIGUSR1])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def test_kvmclock_ctrl_without_a_clock(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_KVMCLOCK_CTRL)
    with pytest.raises(KvmError, match="the guest uses no kvmclock"):
        vcpu.kvmclock_ctrl()


def test_tpr(chips: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_VAPIC)
    with chips.create_vcpu(0) as vcpu:
        vcpu.tpr_access_reporting(True)
        vcpu.tpr_access_reporting(False)
        vcpu.set_vapic_addr(0)


def test_machine_check(chips: Vm, requires: Callable[[Cap], int]) -> None:
    banks = min(requires(Cap.KVM_CAP_MCE), 4)
    with chips.create_vcpu(0) as vcpu:
        vcpu.setup_mce(banks)
        valid = 1 << 63
        vcpu.set_mce(X86Mce(status=valid | 0x42, addr=0x1000, bank=1))
        status, address = 0x405, 0x406
        assert [entry.data for entry in vcpu.get_msrs([status, address])] == [valid | 0x42, 0x1000]


def test_enable_cap(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="does not know the capability"):
        vcpu.enable_cap(9999)


def test_pre_fault(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_PRE_FAULT_MEMORY)
    assert guest(b"\xf4").vcpu.pre_fault_memory(0, 0x4000) == 0


def test_a_vcpu_id_is_taken_once(vm: Vm, vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="a vCPU with this id exists"):
        vm.create_vcpu(0)
