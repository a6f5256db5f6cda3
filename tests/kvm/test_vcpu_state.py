from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import (
    Cap,
    DebugRegs,
    DTable,
    EventNmi,
    MpState,
    Regs,
    System,
    Vcpu,
    Vm,
)
from aiokvm.kvm.constants import KVM_VCPUEVENT_VALID_NMI_PENDING

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kvm


def test_regs(vcpu: Vcpu) -> None:
    regs = replace(Regs(*range(100, 118)), rflags=0x202)
    vcpu.set_regs(regs)
    assert vcpu.get_regs() == regs


def test_sregs_start_at_the_reset_vector(vcpu: Vcpu) -> None:
    sregs = vcpu.get_sregs()
    assert (sregs.cs.base, sregs.cs.selector, sregs.cr0) == (0xFFFF0000, 0xF000, 0x60000010)
    changed = replace(sregs, gdt=DTable(0x500, 0x27), cr2=0x1234_5678_9000, fs=replace(sregs.fs, base=0x700))
    vcpu.set_sregs(changed)
    assert vcpu.get_sregs() == changed


def test_sregs2(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_SREGS2)
    sregs = vcpu.get_sregs2()
    changed = replace(sregs, idt=DTable(0x600, 0x3FF), cr2=77)
    vcpu.set_sregs2(changed)
    assert vcpu.get_sregs2() == changed
    assert vcpu.get_sregs().cr2 == 77


def test_contradicting_control_registers_are_refused(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match=r"KVM_SET_SREGS: .*control registers"):
        vcpu.set_sregs(replace(vcpu.get_sregs(), cr0=0x8000_0000))


def test_fpu(vcpu: Vcpu) -> None:
    st0 = bytes(range(10)) + bytes(6)
    fpu = replace(vcpu.get_fpu(), fcw=0x27F, fpr=(st0, *(bytes(16),) * 7), xmm=(b"\7" * 16,) * 16)
    vcpu.set_fpu(fpu)
    assert vcpu.get_fpu() == fpu


def test_xsave(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_XSAVE)
    state = bytearray(vcpu.get_xsave())
    assert len(state) == 4096
    state[0:2] = b"\x7f\x02"
    state[512] |= 3  # XSTATE_BV: the x87 and SSE parts count
    vcpu.set_xsave(bytes(state))
    assert vcpu.get_xsave()[0:2] == b"\x7f\x02"
    assert vcpu.get_fpu().fcw == 0x27F
    with pytest.raises(ValueError, match="KVM_SET_XSAVE takes"):
        vcpu.set_xsave(bytes(1 << 20))


def test_xsave2(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_XSAVE2)
    state = vcpu.get_xsave2()
    assert len(state) == vcpu.vm.check_extension(Cap.KVM_CAP_XSAVE2)
    vcpu.set_xsave(state)
    assert vcpu.get_xsave2() == state


def test_xcrs(system: System, vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_XCRS)
    vcpu.set_cpuid2(system.get_supported_cpuid())
    try:
        xcrs = vcpu.get_xcrs()
    except KvmError:
        pytest.skip("this host's guests have no XSAVE")
    if not xcrs:
        pytest.skip("this host's guests have no XSAVE")
    assert [xcr.xcr for xcr in xcrs] == [0]
    assert xcrs[0].value & 1
    vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs() == xcrs


def test_lapic(chips: Vm) -> None:
    with chips.create_vcpu(3) as vcpu:
        state = bytearray(vcpu.get_lapic())
        assert len(state) == 1024
        assert state[0x23] == 3
        state[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        vcpu.set_lapic(bytes(state))
        assert vcpu.get_lapic()[0xF0:0xF4] == b"\xff\x01\0\0"


def test_lapic_without_irqchip(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="create_irqchip"):
        vcpu.get_lapic()


def test_events(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_VCPU_EVENTS)
    events = vcpu.get_vcpu_events()
    assert events.nmi == EventNmi()
    vcpu.set_vcpu_events(replace(events, nmi=EventNmi(pending=1), flags=KVM_VCPUEVENT_VALID_NMI_PENDING))
    assert vcpu.get_vcpu_events().nmi.pending == 1


def test_debugregs(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_DEBUGREGS)
    regs = DebugRegs(db=(1, 2, 3, 4), dr6=0xFFFF0FF0, dr7=0x401)
    vcpu.set_debugregs(regs)
    assert vcpu.get_debugregs() == regs


def test_mp_state(chips: Vm) -> None:
    with chips.create_vcpu(0) as boot, chips.create_vcpu(1) as other:
        assert boot.get_mp_state() is MpState.KVM_MP_STATE_RUNNABLE
        assert other.get_mp_state() is MpState.KVM_MP_STATE_UNINITIALIZED
        other.set_mp_state(MpState.KVM_MP_STATE_HALTED)
        assert other.get_mp_state() is MpState.KVM_MP_STATE_HALTED
        with pytest.raises(KvmError, match="no such state"):
            other.set_mp_state(MpState.KVM_MP_STATE_OPERATING)


def test_nested_state(system: System, vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_NESTED_STATE)
    vcpu.set_cpuid2(system.get_supported_cpuid())
    state = vcpu.get_nested_state()
    assert int.from_bytes(state[4:8], "little") == len(state) >= 128
    vcpu.set_nested_state(state)
    assert vcpu.get_nested_state() == state


@pytest.mark.parametrize("state", [b"", bytes(127), bytes(4) + b"\xff\xff\0\0" + bytes(200)])
def test_a_nested_state_that_lies_is_refused(vcpu: Vcpu, state: bytes) -> None:
    with pytest.raises(ValueError, match="nested state"):
        vcpu.set_nested_state(state)


def test_tsc_khz(vcpu: Vcpu, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_GET_TSC_KHZ)
    khz = vcpu.get_tsc_khz()
    assert khz > 100_000
    vcpu.set_tsc_khz(khz)
    assert vcpu.get_tsc_khz() == khz


def test_translate(vcpu: Vcpu) -> None:
    result = vcpu.translate(0x1234)
    assert (result.linear_address, result.physical_address, result.valid) == (0x1234, 0x1234, 1)
