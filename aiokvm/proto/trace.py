"""The trace of a machine's exits: a file that is written as they come, and read back as records.

All numbers are little-endian. A file is a header and then records, each beginning with its kind:

    header   "AIOKVMTR", u16 version, u16 length of the name, u64 start (ns since 1970), the name in UTF-8
    device   u8 1, u8 0, u16 length of the name, u32 index, the name in UTF-8
    exit     u8 2, u8 flags, u8 size, u8 errno, u16 reason, u16 vCPU, u32 device, u32 count,
             u64 time (ns since the start), u64 address, and of a write size * count bytes
    lost     u8 3, u8 0, u16 0, u32 how many exits are missing here

A device is told before the first exit that names it, and indices go up by one from 0. Of the flags, bit 0 is
a write and bit 1 says that the address is a port. A posted write has the reason 0xffff and, since the machine
keeps one queue for all of them, no vCPU: 0xffff stands there. Exits to no device have the device 0xffffffff.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from aiokvm.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"AIOKVMTR"
VERSION = 1
# In the place of KVM's exit_reason.
POSTED = 0xFFFF
# More than a string instruction, or all that may be posted, hands over at once.
MAX_DATA_BYTES = 1 << 16
NAME_MAX_BYTES = 1024

_HEADER = struct.Struct("<8sHHQ")
_DEVICE = struct.Struct("<BBHI")
_EXIT = struct.Struct("<BBBBHHIIQQ")
_LOST = struct.Struct("<BBHI")
_DEVICE_KIND, _EXIT_KIND, _LOST_KIND = 1, 2, 3
_STRUCTS = {_DEVICE_KIND: _DEVICE, _EXIT_KIND: _EXIT, _LOST_KIND: _LOST}
_WRITE, _PORT = 1, 2
_NO_VCPU = 0xFFFF
_NO_DEVICE = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Header:
    """Which machine, and when the trace was begun: ``start_ns`` since 1970."""

    machine: str
    start_ns: int


class Record(NamedTuple):
    """One exit, or a run of ``accesses`` of ``size`` bytes each to one ``address``.

    ``time_ns`` is since the trace's start, when the loop got it. ``vcpu`` is None for posted writes, which
    have the reason `POSTED`; other reasons are KVM's exit_reason. ``data`` is what was written, empty for a
    read. ``device`` is empty where nothing is. An exit that is no access has ``size`` and ``accesses`` 0, and
    ``error`` is the errno of a KVM_RUN that failed.
    """

    time_ns: int
    vcpu: int | None
    reason: int
    address: int = 0
    size: int = 0
    accesses: int = 0
    is_write: bool = False
    is_port: bool = False
    data: bytes = b""
    device: str = ""
    error: int = 0

    @property
    def values(self) -> tuple[int, ...]:
        """What was written, one access after the other."""
        size, data = self.size or 1, self.data
        return tuple(int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size))


@dataclass(frozen=True, slots=True)
class Lost:
    """So many exits are missing: they came faster than the trace could be written."""

    count: int


class Encoder:
    """Turns records into the bytes of one file; `header` comes first."""

    def __init__(self) -> None:
        self._devices: dict[str, int] = {"": _NO_DEVICE}

    def header(self, header: Header) -> bytes:
        """The beginning of the file."""
        name = _name(header.machine)
        return _HEADER.pack(MAGIC, VERSION, len(name), header.start_ns) + name

    def record(self, record: Record) -> bytes:
        """One exit, after the name of its device if that is new."""
        time_ns, vcpu, reason, address, size, accesses, is_write, is_port, data, device, error = record
        index = self._devices.get(device)
        before = b""
        if index is None:
            index = self._devices[device] = len(self._devices) - 1
            name = _name(device)
            before = _DEVICE.pack(_DEVICE_KIND, 0, len(name), index) + name
        flags = (_WRITE if is_write else 0) | (_PORT if is_port else 0)
        cpu = _NO_VCPU if vcpu is None else vcpu
        fields = _EXIT.pack(_EXIT_KIND, flags, size, error, reason, cpu, index, accesses, time_ns, address)
        return before + fields + data

    def lost(self, count: int) -> bytes:
        """So many exits are missing here."""
        return _LOST.pack(_LOST_KIND, 0, 0, min(count, 0xFFFF_FFFF))


class Decoder:
    """Turns the bytes of a file, in pieces of any size, into records.

    ``header`` is None until it has come. TraceError for what is no trace, is damaged, or is of a version that
    this code does not know; a decoder that has raised is of no more use.
    """

    def __init__(self) -> None:
        self.header: Header | None = None
        self._pending = bytearray()
        self._offset = 0
        self._devices: list[str] = []

    def feed(self, data: bytes) -> Iterator[Record | Lost]:
        """The records that are complete with this; they are decoded as they are taken."""
        pending = self._pending
        pending += data
        at = 0
        try:
            if self.header is None:
                at = self._take_header(pending)
            while self.header is not None:
                end, record = self._take(pending, at)
                if end == at:
                    break
                at = end
                if record is not None:
                    yield record
        finally:
            self._offset += at
            del pending[:at]

    def close(self) -> None:
        """The file has ended. TraceError if it broke off in the middle; what was decoded before is right."""
        if self.header is None:
            raise TraceError("this is no trace: it ends before its header does")
        if self._pending:
            raise TraceError(
                f"the trace breaks off in the middle of a record, at byte {self._offset}: "
                "whoever wrote it was stopped, or the disk was full"
            )

    def _take_header(self, data: bytearray) -> int:
        if not MAGIC.startswith(data[: len(MAGIC)]):
            raise TraceError("this is no trace: aiokvm run --trace FILE writes one")
        if len(data) < _HEADER.size:
            return 0
        _, version, length, start_ns = _HEADER.unpack_from(data)
        if version != VERSION:
            raise TraceError(
                f"the trace has version {version}, only {VERSION} can be read: use the aiokvm that wrote it"
            )
        end: int = _HEADER.size + length
        if length > NAME_MAX_BYTES:
            raise self._damaged(0, f"a name of {length} bytes")
        if len(data) < end:
            return 0
        self.header = Header(self._text(data, 0, _HEADER.size, end), start_ns)
        return end

    def _take(self, data: bytearray, at: int) -> tuple[int, Record | Lost | None]:
        """One record and where it ends; where it begins if it is not complete."""
        if at == len(data):
            return at, None
        kind = data[at]
        if kind not in _STRUCTS:
            raise self._damaged(at, f"records of kind {kind} do not exist")
        end: int = at + _STRUCTS[kind].size
        if len(data) < end:
            return at, None
        if kind == _EXIT_KIND:
            return self._take_exit(data, at, end)
        _, flags, length, number = _STRUCTS[kind].unpack_from(data, at)
        if flags or (kind == _LOST_KIND and length):
            raise self._damaged(at, "what has to be 0 is not")
        if kind == _LOST_KIND:
            return end, Lost(number)
        if length > NAME_MAX_BYTES or number != len(self._devices):
            raise self._damaged(at, f"device {number} with a name of {length} bytes")
        if len(data) < end + length:
            return at, None
        self._devices.append(self._text(data, at, end, end + length))
        return end + length, None

    def _take_exit(self, data: bytearray, at: int, end: int) -> tuple[int, Record | None]:
        _, flags, size, error, reason, vcpu, device, count, time_ns, address = _EXIT.unpack_from(data, at)
        if flags & ~(_WRITE | _PORT):
            raise self._damaged(at, f"flags {flags:#x}")
        if size * count > MAX_DATA_BYTES:
            raise self._damaged(at, f"an exit with {count} accesses of {size} bytes")
        if device != _NO_DEVICE and device >= len(self._devices):
            raise self._damaged(at, f"device {device} has not been told")
        is_write = bool(flags & _WRITE)
        length = size * count if is_write else 0
        if len(data) < end + length:
            return at, None
        return end + length, Record(
            time_ns,
            None if vcpu == _NO_VCPU else vcpu,
            reason,
            address,
            size,
            count,
            is_write,
            bool(flags & _PORT),
            bytes(data[end : end + length]),
            "" if device == _NO_DEVICE else self._devices[device],
            error,
        )

    def _text(self, data: bytearray, at: int, start: int, end: int) -> str:
        try:
            text = data[start:end].decode()
        except UnicodeDecodeError:
            text = "\0"
        # Names go to terminals.
        if not text.isprintable():
            raise self._damaged(at, "a name that is not printable")
        return text

    def _damaged(self, at: int, what: str) -> TraceError:
        return TraceError(f"the trace is damaged at byte {self._offset + at}: {what}")


def _name(text: str) -> bytes:
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown.encode(errors="replace")[:NAME_MAX_BYTES].decode(errors="ignore").encode()
