"""Saving and restoring a vCPU: the order, what a host may lack or refuse, and what has to be started anew."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from aiokvm import boot, kvm
from aiokvm.kvm import (
    Cap,
    CpuidEntry,
    DebugRegs,
    Fpu,
    MpState,
    MsrEntry,
    MsrError,
    Regs,
    Sregs,
    VcpuEvents,
    Xcr,
)
from aiokvm.kvm.state_structs import Sregs2
from aiokvm.machine import vcpu_state
from aiokvm.machine.config import Config
from aiokvm.machine.hardware import Hardware
from aiokvm.machine.vcpu_state import MSR_FEATURE_CONTROL, MSR_TSC, MSR_TSC_DEADLINE, MSRS_OF_TIME

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PKRU_OFFSET = 0xA80
VMX, SVM = 0, 1
MSR_READ_ONLY = 0xFE


def nested(kind: int) -> bytes:
    return struct.pack("<HHI120x", 0, kind, 128)


class FakeVcpu:
    """A vCPU that records what is done to it. ``lacks`` are capabilities that its host has not."""

    def __init__(self, *lacks: Cap, pkru: bool = True) -> None:
        self.calls: list[Any] = []
        self.vm = self
        self.lacks = lacks
        self.msrs = {MSR_READ_ONLY: 5, MSR_TSC: 1000, MSR_FEATURE_CONTROL: 1, 0x277: 6, MSR_TSC_DEADLINE: 0}
        self.area = bytearray(4096)
        self.lapic = bytearray(1024)
        self.cpuid = [CpuidEntry(1), CpuidEntry(0xD, 0, eax=0x207 if pkru else 7)]
        self.cpuid += [CpuidEntry(0xD, 9, eax=8, ebx=PKRU_OFFSET)] if pkru else []

    def check_extension(self, cap: Cap) -> int:
        return int(cap not in self.lacks)

    def get_mp_state(self) -> MpState:
        self.calls.append("get mp_state")
        return MpState.KVM_MP_STATE_RUNNABLE

    def get_regs(self) -> Regs:
        self.calls.append("get regs")
        return Regs()

    def get_sregs(self) -> Sregs:
        return Sregs()

    def get_sregs2(self) -> Sregs2:
        return Sregs2()

    def get_fpu(self) -> Fpu:
        return Fpu()

    def get_xsave(self) -> bytes:
        return bytes(self.area)

    get_xsave2 = get_xsave

    def get_xcrs(self) -> tuple[Xcr, ...]:
        return (Xcr(0, 7),)

    def get_debugregs(self) -> DebugRegs:
        return DebugRegs()

    def get_lapic(self) -> bytes:
        return bytes(self.lapic)

    def get_nested_state(self) -> bytes:
        return nested(VMX)

    def get_vcpu_events(self) -> VcpuEvents:
        self.calls.append("get events")
        return VcpuEvents()

    def get_cpuid2(self) -> tuple[CpuidEntry, ...]:
        return tuple(self.cpuid)

    def get_msrs(self, indices: Iterable[int]) -> tuple[MsrEntry, ...]:
        found: list[MsrEntry] = []
        for index in indices:
            if index not in self.msrs:
                raise MsrError("KVM_GET_MSRS", index, len(found))
            found.append(MsrEntry(index, self.msrs[index]))
        return tuple(found)

    def set_msrs(self, entries: Iterable[MsrEntry]) -> None:
        for done, entry in enumerate(entries):
            if entry.index == MSR_READ_ONLY:
                raise MsrError("KVM_SET_MSRS", entry.index, done)
            self.calls.append((entry.index, entry.data))
            self.msrs[entry.index] = entry.data

    def set_xsave(self, area: bytes) -> None:
        self.calls.append("xsave")
        self.area[:] = area

    def __getattr__(self, name: str) -> Any:
        assert name.startswith("set_")

        what = name.removeprefix("set_")

        def call(value: object) -> None:
            self.calls.append((what, value) if what == "nested_state" else what)

        return call


def save(vcpu: FakeVcpu) -> vcpu_state.SavedVcpu:
    fake: Any = vcpu
    return vcpu_state.save(fake, [*vcpu.msrs])


def restore(vcpu: FakeVcpu, state: vcpu_state.SavedVcpu) -> tuple[int, ...]:
    vcpu.calls.clear()
    fake: Any = vcpu
    return vcpu_state.restore(fake, state)


def test_what_takes_effect_by_being_read_is_read_first_and_last() -> None:
    vcpu = FakeVcpu()
    save(vcpu)
    assert vcpu.calls == ["get mp_state", "get regs", "get events"]


def test_the_order_of_restoring_holds() -> None:
    vcpu = FakeVcpu()
    state = save(vcpu)
    vcpu.msrs |= {MSR_TSC: 5_000_000, MSR_FEATURE_CONTROL: 5, 0x277: 0x0101, MSR_TSC_DEADLINE: 77}
    assert restore(vcpu, state) == ()
    no_guests = struct.pack("<HHIQQ104x", 0, VMX, 128, (1 << 64) - 1, (1 << 64) - 1)
    assert vcpu.calls == [
        "get mp_state",
        ("nested_state", no_guests),
        *("mp_state", "regs", "sregs2", "xsave", "xsave", "xcrs", "debugregs", "lapic"),
        (MSR_FEATURE_CONTROL, 1),
        ("nested_state", nested(VMX)),
        (0x277, 6),
        (MSR_TSC, 1000),
        (MSR_TSC_DEADLINE, 0),
        "vcpu_events",
    ]


def test_what_a_host_lacks_is_left_out() -> None:
    lacks = (Cap.KVM_CAP_SREGS2, Cap.KVM_CAP_XSAVE, Cap.KVM_CAP_XCRS, Cap.KVM_CAP_NESTED_STATE)
    vcpu = FakeVcpu(*lacks)
    state = save(vcpu)
    assert (state.xsave, state.xcrs, state.nested_state) == (None, (), None)
    restore(vcpu, state)
    names = [call for call in vcpu.calls if isinstance(call, str)]
    assert names == ["get mp_state", "mp_state", "regs", "sregs", "fpu", "debugregs", "lapic", "vcpu_events"]


def test_a_vcpu_leaves_its_guests_in_the_way_of_its_vendor() -> None:
    vcpu = FakeVcpu()
    restore(vcpu, replace(save(vcpu), nested_state=nested(SVM)))
    assert vcpu.calls[1] == ("nested_state", struct.pack("<HHI120x", 0x100, SVM, 128))


def test_msrs_that_are_refused_are_told_and_the_others_set() -> None:
    vcpu = FakeVcpu()
    state = save(vcpu)
    vcpu.msrs |= {MSR_READ_ONLY: 6, 0x277: 7}
    assert restore(vcpu, state) == (MSR_READ_ONLY,)
    assert vcpu.msrs[0x277] == 6
    # One that is as it should be need not be set.
    vcpu.msrs[MSR_READ_ONLY] = 5
    assert restore(vcpu, state) == ()


@pytest.mark.parametrize(
    ("lvtt", "deadline", "restored"),
    [
        (2 << 17, 0, 1000),  # in use, due: at once
        (2 << 17, 99, 99),
        (2 << 17 | 1 << 16, 0, 0),  # masked
        (1 << 17, 0, 0),  # periodic
        (0, 0, 0),
    ],
)
def test_a_timer_that_was_due_is_due_again(lvtt: int, deadline: int, restored: int) -> None:
    vcpu = FakeVcpu()
    vcpu.lapic[0x320:0x324] = lvtt.to_bytes(4, "little")
    vcpu.msrs[MSR_TSC_DEADLINE] = deadline
    state = save(vcpu)
    restore(vcpu, state)
    assert vcpu.msrs[MSR_TSC_DEADLINE] == restored


@pytest.mark.parametrize(("pkru", "listed"), [(0, 0), (0x55555554, 1 << 9)])
def test_protection_keys_are_listed_where_they_are_used(pkru: int, listed: int) -> None:
    vcpu = FakeVcpu()
    vcpu.area[PKRU_OFFSET : PKRU_OFFSET + 4] = pkru.to_bytes(4, "little")
    state = save(vcpu)
    assert state.xsave is not None
    assert int.from_bytes(state.xsave[512:520], "little") == listed


def test_bytes_that_the_header_does_not_list_are_taken_over_first() -> None:
    areas: list[int] = []

    class Fake(FakeVcpu):
        def set_xsave(self, area: bytes) -> None:
            areas.append(int.from_bytes(area[512:520], "little"))

    for pkru in (True, False):
        vcpu = Fake(pkru=pkru)
        restore(vcpu, save(vcpu))
    assert areas == [0x203, 0, 0x3, 0]


# The real thing.


@pytest.fixture
def hardware() -> Iterator[Hardware]:
    hardware = Hardware(Config(boot=boot.Flat(b"\xf4"), memory_bytes=2 << 20))
    yield hardware
    hardware.close()


@pytest.mark.kvm
def test_msrs_that_no_list_names_are_found(hardware: Hardware) -> None:
    with kvm.System() as system:
        found = vcpu_state.msr_indices(system, hardware.vcpus[0])
        assert len(set(found)) == len(found)
        assert {0x200, 0x20F, 0x250, 0x2FF, 0x400} <= set(found)


@pytest.mark.kvm
def test_what_was_saved_is_what_is_restored(hardware: Hardware) -> None:
    vcpu = hardware.vcpus[0]
    with kvm.System() as system:
        msrs = vcpu_state.msr_indices(system, vcpu)
    state = vcpu_state.save(vcpu, msrs)
    for index, value in ((0x200, 6), (0x250, 0x0606_0606), (0x277, 0x0606_0606)):
        vcpu.set_msrs([MsrEntry(index, value)])
    vcpu.set_fpu(replace(vcpu.get_fpu(), fcw=0x27F))
    vcpu.set_regs(Regs(rax=1, rflags=2))
    assert vcpu_state.restore(vcpu, state) == ()
    again = vcpu_state.save(vcpu, msrs)
    assert {index for index in msrs if again.msrs[index] != state.msrs[index]} <= MSRS_OF_TIME
    assert replace(again, msrs={}) == replace(state, msrs={})
