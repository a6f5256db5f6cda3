"""All that a guest can change in a vCPU, saved and restored in an order that holds on every host.

What a vCPU is made with (CPUID, the TSC's frequency) is no part of it: KVM takes that before the first run,
when the vCPU is made. KVM API, section 4; each step has its reason beside it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm.kvm import Cap, MsrEntry, MsrError
from aiokvm.kvm.state_structs import Sregs2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiokvm import kvm
    from aiokvm.kvm import CpuidEntry, DebugRegs, Fpu, MpState, Regs, Sregs, VcpuEvents, Xcr

MSR_TSC = 0x10
MSR_FEATURE_CONTROL = 0x3A
MSR_MCG_CAP = 0x179
MSR_TSC_DEADLINE = 0x6E0
# What counts time: it differs between two looks, and is no state to compare. The TSC, and of Hyper-V's
# interface the vCPU's run time and the reference counter.
MSRS_OF_TIME = frozenset({MSR_TSC, 0x4000_0010, 0x4000_0020})

# KVM's index list names neither of these, though a guest can set them.
_MTRRS = (0xFE, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x277, 0x2FF)
_MACHINE_CHECK = (0x179, 0x17A, 0x17B, 0x4D0)
_MC_CTL, _MC_BANK_MSRS, _MC_CTL2 = 0x400, 4, 0x280
# Which of KVM's own there are depends on the kernel (Documentation/virt/kvm/x86/msr.rst).
_KVM_MSRS = (0x11, 0x12, *range(0x4B56_4D00, 0x4B56_4E00))
# DEBUGCTL, SYSCFG, HWCR.
_OTHERS = (0x1D9, 0xC001_0010, 0xC001_0015)

# Intel SDM volume 3, section 11.5.1 and 11.5.4.1: the timer's entry of the local vector table.
_APIC_LVTT = 0x320
_LVT_MASKED = 1 << 16
_LVTT_MODE, _LVTT_TSC_DEADLINE = 3 << 17, 2 << 17

# struct kvm_nested_state of a vCPU without guests, by its format: with VMX, no VMXON region and no VMCS; with
# SVM, GIF set.
_NO_GUESTS = {
    0: struct.pack("<HHIQQ104x", 0, 0, 128, (1 << 64) - 1, (1 << 64) - 1),
    1: struct.pack("<HHI120x", 1 << 8, 1, 128),
}

# Intel SDM volume 1, section 13.4: the XSAVE area's header, and state components that it lists.
_XSTATE_BV = 512
_X87, _SSE, _PKRU = 1 << 0, 1 << 1, 1 << 9
_CPUID_XSAVE = 0xD


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedVcpu:
    """What a guest can change in a vCPU. Where the host's KVM lacks something it is None."""

    mp_state: MpState
    regs: Regs
    sregs: Sregs | Sregs2
    fpu: Fpu
    xsave: bytes | None
    xcrs: tuple[Xcr, ...]
    debugregs: DebugRegs
    lapic: bytes
    msrs: Mapping[int, int]
    nested_state: bytes | None
    events: VcpuEvents
    version: int = 1


def msr_indices(system: kvm.System, vcpu: kvm.Vcpu) -> tuple[int, ...]:
    """Every MSR of the vCPU that KVM gives: those that it lists, and those that it does not."""
    banks = _read_msrs(vcpu, [MSR_MCG_CAP]).get(MSR_MCG_CAP, 0) & 0xFF
    machine_check = [*range(_MC_CTL, _MC_CTL + _MC_BANK_MSRS * banks), *range(_MC_CTL2, _MC_CTL2 + banks)]
    found = dict.fromkeys(_read_msrs(vcpu, system.get_msr_index_list()))
    for index in (*_MTRRS, *_MACHINE_CHECK, *machine_check, *_KVM_MSRS, *_OTHERS):
        # One by one, for most are not there.
        if index not in found and _read_msrs(vcpu, [index]):
            found[index] = None
    return tuple(found)


