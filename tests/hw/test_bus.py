from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import DeviceError
from aiokvm.hw.bus import MMIO_LIMIT, PIO_LIMIT, Bus, ByteRegisters, IrqLine, check_version


class Registers(ByteRegisters):
    registers = 4

    def __init__(self) -> None:
        self.data = bytearray(b"\x11\x22\x33\x44")
        self.log: list[tuple[str, int]] = []

    def read_byte(self, offset: int) -> int:
        self.log.append(("r", offset))
        return self.data[offset]

    def write_byte(self, offset: int, value: int) -> None:
        self.log.append(("w", offset))
        self.data[offset] = value

    def reset(self) -> None:
        self.data = bytearray(4)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (0, 1, 0x11),
        (1, 1, 0x22),
        (0, 2, 0x2211),
        (0, 4, 0x44332211),
        (0, 8, 0xFFFFFFFF44332211),
        (3, 2, 0xFF44),
        (4, 1, 0xFF),
        (7, 4, 0xFFFFFFFF),
    ],
)
def test_byte_registers_read(offset: int, size: int, value: int) -> None:
    device = Registers()
    assert device.read(offset, size) == value
    assert device.log == [("r", i) for i in range(offset, min(offset + size, 4))]


@pytest.mark.parametrize(
    ("offset", "size", "value", "data"),
    [
        (0, 1, 0xAA, "aa223344"),
        (1, 2, 0xBBAA, "11aabb44"),
        (0, 4, 0xDDCCBBAA, "aabbccdd"),
        (2, 8, 0x8877665544332211, "11221122"),
        (4, 4, 0xDDCCBBAA, "11223344"),
        (9, 1, 0xAA, "11223344"),
    ],
)
def test_byte_registers_write(offset: int, size: int, value: int, data: str) -> None:
    device = Registers()
    device.write(offset, size, value)
    assert device.data.hex() == data
    assert device.log == [("w", i) for i in range(offset, min(offset + size, 4))]


def test_irq_line_reports_changes_only() -> None:
    calls: list[bool] = []
    line = IrqLine(calls.append)
    for level in (False, True, True, False, False, True):
        line.set(level)
        assert line.level is level
    assert calls == [True, False, True]


def test_check_version() -> None:
    check_version("thing", 1, 1)
    with pytest.raises(DeviceError, match="thing: saved state has version 2, only 1"):
        check_version("thing", 2, 1)


def test_attach_lookup_detach() -> None:
    bus = Bus(PIO_LIMIT)
    high, low = Registers(), Registers()
    a = bus.attach(high, 0x3F8, 8)
    b = bus.attach(low, 0x60, 1)
    assert (a.id, a.base, a.size, a.device) == (0, 0x3F8, 8, high)
    assert (b.id, b.base, b.size, b.device) == (1, 0x60, 1, low)
    assert list(bus) == [b, a]
    assert len(bus) == 2
    assert [bus.lookup(x) for x in (0, 0x5F, 0x60, 0x61, 0x3F7, 0x3F8, 0x3FF, 0x400)] == (
        [None, None, b, None, None, a, a, None]
    )
    bus.detach(a)
    assert bus.lookup(0x3F8) is None
    assert list(bus) == [b]


def test_ids_are_not_reused() -> None:
    bus = Bus(PIO_LIMIT)
    first = bus.attach(Registers(), 0, 1)
    bus.detach(first)
    second = bus.attach(Registers(), 0, 1)
    assert second.id == first.id + 1
    with pytest.raises(DeviceError, match=r"region 0 \(0x0-0x0\) is not attached"):
        bus.detach(first)
    assert bus.lookup(0) is second


def test_detach_what_was_never_attached() -> None:
    region = Bus(PIO_LIMIT).attach(Registers(), 0, 1)
    with pytest.raises(DeviceError, match="not attached"):
        Bus(PIO_LIMIT).detach(region)


def test_regions_are_frozen() -> None:
    region = Bus(PIO_LIMIT).attach(Registers(), 0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        region.base = 1  # type: ignore[misc]


def test_detaching_while_iterating() -> None:
    bus = Bus(PIO_LIMIT)
    for base in range(4):
        bus.attach(Registers(), base, 1)
    for region in bus:
        bus.detach(region)
    assert len(bus) == 0


@pytest.mark.parametrize(
    ("base", "size"),
    [(0x10, 0x10), (0x0F, 2), (0x1F, 1), (0x0, 0x100), (0x14, 4)],
)
def test_overlap_names_both_ranges(base: int, size: int) -> None:
    bus = Bus(PIO_LIMIT)
    kept = bus.attach(Registers(), 0x10, 0x10)
    with pytest.raises(DeviceError, match=f"{base:#x}-{base + size - 1:#x} for Registers overlaps 0x10-0x1f"):
        bus.attach(Registers(), base, size)
    assert list(bus) == [kept]


@pytest.mark.parametrize(
    ("limit", "base", "size"),
    [
        (PIO_LIMIT, 0x10, 0),
        (PIO_LIMIT, 0x10, -1),
        (PIO_LIMIT, -1, 4),
        (PIO_LIMIT, 0xFFFF, 2),
        (PIO_LIMIT, 0x10000, 1),
        (MMIO_LIMIT, MMIO_LIMIT - 1, 2),
    ],
)
def test_range_outside_the_bus(limit: int, base: int, size: int) -> None:
    bus = Bus(limit)
    with pytest.raises(DeviceError, match=f"addresses from 0 to {limit - 1:#x}"):
        bus.attach(Registers(), base, size)
    assert len(bus) == 0


def test_the_last_address_is_usable() -> None:
    bus = Bus(MMIO_LIMIT)
    region = bus.attach(Registers(), MMIO_LIMIT - 1, 1)
    assert bus.lookup(MMIO_LIMIT - 1) is region
    assert bus.lookup(MMIO_LIMIT) is None


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(-2, 70), st.integers(-1, 20)),
            st.integers(0, 10),  # detach the region of that rank
        ),
        max_size=40,
    )
)
def test_bus_against_a_plain_array(steps: list[tuple[int, int] | int]) -> None:
    limit = 64
    bus = Bus(limit)
    owner: list[int | None] = [None] * limit
    ids: list[int] = []
    for step in steps:
        if isinstance(step, int):
            regions = list(bus)
            if step < len(regions):
                bus.detach(regions[step])
                owner = [None if x == regions[step].id else x for x in owner]
            continue
        base, size = step
        cells = range(base, base + size)
        fits = size > 0 and base >= 0 and base + size <= limit and all(owner[i] is None for i in cells)
        if not fits:
            with pytest.raises(DeviceError):
                bus.attach(Registers(), base, size)
            continue
        region = bus.attach(Registers(), base, size)
        ids.append(region.id)
        for i in cells:
            owner[i] = region.id
    assert len(set(ids)) == len(ids)
    found = [bus.lookup(address) for address in range(limit)]
    assert [region and region.id for region in found] == owner
    assert [region.base for region in bus] == sorted(region.base for region in bus)
