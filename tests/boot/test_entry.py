from __future__ import annotations

import struct

import pytest

from aiokvm.boot.cpu import CpuState, DescriptorTable, SegmentRegister
from aiokvm.boot.entry import (
    CODE_32,
    CODE_64,
    DATA,
    descriptor,
    identity_map,
    long_mode,
    protected_mode,
    real_mode,
)
from aiokvm.boot.plan import BootPlan, GuestInfo, PlanBuilder
from aiokvm.errors import ConfigError


def built(enter: str, entry: int, **registers: int) -> BootPlan:
    builder = PlanBuilder(GuestInfo(((0, 1 << 20),)), ConfigError)
    modes = {"real": real_mode, "protected": protected_mode, "long": long_mode}
    cpu: CpuState = modes[enter](builder, entry, **registers)
    return builder.build(cpu)


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        (CODE_32, 0x00CF_9B00_0000_FFFF),
        (CODE_64, 0x00AF_9B00_0000_FFFF),
        (DATA, 0x00CF_9300_0000_FFFF),
        (
            SegmentRegister(base=0x1234_5678, limit=0xABCDE, type=2, s=1, dpl=3, present=1, avl=1),
            0x121A_F234_5678_BCDE,
        ),
    ],
)
def test_descriptor(segment: SegmentRegister, expected: int) -> None:
    assert descriptor(segment) == expected


def test_real_mode_below_64_kib_has_all_code_and_data_segments_at_zero() -> None:
    plan = built("real", 0x7C00)
    cpu = plan.cpu
    assert plan.segments == ()
    assert (cpu.rip, cpu.cs.selector, cpu.cs.base, cpu.cs.limit) == (0x7C00, 0, 0, 0xFFFF)
    assert {s.base for s in (cpu.ds, cpu.es, cpu.fs, cpu.gs)} == {0}
    assert (cpu.ss.selector, cpu.ss.base, cpu.rsp) == (0x8000, 0x8_0000, 0xFFF0)
    assert (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer, cpu.rflags) == (0x10, 0, 0, 0, 2)


@pytest.mark.parametrize(
    ("entry", "selector", "ip"), [(0xFFFF, 0, 0xFFFF), (0x1_0000, 0x1000, 0), (0xF_FFF5, 0xFFFF, 5)]
)
def test_real_mode_entry_is_split_at_64_kib(entry: int, selector: int, ip: int) -> None:
    cpu = built("real", entry).cpu
    assert (cpu.cs.selector, cpu.cs.base, cpu.rip) == (selector, selector << 4, ip)
    assert (cpu.ds.selector, cpu.ds.base) == (selector, selector << 4)
    assert cpu.cs.base + cpu.rip == entry


def test_protected_mode_is_what_pvh_and_the_32_bit_protocol_ask_for() -> None:
    plan = built("protected", 0x12_3456, rbx=7, rsi=9)
    cpu = plan.cpu
    assert (cpu.rip, cpu.rbx, cpu.rsi, cpu.rsp, cpu.rflags) == (0x12_3456, 7, 9, 0x9_0000, 2)
    assert (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer) == (0x11, 0, 0, 0)
    assert cpu.cs == SegmentRegister(selector=0x10, limit=0xFFFF_FFFF, type=11, s=1, present=1, db=1, g=1)
    for data in (cpu.ds, cpu.es, cpu.ss):
        assert data == SegmentRegister(selector=0x18, limit=0xFFFF_FFFF, type=3, s=1, present=1, db=1, g=1)
    assert cpu.tr == SegmentRegister(limit=0x67, type=11, present=1)
    assert cpu.ldt.unusable == 1
    assert (cpu.gdt, cpu.idt) == (DescriptorTable(0x9_0000, 31), DescriptorTable(0, 0))
    (gdt,) = plan.segments
    assert gdt.gpa == cpu.gdt.base
    assert struct.unpack("<4Q", gdt.data) == (0, 0, descriptor(CODE_32), descriptor(DATA))


def test_long_mode_has_paging_on() -> None:
    plan = built("long", 0x1000)
    cpu = plan.cpu
    assert (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer) == (0x8000_0011, 0x9_3000, 0x20, 0x500)
    assert (cpu.cs.l, cpu.cs.db) == (1, 0)
    data = {segment.gpa: bytes(segment.data) for segment in plan.segments}
    assert data[0x9_3000] == identity_map(0x9_3000)
    assert struct.unpack("<4Q", data[0x9_0000])[2] == descriptor(CODE_64)


@pytest.mark.parametrize(
    "address", [0, 0x1F_FFFF, 0x20_0000, 0x3FFF_FFFF, 0x4000_0000, 0xFEE0_0000, 0xFFFF_FFFF]
)
def test_identity_map_translates_every_address_below_4_gib_to_itself(address: int) -> None:
    gpa = 0x9_3000
    tables = identity_map(gpa)
    assert len(tables) == 0x6000

    def entry(table: int, index: int) -> int:
        (value,) = struct.unpack_from("<Q", tables, table - gpa + 8 * index)
        assert value & 3 == 3
        return int(value)

    pdpt = entry(gpa, address >> 39 & 0x1FF) & -0x1000
    directory = entry(pdpt, address >> 30 & 0x1FF) & -0x1000
    page = entry(directory, address >> 21 & 0x1FF)
    assert page & 0x80
    assert (page & -0x20_0000) + (address & 0x1F_FFFF) == address


def test_identity_map_ends_at_4_gib() -> None:
    pml4, pdpt = (struct.unpack_from("<512Q", identity_map(0), offset) for offset in (0, 0x1000))
    assert not any(pml4[1:])
    assert not any(pdpt[4:])