def save(vcpu: kvm.Vcpu, msrs: Iterable[int]) -> SavedVcpu:
    """The state of a vCPU that stands still; ``msrs`` are its `msr_indices`."""
    has = vcpu.vm.check_extension
    # First, for it has an INIT or SIPI that waits take effect, which changes registers.
    mp_state = vcpu.get_mp_state()
    regs = vcpu.get_regs()
    sregs = vcpu.get_sregs2() if has(Cap.KVM_CAP_SREGS2) else vcpu.get_sregs()
    fpu = vcpu.get_fpu()
    xsave = _get_xsave(vcpu)
    xcrs = vcpu.get_xcrs() if has(Cap.KVM_CAP_XCRS) else ()
    debugregs = vcpu.get_debugregs()
    lapic = vcpu.get_lapic()
    values = _read_msrs(vcpu, msrs)
    nested_state = vcpu.get_nested_state() if has(Cap.KVM_CAP_NESTED_STATE) else None
    # Last: reading the others may leave exceptions and interrupts to be delivered.
    events = vcpu.get_vcpu_events()
    return SavedVcpu(
        mp_state=mp_state,
        regs=regs,
        sregs=sregs,
        fpu=fpu,
        xsave=xsave,
        xcrs=xcrs,
        debugregs=debugregs,
        lapic=lapic,
        msrs=values,
        nested_state=nested_state,
        events=events,
    )


def restore(vcpu: kvm.Vcpu, state: SavedVcpu) -> tuple[int, ...]:
    """Give a vCPU that stands still, new or used, the state of another with the same CPUID.

    Returns the MSRs that KVM refused to set though they have another value.
    """
    # An INIT that waits would otherwise take effect on what is restored.
    vcpu.get_mp_state()
    if state.nested_state is not None:
        # Out of a guest of its own, if it has one: leaving it later would bring back the registers of its
        # hypervisor, and with VMX on CR4 takes no other value.
        vcpu.set_nested_state(_NO_GUESTS[_nested_format(state.nested_state)])
    vcpu.set_mp_state(state.mp_state)
    vcpu.set_regs(state.regs)
    # With them the mode of the local APIC, in apic_base, which says how its registers are laid out.
    if isinstance(state.sregs, Sregs2):
        vcpu.set_sregs2(state.sregs)
    else:
        vcpu.set_sregs(state.sregs)
    if state.xsave is not None:
        # Before XCR0, which says what of it the guest may use; KVM takes all that the vCPU can have.
        _set_xsave(vcpu, state.xsave)
    else:
        vcpu.set_fpu(state.fpu)
    if state.xcrs:
        vcpu.set_xcrs(state.xcrs)
    vcpu.set_debugregs(state.debugregs)
    # Before the TSC's deadline, which counts only while the timer is in that mode.
    vcpu.set_lapic(state.lapic)
    if state.nested_state is not None:
        # After EFER.SVME and CR4.VMXE, which allow it, and after the feature control that unlocks VMX.
        if MSR_FEATURE_CONTROL in state.msrs:
            _write_msrs(vcpu, [MsrEntry(MSR_FEATURE_CONTROL, state.msrs[MSR_FEATURE_CONTROL])])
        vcpu.set_nested_state(state.nested_state)
    refused = _restore_msrs(vcpu, state)
    # Last: each of the others may put aside or queue what is to be delivered.
    vcpu.set_vcpu_events(state.events)
    return refused


def _restore_msrs(vcpu: kvm.Vcpu, state: SavedVcpu) -> tuple[int, ...]:
    now = _read_msrs(vcpu, state.msrs)
    # Some cannot be written, and need not be; writing others has KVM set up what the guest does not use.
    changed = [
        MsrEntry(index, value)
        for index, value in state.msrs.items()
        if index not in (*MSRS_OF_TIME, MSR_TSC_DEADLINE) and now.get(index) != value
    ]
    refused = _write_msrs(vcpu, changed)
    if MSR_TSC in state.msrs:
        refused += _write_msrs(vcpu, [MsrEntry(MSR_TSC, state.msrs[MSR_TSC])])
    if MSR_TSC_DEADLINE in state.msrs:
        # After the TSC that it is compared with, and even if it looks the same: writing it starts the timer.
        refused += _write_msrs(vcpu, [MsrEntry(MSR_TSC_DEADLINE, _deadline(state))])
    return refused


