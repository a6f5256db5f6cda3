from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot.entry import long_mode, protected_mode, real_mode
from aiokvm.boot.layout import FOUR_GIB, HIGH_MEMORY, PAGE_SIZE
from aiokvm.boot.plan import BootPlan, GuestInfo, PlanBuilder, Segment, check_plan
from aiokvm.errors import BootError, ConfigError

MIB = 1 << 20
GUEST = GuestInfo(((0, 16 * MIB), (FOUR_GIB, 4 * MIB)))


def builder(guest: GuestInfo = GUEST) -> PlanBuilder:
    return PlanBuilder(guest, BootError)


def test_copy_and_zero_end_up_in_the_plan() -> None:
    b = builder()
    b.copy("code", 2 * MIB, b"abc", 10)
    b.copy("bss", 3 * MIB, b"", 5)
    b.copy("data", 4 * MIB, b"xy")
    plan = b.build(protected_mode(b, 2 * MIB))
    assert plan.segments[:2] == (Segment(2 * MIB, b"abc"), Segment(4 * MIB, b"xy"))
    assert plan.zero == ((2 * MIB + 3, 7), (3 * MIB, 5))


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (16 * MIB - 1, 2),
        (16 * MIB, 1),
        (FOUR_GIB - 1, 2),
        (FOUR_GIB + 4 * MIB, 1),
        (0, FOUR_GIB),
        (1 << 64, 1),
    ],
)
def test_outside_ram_is_refused_with_the_ranges(gpa: int, size: int) -> None:
    with pytest.raises(
        BootError, match=rf"^x \({gpa:#x} to {gpa + size:#x}\) is not inside RAM \(0x0 to 0x1000000, "
    ):
        builder().claim("x", gpa, size)


def test_the_last_bytes_of_each_range_are_ram() -> None:
    b = builder()
    b.claim("low", 16 * MIB - 4, 4)
    b.claim("high", FOUR_GIB + 4 * MIB - 4, 4)
    assert b.highest(4, 1 << 40) == FOUR_GIB + 4 * MIB - PAGE_SIZE


@pytest.mark.parametrize(
    ("gpa", "size"), [(4 * MIB, 1), (4 * MIB - 1, 2), (5 * MIB - 1, 9), (3 * MIB, 4 * MIB)]
)
def test_overlap_is_refused_with_both_names(gpa: int, size: int) -> None:
    b = builder()
    b.claim("before", 2 * MIB, 16)
    b.claim("first", 4 * MIB, MIB)
    b.claim("after", 9 * MIB, 16)
    with pytest.raises(BootError, match=r"^second .* overlaps first \(0x400000 to 0x500000\)$"):
        b.claim("second", gpa, size)


def test_neighbours_do_not_overlap() -> None:
    b = builder()
    b.claim("first", 4 * MIB, MIB)
    b.claim("below", 3 * MIB, MIB)
    b.claim("above", 5 * MIB, MIB)
    with pytest.raises(BootError, match="overlaps below"):
        b.claim("x", 4 * MIB - 1, 1)


def test_acpi_tables_are_kept_clear_only_where_there_are_any() -> None:
    builder().claim("x", 0xE_0000, 16)
    with pytest.raises(BootError, match="overlaps the ACPI tables"):
        builder(GuestInfo(GUEST.ram, rsdp=0xE_0000)).claim("x", 0xF_0000, 16)


def test_highest_prefers_the_top_then_the_gap_below_what_is_taken() -> None:
    b = builder(GuestInfo(((0, 16 * MIB),)))
    assert b.highest(5000, FOUR_GIB) == 16 * MIB - 2 * PAGE_SIZE
    assert b.highest(PAGE_SIZE, 8 * MIB) == 8 * MIB - PAGE_SIZE
    assert b.highest(PAGE_SIZE, 8 * MIB + 7) == 8 * MIB - PAGE_SIZE
    b.claim("top", 10 * MIB, 6 * MIB)
    assert b.highest(MIB, FOUR_GIB) == 9 * MIB
    assert b.highest(9 * MIB, FOUR_GIB) == HIGH_MEMORY
    assert b.highest(9 * MIB + 1, FOUR_GIB) is None
    assert b.highest(1, HIGH_MEMORY) is None


@given(
    st.lists(st.tuples(st.integers(0, 17 * MIB), st.integers(1, 5 * MIB)), max_size=12),
    st.integers(1, 8 * MIB),
    st.integers(0, 20 * MIB),
)
def test_what_was_accepted_is_in_ram_and_disjoint(
    claims: list[tuple[int, int]], size: int, limit: int
) -> None:
    b = builder(GuestInfo(((0, 16 * MIB),)))
    taken: list[tuple[int, int]] = []
    for gpa, length in claims:
        free = all(gpa + length <= start or end <= gpa for start, end in taken)
        if free and gpa + length <= 16 * MIB:
            b.claim("x", gpa, length)
            taken.append((gpa, gpa + length))
        else:
            with pytest.raises(BootError):
                b.claim("x", gpa, length)
    best = max(
        (
            gpa
            for gpa in range(HIGH_MEMORY, 16 * MIB, PAGE_SIZE)
            if gpa + size <= min(limit, 16 * MIB) and all(gpa + size <= s or e <= gpa for s, e in taken)
        ),
        default=None,
    )
    assert b.highest(size, limit) == best


def test_the_structures_of_all_modes_fit_beside_each_other_and_acpi() -> None:
    guest = GuestInfo(((0, MIB),), rsdp=0xE_0000)
    for mode in (real_mode, protected_mode, long_mode):
        b = PlanBuilder(guest, ConfigError)
        b.build(mode(b, 0x1000))


# The checker, for plans that nobody's builder has checked.


def a_plan(*segments: tuple[int, bytes | memoryview], zero: tuple[tuple[int, int], ...] = ()) -> BootPlan:
    cpu = builder().build(protected_mode(builder(), 0)).cpu
    return BootPlan(tuple(Segment(*segment) for segment in segments), cpu, zero)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (a_plan((16 * MIB - 1, b"ab")), r"segment 0 of the boot plan \(.*\) is not inside RAM"),
        (a_plan((0, b"a"), (-1, b"ab")), r"segment 1 of the boot plan \(.*\) is not inside RAM"),
        (a_plan((1 << 64, b"ab")), r"is not inside RAM"),
        (a_plan((0xF_FFFF, b"ab")), "segment 0 of the boot plan .* overlaps the ACPI tables"),
        (a_plan((0xE_0000, b"ab")), "overlaps the ACPI tables"),
        (a_plan((MIB, b"abc"), (MIB + 2, b"d")), "segment 1 of .* overlaps segment 0 of"),
        (a_plan((MIB, b"abc"), zero=((MIB + 2, 8),)), "zero range 0 of .* overlaps segment 0 of"),
        (a_plan(zero=((8 * MIB, 9 * MIB),)), "zero range 0 .* is not inside RAM"),
        (a_plan(zero=((8 * MIB, -1),)), "zero range 0 of the boot plan has -1 bytes"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(plan: BootPlan, message: str) -> None:
    with pytest.raises(BootError, match=message):
        check_plan(plan, GuestInfo(GUEST.ram, rsdp=0xE_0000))


def test_a_plan_that_can_be_carried_out_is_taken() -> None:
    words = memoryview(bytes(32)).cast("Q")
    check_plan(a_plan((MIB, b"abc"), (MIB + 3, words), (2 * MIB, b""), zero=((MIB + 35, 1),)), GUEST)
    # Without tables there is nothing in their place.
    check_plan(a_plan((0xE_0000, b"ab")), GUEST)
