from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot import Flat, GuestInfo, Segment
from aiokvm.errors import BootError, ConfigError

MIB, GIB = 1 << 20, 1 << 30
GUEST = GuestInfo(((0, 16 * MIB),), rsdp=0xE_0000)


def test_bytes_are_loaded_and_entered_in_real_mode_at_0x1000() -> None:
    flat = Flat(b"\xf4")
    assert flat.files() == ()
    plan = flat.plan({}, GUEST)
    assert plan.segments == (Segment(0x1000, b"\xf4"),)
    assert (plan.cpu.cs.base, plan.cpu.rip, plan.cpu.cr0 & 1) == (0, 0x1000, 0)


@pytest.mark.parametrize("image", ["image.bin", Path("image.bin")])
def test_a_path_is_read_by_the_caller(image: str | Path) -> None:
    flat = Flat(image, load=0x2000, entry=0x2001)
    assert flat.files() == (Path("image.bin"),)
    plan = flat.plan({Path("image.bin"): b"\x90\xf4"}, GUEST)
    assert plan.segments == (Segment(0x2000, b"\x90\xf4"),)
    assert plan.cpu.rip == 0x2001


def test_protected_and_long_mode_bring_their_structures() -> None:
    protected = Flat(b"\xf4", mode="protected").plan({}, GUEST)
    assert [s.gpa for s in protected.segments] == [0x9_0000, 0x1000]
    assert protected.cpu.cs.db == 1
    long = Flat(b"\xf4", load=MIB, entry=MIB, mode="long").plan({}, GUEST)
    assert [s.gpa for s in long.segments] == [0x9_3000, 0x9_0000, MIB]
    assert (long.cpu.cs.l, long.cpu.rip) == (1, MIB)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "virtual"},
        {"load": -1},
        {"load": 0x1001},
        {"entry": MIB},
        {"entry": 4 * GIB, "mode": "long"},
        {"entry": 4 * GIB, "mode": "protected"},
    ],
)
def test_impossible_settings_are_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Flat(b"\xf4", **arguments)


@pytest.mark.parametrize(
    ("arguments", "size", "message"),
    [
        ({"entry": 0x1010}, 16, r"entry 0x1010 is not inside the image \(0x1000 to 0x1010\)"),
        ({"mode": "long"}, 0x7_F001, r"the image \(0x1000 to 0x80001\) overlaps the stack"),
        ({"load": 0x9_001F, "entry": 0x9_001F, "mode": "protected"}, 1, "overlaps the GDT"),
        ({"load": 0x9_8FFF, "entry": 0x9_8FFF, "mode": "long"}, 1, "overlaps the page tables"),
        ({"load": 0x8_0000, "entry": 0x8_0000}, 1, "overlaps the stack"),
        ({"load": 0xF_0000, "entry": 0xF_0000}, 1, "overlaps the ACPI tables"),
        ({"load": 16 * MIB - 1, "entry": 16 * MIB - 1, "mode": "long"}, 2, "is not inside RAM"),
        ({"load": 4 * GIB - 1, "entry": 4 * GIB - 1, "mode": "long"}, 2, "beyond the first 4 GiB"),
    ],
)
def test_images_that_do_not_fit_are_refused(arguments: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Flat(bytes(size), **arguments).plan({}, GUEST)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, 0x7_F000),
        ({"load": 0x9_0000, "entry": 0x9_0000}, 0x5_0000),
        ({"load": 0x9_9000, "entry": 0x9_9000, "mode": "long"}, 0x4_7000),
    ],
)
def test_images_may_touch_what_the_mode_needs(arguments: dict[str, Any], size: int) -> None:
    assert len(Flat(bytes(size), **arguments).plan({}, GUEST).segments[-1].data) == size


def test_without_acpi_the_upper_memory_is_free() -> None:
    plan = Flat(b"\xf4", load=0xF_FFF0, entry=0xF_FFF0).plan({}, GuestInfo(GUEST.ram))
    assert plan.cpu.cs.base + plan.cpu.rip == 0xF_FFF0


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(BootError, match="empty"):
        Flat(b"").plan({}, GUEST)


def test_ram_too_small_for_the_mode() -> None:
    with pytest.raises(ConfigError, match=r"the stack .* is not inside RAM"):
        Flat(b"\xf4").plan({}, GuestInfo(((0, 0x8_0000),)))


@given(
    st.integers(0, 17 * MIB),
    st.integers(0, 17 * MIB),
    st.integers(0, MIB),
    st.sampled_from(["real", "protected", "long"]),
)
def test_whatever_was_planned_is_disjoint_and_in_ram(load: int, entry: int, size: int, mode: Any) -> None:
    try:
        plan = Flat(bytes(size), load, entry, mode).plan({}, GUEST)
    except (BootError, ConfigError):
        return
    assert plan.cpu.cs.base + plan.cpu.rip == entry
    ends = sorted((s.gpa, s.gpa + len(s.data)) for s in plan.segments)
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert ends[-1][1] <= 16 * MIB
