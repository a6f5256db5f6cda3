from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import TraceError
from aiokvm.proto.trace import MAX_DATA_BYTES, POSTED, Decoder, Encoder, Header, Lost, Record

HEADER = Header("web-1", 1_700_000_000_000_000_000)
HEADER_BYTES = Encoder().header(HEADER)
NAMES = st.text(st.characters(codec="utf-8"), max_size=20).filter(str.isprintable)
U64 = st.integers(0, (1 << 64) - 1)


@st.composite
def records(draw: st.DrawFn) -> Record:
    size = draw(st.integers(0, 8))
    count = draw(st.integers(0, 40))
    is_write = draw(st.booleans())
    length = size * count if is_write else 0
    return Record(
        time_ns=draw(U64),
        vcpu=draw(st.none() | st.integers(0, 0xFFFE)),
        reason=draw(st.integers(0, POSTED)),
        address=draw(U64),
        size=size,
        accesses=count,
        is_write=is_write,
        is_port=draw(st.booleans()),
        data=draw(st.binary(min_size=length, max_size=length)),
        device=draw(NAMES),
        error=draw(st.integers(0, 255)),
    )


ITEMS = st.lists(records() | st.builds(Lost, st.integers(0, 0xFFFF_FFFF)), max_size=10)


def encode(items: list[Record | Lost], header: Header = HEADER) -> bytes:
    encoder = Encoder()
    parts = [encoder.record(item) if isinstance(item, Record) else encoder.lost(item.count) for item in items]
    return encoder.header(header) + b"".join(parts)


def decode(data: bytes) -> tuple[Header | None, list[Record | Lost]]:
    decoder = Decoder()
    found = list(decoder.feed(data))
    decoder.close()
    return decoder.header, found


def test_a_record_is_written_byte_for_byte() -> None:
    record = Record(5, 1, 2, 0x3F8, 1, 2, is_write=True, is_port=True, data=b"hi", device="Uart")
    assert encode([record, Lost(7)]) == (
        b"AIOKVMTR" b"\x01\0" b"\x05\0" + struct.pack("<Q", HEADER.start_ns) + b"web-1"
        b"\x01\0" b"\x04\0" b"\0\0\0\0" b"Uart"
        b"\x02\x03\x01\0" b"\x02\0" b"\x01\0" b"\0\0\0\0" b"\x02\0\0\0"
        b"\x05\0\0\0\0\0\0\0" b"\xf8\x03\0\0\0\0\0\0" b"hi"
        b"\x03\0\0\0" b"\x07\0\0\0"
    )  # fmt: skip


@given(ITEMS, NAMES, U64)
def test_what_is_written_reads_back(items: list[Record | Lost], name: str, start_ns: int) -> None:
    header = Header(name, start_ns)
    assert decode(encode(items, header)) == (header, items)


@given(ITEMS, st.lists(st.integers(1, 50)))
def test_pieces_of_any_size_are_the_same(items: list[Record | Lost], sizes: list[int]) -> None:
    data, decoder = encode(items), Decoder()
    found: list[Record | Lost] = []
    for size in [*sizes, len(data)]:
        found += decoder.feed(data[:size])
        data = data[size:]
    decoder.close()
    assert found == items


@given(ITEMS, st.data())
def test_a_trace_that_breaks_off_gives_what_is_whole_and_then_an_error(
    items: list[Record | Lost], data: st.DataObject
) -> None:
    whole = encode(items)
    cut = data.draw(st.integers(0, len(whole) - 1))
    decoder = Decoder()
    found = list(decoder.feed(whole[:cut]))
    assert found == items[: len(found)]
    # A cut between two records is an end like any other.
    with contextlib.suppress(TraceError):
        decoder.close()
        assert whole[:cut].startswith(encode(found))
    found += decoder.feed(whole[cut:])
    assert found == items


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_give_records_or_a_typed_error(noise: bytes, with_header: bool) -> None:
    with contextlib.suppress(TraceError):
        decode(HEADER_BYTES + noise if with_header else noise)


@given(ITEMS, st.data())
def test_a_flipped_byte_gives_records_or_a_typed_error(
    items: list[Record | Lost], data: st.DataObject
) -> None:
    damaged = bytearray(encode(items))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(TraceError):
        decode(bytes(damaged))


def exit_record(flags: int = 0, size: int = 1, device: int = 0xFFFF_FFFF, count: int = 1) -> bytes:
    return struct.pack("<BBBBHHIIQQ", 2, flags, size, 0, 2, 0, device, count, 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no trace: it ends before"),
        (b"AIOK", "no trace: it ends before"),
        (b"\x7fELF", "no trace: aiokvm run --trace"),
        (b"AIOKVMTR\x02\0" + bytes(10), "version 2, only 1"),
        (b"AIOKVMTR\x01\0\xff\xff" + bytes(8), "damaged at byte 0: a name of 65535 bytes"),
        (b"AIOKVMTR\x01\0\x01\0" + bytes(8) + b"\x1b", "damaged at byte 0: a name that is not printable"),
        (b"AIOKVMTR\x01\0\x01\0" + bytes(8) + b"\xff", "damaged at byte 0: a name that is not printable"),
        (HEADER_BYTES + b"\x09", "damaged at byte 25: records of kind 9"),
        (HEADER_BYTES + exit_record()[:-1], "breaks off in the middle of a record, at byte 25"),
        (HEADER_BYTES + exit_record(flags=1), "breaks off"),
        (HEADER_BYTES + exit_record(flags=4), "flags 0x4"),
        (HEADER_BYTES + exit_record(device=0), "device 0 has not been told"),
        (HEADER_BYTES + exit_record(size=8, count=MAX_DATA_BYTES), "65536 accesses of 8 bytes"),
        (HEADER_BYTES + b"\x01\0\x01\0\x05\0\0\0a", "device 5 with a name of 1 bytes"),
        (HEADER_BYTES + b"\x01\0\x01\0\0\0\0\0", "breaks off"),
        (HEADER_BYTES + b"\x03\x01\0\0\0\0\0\0", "what has to be 0 is not"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        decode(data)


def test_names_are_made_fit_to_be_shown() -> None:
    record = Record(0, 0, 2, device="a\n\x1b[31m" + "b" * 2000)
    (found,) = decode(encode([record]))[1]
    assert isinstance(found, Record)
    assert found.device == "a??[31m" + "b" * 1017


def test_values_are_the_accesses() -> None:
    assert Record(0, 0, 2, size=2, accesses=2, is_write=True, data=b"\x01\x02\x03\x04").values == (
        0x201,
        0x403,
    )
    assert Record(0, 0, 2, size=4, accesses=1).values == ()
