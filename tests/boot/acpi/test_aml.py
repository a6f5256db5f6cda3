from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot.acpi import aml
from aiokvm.boot.acpi.table import table
from aiokvm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


def decode_pkg_length(data: bytes) -> tuple[int, int]:
    """The value and the size of the PkgLength that ``data`` starts with, as 20.2.4 reads it."""
    lead = data[0]
    follow = lead >> 6
    if follow == 0:
        return lead & 0x3F, 1
    assert lead & 0x30 == 0
    value = lead & 0x0F
    for index in range(follow):
        value |= data[1 + index] << (4 + 8 * index)
    return value, 1 + follow


def decode_integer(data: bytes) -> int:
    sizes = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}
    if data[0] in (0, 1):
        assert len(data) == 1
        return data[0]
    assert len(data) == 1 + sizes[data[0]]
    return int.from_bytes(data[1:], "little")


EDGES = st.sampled_from([62, 63, 64, 4093, 4094, 4095, (1 << 20) - 4, (1 << 20) - 3, (1 << 28) - 5])


@given(st.integers(0, (1 << 28) - 5) | EDGES)
def test_pkg_length_counts_itself_and_what_follows(size: int) -> None:
    encoded = aml.pkg_length(size)
    assert decode_pkg_length(encoded + bytes(4)) == (size + len(encoded), len(encoded))


@pytest.mark.parametrize(
    ("size", "encoded"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),
        (4093, "4fff"),
        (4094, "810001"),
        ((1 << 20) - 4, "8fffff"),
        ((1 << 20) - 3, "c1000001"),
        ((1 << 28) - 5, "cfffffff"),
    ],
)
def test_pkg_length_is_the_shortest(size: int, encoded: str) -> None:
    assert aml.pkg_length(size).hex() == encoded


def test_pkg_length_has_an_end() -> None:
    with pytest.raises(ConfigError, match="268435452 bytes"):
        aml.pkg_length((1 << 28) - 4)


@given(st.integers(0, (1 << 64) - 1) | st.integers(0, 0x1_0001))
def test_integer_keeps_its_value(value: int) -> None:
    assert decode_integer(aml.integer(value)) == value


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x1_0000, "0c00000100"),
        (0xFFFF_FFFF, "0cffffffff"),
        (1 << 32, "0e0000000001000000"),
        ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)
