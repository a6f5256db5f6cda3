"""proto/pcapng.py: what is written is read back, by us and by others."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import TraceError
from aiokvm.proto import pcapng
from aiokvm.proto.pcapng import Interface, Packet, Statistics

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
PACKETS = st.builds(
    Packet, st.just(0), U64, st.binary(max_size=100), U32, st.sampled_from([None, True, False])
)
ITEMS = st.lists(
    PACKETS | st.builds(Statistics, st.just(0), U64, U64, U64) | st.builds(Interface, NAMES, U32)
)
FIRST = Interface("net0", 65535)


def encoded(items: list[Interface | Packet | Statistics]) -> bytes:
    blocks = {
        Interface: pcapng.interface_description,
        Packet: pcapng.packet,
        Statistics: pcapng.statistics,
    }
    return pcapng.section_header("aiokvm") + b"".join(blocks[type(item)](item) for item in items)  # type: ignore[operator]


@given(ITEMS)
def test_what_is_written_is_read_back(items: list[Interface | Packet | Statistics]) -> None:
    assert list(pcapng.read(encoded([FIRST, *items]))) == [FIRST, *items]
    # Sections follow each other.
    assert list(pcapng.read(encoded([FIRST]) + encoded([FIRST, *items]))) == [FIRST, FIRST, *items]


@given(ITEMS, st.data())
def test_damage_is_an_error_and_nothing_else(
    items: list[Interface | Packet | Statistics], data: st.DataObject
) -> None:
    damaged = bytearray(encoded([FIRST, *items]))
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TraceError):
        list(pcapng.read(bytes(damaged[: data.draw(st.integers(0, len(damaged)))])))


def test_the_other_byte_order_and_microseconds() -> None:
    section = struct.pack(">IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    interface = struct.pack(">IIHHII", 1, 20, 1, 0, 1500, 20)
    packet = struct.pack(">IIIIIII4sI", 6, 36, 0, 1, 2, 3, 60, b"abc\0", 36)
    assert list(pcapng.read(section + interface + packet)) == [
        Interface("", 1500),
        Packet(0, ((1 << 32) + 2) * 1000, b"abc", 60),
    ]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xd4\xc3\xb2\xa1", "this is no pcapng file"),
        (struct.pack("<III", 0x0A0D0D0A, 28, 1), "no byte order"),
        (pcapng.section_header("x")[:-1], "bytes, 43 are there|has .* bytes"),
        (pcapng.section_header("x") + pcapng.packet(Packet(0, 0, b"", 0)), "names interface 0 of 0"),
        (pcapng.section_header("x")[:-4] + bytes(4), "two lengths"),
        (pcapng.section_header("x") + struct.pack("<II", 1, 1 << 30) + bytes(1000), "1073741824 bytes"),
    ],
)
def test_what_is_no_capture(data: bytes, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        list(pcapng.read(data))
