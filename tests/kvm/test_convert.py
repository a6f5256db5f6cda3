from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm._core import ffi
from aiokvm.kvm import (
    DTable,
    EventException,
    Fpu,
    IoapicState,
    PitChannelState,
    PitState2,
    Regs,
    Segment,
    Sregs,
    VcpuEvents,
    structs,
    vm_structs,
)
from aiokvm.kvm.convert import Struct, from_c, to_c

NAMED = [
    struct
    for module in (structs, vm_structs)
    for struct in vars(module).values()
    if isinstance(struct, type) and issubclass(struct, Struct) and struct.c_name
]


def test_the_compiler_agrees_with_every_declared_structure() -> None:
    _, names, _ = ffi.list_types()  # type: ignore[attr-defined]
    sizes = {name: ffi.sizeof(f"struct {name}") for name in names if name.startswith("kvm_")}
    assert len(sizes) > 50
    assert sizes["kvm_regs"] == 144
    assert sizes["kvm_sregs"] == 312
    assert sizes["kvm_vcpu_events"] == 64


@pytest.mark.parametrize("struct", NAMED, ids=lambda struct: struct.__name__)
def test_all_zeros_are_a_valid_dataclass(struct: type[Struct]) -> None:
    c = ffi.new(f"struct {struct.c_name} *")
    value = from_c(struct, c)
    assert bytes(ffi.buffer(to_c(value))) == bytes(ffi.sizeof(f"struct {struct.c_name}"))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=18, max_size=18))
def test_registers_survive(values: list[int]) -> None:
    regs = Regs(*values)
    c = to_c(regs)
    assert c.rax == values[0]
    assert c.rflags == values[17]
    assert from_c(Regs, c) == regs


def test_structures_in_structures_and_arrays() -> None:
    sregs = Sregs(
        cs=Segment(base=1 << 40, limit=0xFFFFF, selector=8, type=11, present=1, s=1, l=1, g=1),
        gdt=DTable(0x1234, 39),
        efer=0x500,
        interrupt_bitmap=(1, 2, 3, 1 << 63),
    )
    c = to_c(sregs)
    assert (c.cs.base, c.gdt.limit, list(c.interrupt_bitmap)) == (1 << 40, 39, [1, 2, 3, 1 << 63])
    assert from_c(Sregs, c) == sregs
    fpu = Fpu(fpr=(b"\1" * 16, *(bytes(16),) * 7), xmm=(*(bytes(16),) * 15, bytes(range(16))))
    assert from_c(Fpu, to_c(fpu)) == fpu
    events = VcpuEvents(exception=EventException(injected=1, nr=14, has_error_code=1, error_code=7))
    assert from_c(VcpuEvents, to_c(events)) == events
    pit = PitState2(channels=(PitChannelState(count=65536, count_load_time=-5),) * 3, flags=1)
    assert from_c(PitState2, to_c(pit)) == pit
    ioapic = IoapicState(redirtbl=tuple(range(24)))
    assert from_c(IoapicState, to_c(ioapic)) == ioapic


def test_a_number_too_large_is_refused() -> None:
    with pytest.raises(OverflowError):
        to_c(Regs(rax=1 << 64))
    with pytest.raises(OverflowError):
        to_c(Segment(dpl=256))


def test_an_array_too_long_is_refused() -> None:
    with pytest.raises(IndexError):
        to_c(Sregs(interrupt_bitmap=(0,) * 5))


def test_structures_are_frozen() -> None:
    regs = Regs()
    with pytest.raises(dataclasses.FrozenInstanceError):
        regs.rax = 1  # type: ignore[misc]
    assert not hasattr(regs, "__dict__")