def test_integer_is_the_shortest(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integer_of_64_bits_only(value: int) -> None:
    with pytest.raises(ConfigError, match=r"no AML integer"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("_HID", b"_HID"),
        ("_SB", b"_SB_"),
        ("X", b"X___"),
        ("\\_SB", b"\\_SB_"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("^^C000", b"^^C000"),
        ("^A.B", b"^\x2eA___B___"),
        ("_SB.PCI0.COM1", b"\x2f\x03_SB_PCI0COM1"),
        ("\\", b"\\\0"),
    ],
)
def test_name_string(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize(
    "path", ["", "TOOLONG", "com1", "1COM", "_SB.", ".A", "A..B", "A B", "\\^A", "A\n", "Ä"]
)
def test_name_string_refuses_what_is_no_name(path: str) -> None:
    with pytest.raises(ConfigError, match="no ACPI name"):
        aml.name_string(path)


def test_name_string_counts_its_segments_in_a_byte() -> None:
    path = ".".join(["A"] * 255)
    assert aml.name_string(path)[:2] == bytes([0x2F, 255])
    with pytest.raises(ConfigError, match="no ACPI name"):
        aml.name_string(path + ".A")


def test_eisa_id() -> None:
    # The bytes of the packed id are in the order in which the id is read: 0x41D0 is "PNP".
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    assert aml.eisa_id("PNP0C02").hex() == "0c41d00c02"


@pytest.mark.parametrize("text", ["ACPI0007", "pnp0501", "PNP050", "PN00501", "PNP05G1", ""])
def test_eisa_id_refuses_others(text: str) -> None:
    with pytest.raises(ConfigError, match="no EISA id"):
        aml.eisa_id(text)


def test_string() -> None:
    assert aml.string("ACPI0007") == b"\x0dACPI0007\0"
    for text in "a\0b", "ü":
        with pytest.raises(ConfigError, match="no AML string"):
            aml.string(text)


def test_named_objects() -> None:
    assert aml.name("_UID", 3) == b"\x08_UID\x0a\x03"
    assert aml.name("_HID", "ABCD0001") == b"\x08_HID\x0dABCD0001\0"
    assert aml.name("_HID", aml.eisa_id("PNP0501")).hex() == "085f4849440c41d00501"
    assert aml.scope("_SB", aml.name("A", 0)) == b"\x10\x0b_SB_\x08A___\0"
    assert aml.device("D", aml.name("A", 0)) == b"\x5b\x82\x0bD___\x08A___\0"


def test_data_objects() -> None:
    assert aml.buffer(b"abc") == b"\x11\x06\x0a\x03abc"
    assert aml.package(5, 0, "A", aml.package()) == b"\x12\x0b\x04\x0a\x05\0\x0dA\0\x12\x02\0"
    assert aml.package(*[0] * 255)[:4] == b"\x12\x42\x10\xff"
    with pytest.raises(ConfigError, match="256 elements"):
        aml.package(*[0] * 256)


def test_methods() -> None:
    body = aml.if_(aml.equal(aml.arg(0), 2), aml.return_(1)), aml.return_(0)
    assert aml.method("_M", 1, *body) == b"\x14\x10_M__\x01\xa0\x07\x93\x68\x0a\x02\xa4\x01\xa4\x00"
    assert aml.arg(6) == b"\x6e"
    for index in -1, 7:
        with pytest.raises(ConfigError, match="Arg"):
            aml.arg(index)
    for arguments in -1, 8:
        with pytest.raises(ConfigError, match=f"not {arguments}"):
            aml.method("_M", arguments)


def test_resource_template() -> None:
    assert aml.resource_template() == b"\x11\x05\x0a\x02\x79\x00"
    assert aml.resource_template(aml.irq_no_flags(4)) == b"\x11\x08\x0a\x05\x22\x10\x00\x79\x00"


def test_resource_descriptors() -> None:
    assert aml.io(0x3F8, 8).hex() == "4701f803f8030108"
    assert aml.irq_no_flags(0).hex() == "220100"
    assert aml.irq_no_flags(15).hex() == "220080"
    assert aml.memory32_fixed(0xD000_0000, 0x1000).hex() == "86090001000000d000100000"
    assert aml.memory32_fixed(0xD000_0000, 0x1000, writable=False)[3] == 0
    assert aml.interrupt(20).hex() == "890600030114000000"
    assert aml.interrupt(20, level=True)[3] == 0b0001
    assert aml.interrupt(20, active_low=True)[3] == 0b0111
    assert aml.interrupt(20, shared=True)[3] == 0b1011
    assert aml.interrupt(5, 6).hex() == "890a0003020500000006000000"


@pytest.mark.parametrize(
    "encode",
    [
        lambda: aml.io(0x1_0000, 1),
        lambda: aml.io(0, 256),
        lambda: aml.irq_no_flags(16),
        lambda: aml.irq_no_flags(-1),
        lambda: aml.memory32_fixed(1 << 32, 1),
        lambda: aml.memory32_fixed(0, -1),
        lambda: aml.interrupt(),
        lambda: aml.interrupt(*range(256)),
        lambda: aml.interrupt(-1),
    ],
)
def test_resource_descriptors_refuse_what_does_not_fit(encode: Callable[[], bytes]) -> None:
    with pytest.raises(ConfigError):
        encode()


def test_iasl_reads_every_kind_of_object(iasl: Callable[[bytes], str]) -> None:
    method = aml.method("TEST", 1, aml.if_(aml.equal(aml.arg(0), "A"), aml.return_(1 << 40)), aml.return_(0))
    resources = aml.resource_template(
        aml.io(0x300, 16),
        aml.irq_no_flags(5),
        aml.memory32_fixed(0xD000_0000, 0x1000, writable=False),
        aml.interrupt(20, 21, level=True, active_low=True, shared=True),
    )
    device = aml.device(
        "VR00", aml.name("_HID", "LNRO0005"), aml.name("_UID", 0), aml.name("_CRS", resources)
    )
    data = aml.name("DATA", aml.package(1, "two", aml.buffer(bytes(range(100))), aml.eisa_id("PNP0A03")))
    asl = iasl(table(b"SSDT", 2, aml.scope("\\_SB", device, aml.scope("^", method), data)))
    words = "".join(asl.split())
    assert "Method(TEST,1,NotSerialized)" in words
    assert 'If((Arg0=="A")){Return(0x0000010000000000)}Return(Zero)' in words
    assert "Memory32Fixed(ReadOnly,0xD0000000,//AddressBase0x00001000,//AddressLength)" in words
    assert "Interrupt(ResourceConsumer,Level,ActiveLow,Shared,,,){0x00000014,0x00000015,}" in words
    assert "IRQNoFlags(){5}" in words
