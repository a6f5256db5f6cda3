from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot.acpi import MAX_VIRTIO, Platform, SerialPort, Tables, VirtioMmio, build
from aiokvm.errors import ConfigError

SERIAL = (SerialPort(0x3F8, 4, 0),)
MOST_IN_BIOS_AREA = 2879


def number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def walk(tables: Tables) -> dict[bytes, tuple[int, bytes]]:
    """Finds every table as a guest does, from the RSDP on: signature to address and bytes."""
    found: dict[bytes, tuple[int, bytes]] = {}

    def read(gpa: int) -> bytes:
        offset = gpa - tables.gpa
        assert offset >= 0
        data = tables.data[offset : offset + number(tables.data, offset + 4, 4)]
        assert len(data) == number(data, 4, 4)
        found[data[:4]] = gpa, data
        return data

    rsdp = tables.data[tables.rsdp - tables.gpa :][:36]
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp) % 256 == 0
    rsdt = read(number(rsdp, 16, 4))
    xsdt = read(number(rsdp, 24, 8))
    pointers = [number(xsdt, offset, 8) for offset in range(36, len(xsdt), 8)]
    assert pointers == [number(rsdt, offset, 4) for offset in range(36, len(rsdt), 4)]
    for pointer in pointers:
        read(pointer)
    fadt = found[b"FACP"][1]
    read(number(fadt, 132, 8))
    read(number(fadt, 140, 8))
    return found


@given(st.integers(0, 0xFFF), st.sets(st.integers(0, 0xFFFF_FFFE), min_size=1, max_size=40))
def test_a_guest_finds_every_table(sixteenth: int, apic_ids: set[int]) -> None:
    platform = Platform(tuple(sorted(apic_ids)), SERIAL)
    tables = build(platform, gpa=0xE_0000 + 16 * sixteenth)
    found = walk(tables)
    assert sorted(found) == [b"APIC", b"DSDT", b"FACP", b"FACS", b"RSDT", b"XSDT"]
    assert all(sum(data) % 256 == 0 for signature, (_, data) in found.items() if signature != b"FACS")

    ranges = sorted(
        [(tables.rsdp, tables.rsdp + 36), *((gpa, gpa + len(data)) for gpa, data in found.values())]
    )
    assert all(start % 16 == 0 for start, _ in ranges)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert ranges[-1][1] <= tables.gpa + len(tables.data) <= 0x10_0000
    assert found[b"FACS"][0] % 64 == 0


def test_xsdt_names_the_fadt_first() -> None:
    found = walk(build(Platform((0,))))
    assert number(found[b"XSDT"][1], 36, 8) == found[b"FACP"][0]
    assert list(found)[2:4] == [b"FACP", b"APIC"]


def test_how_many_processors_the_bios_area_holds() -> None:
    tables = build(Platform(tuple(range(MOST_IN_BIOS_AREA)), SERIAL))
    assert 0x2_0000 - 64 < len(tables.data) <= 0x2_0000
    assert len(walk(tables)) == 6
    with pytest.raises(
        ConfigError, match=f"{MOST_IN_BIOS_AREA + 1} processors do not fit in 0xe0000 to 0x100000"
    ):
        build(Platform(tuple(range(MOST_IN_BIOS_AREA + 1)), SERIAL))


def test_a_larger_area_holds_all_processors() -> None:
    tables = build(Platform(tuple(range(4096)), SERIAL), gpa=0x7FF0_0000, limit=0x8000_0000)
    assert tables.gpa == 0x7FF0_0000
    assert len(walk(tables)) == 6


def test_limit_is_exact() -> None:
    size = len(build(Platform((0,))).data)
    assert len(build(Platform((0,)), 0x1000, 0x1000 + size).data) == size
    with pytest.raises(ConfigError, match="do not fit"):
        build(Platform((0,)), 0x1000, 0x1000 + size - 1)


@pytest.mark.parametrize(
    ("gpa", "limit"),
    [(0xE_0008, 0x10_0000), (-16, 0x10_0000), (0xE_0000, 0xE_0000), (0xE_0000, (1 << 32) + 1)],
)
def test_refused_areas(gpa: int, limit: int) -> None:
    with pytest.raises(ConfigError, match="use an area below 4 GiB"):
        build(Platform((0,)), gpa, limit)


def test_the_rsdp_stays_where_it_is_however_many_devices_there_are() -> None:
    few = build(Platform((0,)))
    virtio = tuple(VirtioMmio(0xD000_0000 + 0x1000 * index, 0x1000, 16, True) for index in range(MAX_VIRTIO))
    many = build(Platform((0,), SERIAL, virtio=virtio))
    assert few.rsdp == many.rsdp == few.gpa
    assert len(walk(many)) == 6
