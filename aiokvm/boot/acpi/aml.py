r"""An encoder of AML, the byte code of the DSDT: one function an ASL word, each returning its encoding.

Objects nest as in ASL: ``scope("\_SB", device("COM1", name("_HID", eisa_id("PNP0501"))))``. Where an object
holds data, an ``int`` or a ``str`` may be given for its constant; ``bytes`` are AML already.

Follows ACPI 6.5, sections 20.2 (AML grammar) and 6.4 (resource data types).
What cannot be encoded raises ConfigError.
"""

from __future__ import annotations

import re
import struct
from typing import TypeAlias

from aiokvm.errors import ConfigError

Data: TypeAlias = int | str | bytes

_NAME_SEG = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_EISA_ID = re.compile(r"[A-Z]{3}[0-9A-F]{4}")


def pkg_length(size: int) -> bytes:
    """Encode the PkgLength before ``size`` bytes: 1 to 4 bytes, which count themselves (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for extra in 1, 2, 3:
        total = size + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ConfigError(f"an AML object of {size} bytes is too long: a PkgLength counts less than 2**28")


def name_string(path: str) -> bytes:
    r"""Encode a path such as ``_HID``, ``\_SB.COM1`` or ``^^S5``, segments padded with ``_`` (20.2.2)."""
    rest = path[1:] if path.startswith("\\") else path.lstrip("^")
    prefix = path[: len(path) - len(rest)]
    segments = rest.split(".") if rest else []
    if not path or len(segments) > 255 or not all(_NAME_SEG.fullmatch(segment) for segment in segments):
        raise ConfigError(f"{path!r} is no ACPI name: use segments of 1 to 4 of A-Z, 0-9, _, joined by dots")
    joined = "".join(segment.ljust(4, "_") for segment in segments).encode()
    match len(segments):
        case 0:
            joined = b"\0"
        case 1:
            pass
        case 2:
            joined = b"\x2e" + joined
        case count:
            joined = bytes([0x2F, count]) + joined
    return prefix.encode() + joined


def integer(value: int) -> bytes:
    """Encode an unsigned constant of up to 64 bits, in its shortest form (20.2.3)."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in (0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8):
        if 0 <= value < 1 << (8 * size):
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ConfigError(f"{value} is no AML integer: use 0 to 2**64 - 1")


def string(text: str) -> bytes:
    """Encode a constant of ASCII characters without NUL."""
    if not text.isascii() or "\0" in text:
        raise ConfigError(f"{text!r} is no AML string: use ASCII characters without NUL")
    return b"\x0d" + text.encode() + b"\0"


def _data(value: Data) -> bytes:
    if isinstance(value, bytes):
        return value
    return string(value) if isinstance(value, str) else integer(value)


def _block(opcode: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return opcode + pkg_length(len(body)) + body


def buffer(content: bytes) -> bytes:
    """``Buffer () {...}``."""
    return _block(b"\x11", integer(len(content)), content)


def package(*elements: Data) -> bytes:
    """``Package () {...}`` of up to 255 elements."""
    if len(elements) > 255:
        raise ConfigError(f"an AML package of {len(elements)} elements is too long: it holds 255")
    return _block(b"\x12", bytes([len(elements)]), *map(_data, elements))


def eisa_id(text: str) -> bytes:
    """``EisaId ("PNP0501")``: three letters of 5 bits and four hex digits, packed big-endian."""
    if not _EISA_ID.fullmatch(text):
        raise ConfigError(f"{text!r} is no EISA id: use three letters A-Z and four hex digits, as in PNP0501")
    value = 0
    for letter in text[:3]:
        value = value << 5 | ord(letter) - 0x40
    value = value << 16 | int(text[3:], 16)
    return integer(int.from_bytes(value.to_bytes(4, "big"), "little"))


def name(path: str, value: Data) -> bytes:
    """``Name (path, value)``."""
    return b"\x08" + name_string(path) + _data(value)


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope (path) {...}``."""
    return _block(b"\x10", name_string(path), *terms)


def device(path: str, *terms: bytes) -> bytes:
    """``Device (path) {...}``."""
    return _block(b"\x5b\x82", name_string(path), *terms)


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Encode ``Method (path, arguments, NotSerialized) {...}``, with 0 to 7 arguments."""
    if not 0 <= arguments <= 7:
        raise ConfigError(f"{path}: an AML method has 0 to 7 arguments, not {arguments}")
    return _block(b"\x14", name_string(path), bytes([arguments]), *terms)


def arg(index: int) -> bytes:
    """``Arg0`` to ``Arg6``."""
    if not 0 <= index <= 6:
        raise ConfigError(f"there is no Arg{index} in AML: use 0 to 6")
    return bytes([0x68 + index])


def equal(left: Data, right: Data) -> bytes:
    """``(left == right)``."""
    return b"\x93" + _data(left) + _data(right)


def if_(predicate: bytes, *terms: bytes) -> bytes:
    """``If (predicate) {...}``."""
    return _block(b"\xa0", predicate, *terms)


def return_(value: Data) -> bytes:
    """``Return (value)``."""
    return b"\xa4" + _data(value)


def resource_template(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () {...}``; the end tag's checksum of zero stands for none (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def _descriptor(form: str, *fields: int) -> bytes:
    try:
        return struct.pack(form, *fields)
    except struct.error as error:
        raise ConfigError(
            f"a value does not fit its field in an ACPI resource descriptor: {error}"
        ) from error


def io(port: int, count: int) -> bytes:
    """``IO (Decode16, port, port, 1, count)``: ``count`` I/O ports from ``port`` (6.4.2.5)."""
    return _descriptor("<BBHHBB", 0x47, 1, port, port, 1, count)


def irq_no_flags(irq: int) -> bytes:
    """``IRQNoFlags () {irq}``: an ISA interrupt, 0 to 15, edge triggered, active high (6.4.2.1)."""
    if not 0 <= irq <= 15:
        raise ConfigError(f"IRQ {irq} is no ISA interrupt: use 0 to 15, or an interrupt descriptor")
    return _descriptor("<BH", 0x22, 1 << irq)


def memory32_fixed(base: int, length: int, *, writable: bool = True) -> bytes:
    """``Memory32Fixed (ReadWrite, base, length)``, in bytes, below 4 GiB (6.4.3.4)."""
    return _descriptor("<BHBII", 0x86, 9, writable, base, length)


def interrupt(*gsis: int, level: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """``Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsis}``, 1 to 255 GSIs (6.4.3.6)."""
    if not 1 <= len(gsis) <= 255:
        raise ConfigError(f"{len(gsis)} interrupts: a descriptor holds 1 to 255")
    flags = 1 | (not level) << 1 | active_low << 2 | shared << 3
    return _descriptor(f"<BHBB{len(gsis)}I", 0x89, 2 + 4 * len(gsis), flags, len(gsis), *gsis)
