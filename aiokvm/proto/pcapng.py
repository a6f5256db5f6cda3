"""Packet captures: pcapng, draft-ietf-opsawg-pcapng. The format only; what is written is little-endian.

A file is one section or several, each a section header, descriptions of its interfaces, and packets that name
one of them; statistics of an interface may follow at any place. Times are nanoseconds since 1970.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

LINKTYPE_ETHERNET = 1
MAX_BLOCK_BYTES = 1 << 24

_SHB, _IDB, _ISB, _EPB = 0x0A0D0D0A, 1, 5, 6
_MAGIC = 0x1A2B3C4D
_ANY_LENGTH = (1 << 64) - 1
# Options: sections 4.1 to 4.4.
_SHB_USERAPPL = 4
_IF_NAME, _IF_TSRESOL = 2, 9
_EPB_FLAGS = 2
_ISB_ENDTIME, _ISB_IFRECV, _ISB_IFDROP = 3, 4, 5
_INBOUND, _OUTBOUND = 1, 2
_RESOLUTION_NS = 9  # a negative power of 10
_MAX_OPTION_BYTES = 0xFFFF


@dataclass(frozen=True, slots=True)
class Interface:
    """Where packets were seen; at most ``snaplen`` bytes of each were kept."""

    name: str
    snaplen: int
    link_type: int = LINKTYPE_ETHERNET


@dataclass(frozen=True, slots=True)
class Packet:
    """``data`` is what was kept of ``original_bytes``; ``outbound`` is None if it is not said."""

    interface: int
    time_ns: int
    data: bytes
    original_bytes: int
    outbound: bool | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """How many packets there were up to ``time_ns``, and how many of them are missing here."""

    interface: int
    time_ns: int
    packets: int
    dropped: int


def section_header(application: str) -> bytes:
    """The beginning of a section; ``application`` is who writes it."""
    body = struct.pack("<IHHQ", _MAGIC, 1, 0, _ANY_LENGTH)
    return _block(_SHB, body, [(_SHB_USERAPPL, application.encode())])


def interface_description(interface: Interface) -> bytes:
    """Interfaces have numbers from 0 in the order of their descriptions."""
    body = struct.pack("<HHI", interface.link_type, 0, interface.snaplen)
    name = interface.name.encode(errors="replace")[:_MAX_OPTION_BYTES]
    return _block(_IDB, body, [(_IF_NAME, name), (_IF_TSRESOL, bytes([_RESOLUTION_NS]))])


def packet(item: Packet) -> bytes:
    """An enhanced packet block."""
    body = struct.pack("<IIIII", item.interface, *_halves(item.time_ns), len(item.data), item.original_bytes)
    options = []
    if item.outbound is not None:
        options.append((_EPB_FLAGS, struct.pack("<I", _OUTBOUND if item.outbound else _INBOUND)))
    return _block(_EPB, body + _padded(item.data), options)


def statistics(item: Statistics) -> bytes:
    """An interface statistics block."""
    body = struct.pack("<III", item.interface, *_halves(item.time_ns))
    options = [
        (_ISB_ENDTIME, struct.pack("<II", *_halves(item.time_ns))),
        (_ISB_IFRECV, struct.pack("<Q", item.packets)),
        (_ISB_IFDROP, struct.pack("<Q", item.dropped)),
    ]
    return _block(_ISB, body, options)


def read(data: bytes) -> Iterator[Interface | Packet | Statistics]:
    """What a file of either byte order has, section after section; other blocks are passed over.

    Numbers of interfaces begin anew in each section. Raises TraceError at what is damaged or breaks off.
    """
    at, order = 0, ""
    resolutions: list[int] = []
    while at < len(data):
        kind, order = _section_order(data, at) if data[at : at + 4] == b"\x0a\x0d\x0d\x0a" else (None, order)
        if not order:
            raise TraceError("this is no pcapng file")
        if kind == _SHB:
            resolutions = []
        kind, length = _unpack(f"{order}II", data, at)
        if length % 4 or not 12 <= length <= MAX_BLOCK_BYTES or at + length > len(data):
            raise TraceError(f"the block at byte {at} has {length} bytes, {len(data) - at} are there")
        if _unpack(f"{order}I", data, at + length - 4) != (length,):
            raise TraceError(f"the block at byte {at} has two lengths")
        body = data[at + 8 : at + length - 4]
        if kind == _IDB:
            interface, resolution = _read_interface(order, body)
            resolutions.append(resolution)
            yield interface
        elif kind in (_EPB, _ISB):
            (index,) = _unpack(f"{order}I", body, 0)
            if index >= len(resolutions):
                raise TraceError(f"the block at byte {at} names interface {index} of {len(resolutions)}")
            read_it = _read_packet if kind == _EPB else _read_statistics
            yield read_it(order, body, resolutions[index])
        at += length


def _section_order(data: bytes, at: int) -> tuple[int, str]:
    for order in "<>":
        if _unpack(f"{order}I", data, at + 8) == (_MAGIC,):
            return _SHB, order
    raise TraceError(f"the section at byte {at} has no byte order")


def _read_interface(order: str, body: bytes) -> tuple[Interface, int]:
    link_type, _, snaplen = _unpack(f"{order}HHI", body, 0)
    options = _options(order, body[8:])
    resolution = options.get(_IF_TSRESOL, b"\x06")[:1]
    if not resolution or resolution[0] > _RESOLUTION_NS:
        raise TraceError("an interface has times finer than nanoseconds, or of powers of 2")
    name = options.get(_IF_NAME, b"").decode(errors="replace")
    return Interface(name, snaplen, link_type), 10 ** (_RESOLUTION_NS - resolution[0])


def _read_packet(order: str, body: bytes, resolution: int) -> Packet:
    interface, high, low, kept, original = _unpack(f"{order}IIIII", body, 0)
    end = 20 + (kept + 3) // 4 * 4
    if end > len(body):
        raise TraceError(f"a packet of {kept} bytes is longer than its block")
    outbound = None
    if flags := _options(order, body[end:]).get(_EPB_FLAGS):
        direction = _unpack(f"{order}I", flags, 0)[0] & 3
        outbound = {_INBOUND: False, _OUTBOUND: True}.get(direction)
    return Packet(interface, (high << 32 | low) * resolution, body[20 : 20 + kept], original, outbound)


def _read_statistics(order: str, body: bytes, resolution: int) -> Statistics:
    interface, high, low = _unpack(f"{order}III", body, 0)
    options = _options(order, body[12:])
    packets, dropped = (
        _unpack(f"{order}Q", options.get(code, bytes(8)), 0)[0] for code in (_ISB_IFRECV, _ISB_IFDROP)
    )
    return Statistics(interface, (high << 32 | low) * resolution, packets, dropped)


def _options(order: str, data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        code, length = _unpack(f"{order}HH", data, at)
        if code == 0:
            break
        if at + 4 + length > len(data):
            raise TraceError(f"option {code} is longer than its block")
        found.setdefault(code, data[at + 4 : at + 4 + length])
        at += 4 + (length + 3) // 4 * 4
    return found


def _unpack(layout: str, data: bytes, at: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error:
        raise TraceError("the file breaks off in the middle of a block") from None


def _halves(time_ns: int) -> tuple[int, int]:
    return time_ns >> 32 & 0xFFFF_FFFF, time_ns & 0xFFFF_FFFF


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _block(kind: int, body: bytes, options: list[tuple[int, bytes]]) -> bytes:
    for code, value in options:
        body += struct.pack("<HH", code, len(value)) + _padded(value)
    if options:
        body += bytes(4)
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length