def _deadline(state: SavedVcpu) -> int:
    """When the timer is due; now, if it was due when it was saved, for KVM has forgotten it then."""
    lvtt = int.from_bytes(state.lapic[_APIC_LVTT : _APIC_LVTT + 4], "little")
    in_use = lvtt & _LVTT_MODE == _LVTT_TSC_DEADLINE and not lvtt & _LVT_MASKED
    deadline = state.msrs[MSR_TSC_DEADLINE]
    # An interrupt too many does no harm; a guest that waits for one that does not come hangs.
    return state.msrs[MSR_TSC] if in_use and not deadline and MSR_TSC in state.msrs else deadline


def _get_xsave(vcpu: kvm.Vcpu) -> bytes | None:
    has = vcpu.vm.check_extension
    if not has(Cap.KVM_CAP_XSAVE):
        return None
    area = bytearray(vcpu.get_xsave2() if has(Cap.KVM_CAP_XSAVE2) else vcpu.get_xsave())
    if _PKRU & _components(vcpu):
        # KVM keeps PKRU beside the area and puts it in unlisted, but takes out only what is listed.
        offset = next(entry.ebx for entry in _xsave_leaves(vcpu) if entry.index == _PKRU.bit_length() - 1)
        if any(area[offset : offset + 4]):
            _list(area, _PKRU)
    return bytes(area)


def _set_xsave(vcpu: kvm.Vcpu, area: bytes) -> None:
    # A component that the header does not list is as after a reset. Of MXCSR, and of PKRU in older kernels,
    # that is not so: they stay what they were. So have the bytes themselves taken over first.
    whole = bytearray(area)
    _list(whole, _X87 | _SSE | _PKRU & _components(vcpu))
    vcpu.set_xsave(bytes(whole))
    vcpu.set_xsave(area)


def _list(area: bytearray, components: int) -> None:
    """Have the area's header list components."""
    listed = int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little")
    area[_XSTATE_BV : _XSTATE_BV + 8] = (listed | components).to_bytes(8, "little")


def _components(vcpu: kvm.Vcpu) -> int:
    """Those that the vCPU has, of the first 32."""
    return next((entry.eax for entry in _xsave_leaves(vcpu) if entry.index == 0), 0)


def _xsave_leaves(vcpu: kvm.Vcpu) -> list[CpuidEntry]:
    return [entry for entry in vcpu.get_cpuid2() if entry.function == _CPUID_XSAVE]


def _nested_format(nested_state: bytes) -> int:
    """KVM_STATE_NESTED_FORMAT_VMX or _SVM."""
    return int.from_bytes(nested_state[2:4], "little")


def _read_msrs(vcpu: kvm.Vcpu, indices: Iterable[int]) -> dict[int, int]:
    """The values of those that KVM gives."""
    left = list(indices)
    values: dict[int, int] = {}
    while left:
        try:
            entries = vcpu.get_msrs(left)
        except MsrError as error:
            # It has given those before, and they are not ours to have: ask again without the one.
            given = left[: error.done]
            values |= {entry.index: entry.data for entry in vcpu.get_msrs(given)} if given else {}
            left = left[error.done + 1 :]
            continue
        values |= {entry.index: entry.data for entry in entries}
        break
    return values


def _write_msrs(vcpu: kvm.Vcpu, entries: Iterable[MsrEntry]) -> tuple[int, ...]:
    """Set them; returns those that KVM refuses."""
    left = list(entries)
    refused: tuple[int, ...] = ()
    while left:
        try:
            vcpu.set_msrs(left)
        except MsrError as error:
            refused += (error.index,)
            left = left[error.done + 1 :]
            continue
        break
    return refused
