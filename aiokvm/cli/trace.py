"""``aiokvm trace``: what a machine did, as ``aiokvm run --trace`` has recorded it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

import click

from aiokvm import AiokvmError
from aiokvm.cli import common
from aiokvm.kvm import KvmExit
from aiokvm.proto.trace import POSTED, Decoder, Header, Lost, Record
from aiokvm.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CHUNK_BYTES = 1 << 20
# What is shown of a long write on a line.
_SHOWN_BYTES = 16
_PREFIX = "KVM_EXIT_"
# What the trace calls what is not KVM's.
_POSTED = "POSTED"
_NOTHING = "-"


def reason_name(reason: int) -> str:
    """Return the name of an exit_reason as KVM spells it, without what all begin with."""
    if reason == POSTED:
        return _POSTED
    try:
        return KvmExit(reason).name.removeprefix(_PREFIX)
    except ValueError:
        return str(reason)


def address_range(text: str) -> range:
    """Return the addresses of ``A`` or ``A-B``, B included: a parameter type."""
    match = re.fullmatch(r"(0x[0-9a-f]+|\d+)(?:-(0x[0-9a-f]+|\d+))?", text, re.IGNORECASE | re.ASCII)
    if match:
        ends = match[1], match[2] or match[1]
        first, last = (int(end, 16 if "x" in end.lower() else 10) for end in ends)
        if first <= last < 1 << 64:
            return range(first, last + 1)
    raise click.BadParameter(f"{text!r} is no address and no range such as 0x3f8-0x3ff")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which records are wanted; what is None or empty asks for nothing."""

    devices: tuple[str, ...] = ()
    vcpu: int | None = None
    reasons: tuple[str, ...] = ()
    port: range | None = None
    address: range | None = None

    def __call__(self, record: Record) -> bool:
        """Whether the record is wanted."""
        if self.devices and (record.device or _NOTHING) not in self.devices:
            return False
        if self.vcpu is not None and record.vcpu != self.vcpu:
            return False
        if self.reasons and reason_name(record.reason) not in self.reasons:
            return False
        if self.port is None and self.address is None:
            return True
        wanted = self.port if record.is_port else self.address
        return bool(record.size) and wanted is not None and record.address in wanted


@dataclass
class Total:
    """What there was of one device at one address."""

    reads: int = 0
    writes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    def add(self, record: Record) -> None:
        """Count it."""
        if record.is_write:
            self.writes += record.accesses
            self.written_bytes += len(record.data)
        else:
            self.reads += record.accesses
            self.read_bytes += record.size * record.accesses


class Summary:
    """Records by device and address; exits that are no accesses by their reason."""

    def __init__(self) -> None:
        self.exits = 0
        self.lost = 0
        self.end_ns = 0
        self.totals: dict[tuple[str, bool, int], Total] = {}
        self.others: dict[str, int] = {}

    def add(self, record: Record) -> None:
        """Count it."""
        self.exits += 1
        self.end_ns = max(self.end_ns, record.time_ns)
        if record.size:
            key = record.device, record.is_port, record.address
            self.totals.setdefault(key, Total()).add(record)
        else:
            name = reason_name(record.reason)
            self.others[name] = self.others.get(name, 0) + 1

    def rows(self) -> list[tuple[str, bool, int, Total]]:
        """Return device, whether it is a port, address and figures; those with most accesses first."""
        rows = [(*key, total) for key, total in self.totals.items()]
        return sorted(rows, key=lambda row: (-row[3].reads - row[3].writes, row[:3]))


@click.command
@click.argument("file", metavar="FILE", type=click.File("rb"))
@click.option("--device", "devices", metavar="NAME", multiple=True, help="Of this device; - for none.")
@click.option("--vcpu", metavar="N", type=click.IntRange(min=0), help="Of this vCPU.")
@click.option("--reason", "reasons", metavar="R", multiple=True, help="IO, MMIO, POSTED or another.")
@click.option("--port", metavar="A[-B]", type=address_range, help="Of this port, or those from A to B.")
@click.option("--address", metavar="A[-B]", type=address_range, help="The same for memory.")
@click.option("--summary", is_flag=True, help="Sum up by device and address.")
@click.option("--json", "as_json", is_flag=True, help="Print an object a line, or one of the summary.")
@click.pass_context
def trace(
    ctx: click.Context,
    file: IO[bytes],
    devices: tuple[str, ...],
    vcpu: int | None,
    reasons: tuple[str, ...],
    port: range | None,
    address: range | None,
    summary: bool,
    as_json: bool,
) -> None:
    """Show what a machine did.

    FILE is what aiokvm run --trace has written, - for standard input. A line is the time in seconds since
    the trace's start, when the loop got the exit; the vCPU, which posted writes have none of; the reason;
    what was accessed, with how many bytes; the device, - if nothing is there; and what was written. Options
    that filter may be combined; --device and --reason may be repeated.
    """
    wanted = Filter(
        devices=devices,
        vcpu=vcpu,
        reasons=tuple(reason.upper().removeprefix(_PREFIX) for reason in reasons),
        port=port,
        address=address,
    )
    try:
        if summary:
            _show_summary(file, wanted, as_json)
        else:
            _show_all(file, wanted, as_json)
    except BrokenPipeError:
        raise
    except (AiokvmError, OSError) as error:
        common.say(common.describe(error))
        ctx.exit(common.STATUS_FAILED)


def _read(file: IO[bytes], on_header: Callable[[Header], object]) -> Iterator[Record | Lost]:
    """Yield the records; TraceError after the last good one."""
    decoder = Decoder()
    told = False
    while data := file.read(_CHUNK_BYTES):
        for item in decoder.feed(data):
            if not told and decoder.header:
                told = True
                on_header(decoder.header)
            yield item
    if not told and decoder.header:
        on_header(decoder.header)
    decoder.close()


def _show_all(file: IO[bytes], wanted: Filter, as_json: bool) -> None:
    def header(header: Header) -> None:
        if as_json:
            click.echo(json.dumps({"machine": header.machine, "start_ns": header.start_ns}))
        else:
            click.echo(f"{printable(header.machine)}, {_date(header.start_ns)}")

    for item in _read(file, header):
        if isinstance(item, Lost):
            click.echo(
                json.dumps({"lost": item.count}) if as_json else f"{item.count} exits are missing here"
            )
        elif wanted(item):
            click.echo(json.dumps(_fields(item)) if as_json else _line(item))


def _date(start_ns: int) -> str:
    try:
        return datetime.fromtimestamp(start_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError):
        return f"{start_ns} ns"


def _fields(record: Record) -> dict[str, Any]:
    return {
        "time_ns": record.time_ns,
        "vcpu": record.vcpu,
        "reason": reason_name(record.reason),
        "bus": ("pio" if record.is_port else "mmio") if record.size else None,
        "address": record.address if record.size else None,
        "size": record.size,
        "count": record.accesses,
        "is_write": record.is_write,
        "values": list(record.values),
        "device": record.device or None,
        "error": record.error,
    }


def _line(record: Record) -> str:
    vcpu = _NOTHING if record.vcpu is None else str(record.vcpu)
    start = f"{record.time_ns / 1e9:13.6f} {vcpu:>4} {reason_name(record.reason):8}"
    if not record.size:
        return f"{start} {os.strerror(record.error) if record.error else ''}".rstrip()
    where = f"{'port' if record.is_port else 'addr'} {record.address:#x}"
    times = "" if record.accesses == 1 else f"x{record.accesses}"
    values = ""
    if record.is_write:
        shown = record.values[: _SHOWN_BYTES // record.size]
        values = " ".join(f"{value:0{2 * record.size}x}" for value in shown)
        values += " ..." if len(shown) < record.accesses else ""
    what = f"{'write' if record.is_write else 'read':5} {record.size}{times:6}"
    return f"{start} {where:18} {what} {printable(record.device) or _NOTHING:16} {values}".rstrip()


def _show_summary(file: IO[bytes], wanted: Filter, as_json: bool) -> None:
    summary = Summary()
    headers: list[Header] = []
    try:
        for item in _read(file, headers.append):
            if isinstance(item, Lost):
                summary.lost += item.count
            elif wanted(item):
                summary.add(item)
    finally:
        # What there is of a trace that breaks off is shown before the error is.
        if headers:
            show = _print_json if as_json else _print_table
            show(headers[0], summary)


def _print_json(header: Header, summary: Summary) -> None:
    rows = [
        {
            "device": device or None,
            "bus": "pio" if is_port else "mmio",
            "address": address,
            "reads": total.reads,
            "writes": total.writes,
            "read_bytes": total.read_bytes,
            "written_bytes": total.written_bytes,
        }
        for device, is_port, address, total in summary.rows()
    ]
    report = {
        "machine": header.machine,
        "start_ns": header.start_ns,
        "end_ns": summary.end_ns,
        "exits": summary.exits,
        "lost": summary.lost,
        "accesses": rows,
        "others": summary.others,
    }
    click.echo(json.dumps(report, indent=1))


def _print_table(header: Header, summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    start = f"{printable(header.machine)}, {_date(header.start_ns)}"
    click.echo(
        f"{start}: {summary.exits} exits in {summary.end_ns / 1e9:.6f} s"
        + (f", {summary.lost} missing" if summary.lost else "")
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("DEVICE", "AT"):
        table.add_column(name, no_wrap=True)
    for name in ("READS", "BYTES", "WRITES", "BYTES"):
        table.add_column(name, justify="right", no_wrap=True)
    for device, is_port, address, total in summary.rows():
        table.add_row(
            Text(printable(device) or _NOTHING),
            f"{'port' if is_port else 'addr'} {address:#x}",
            *map(str, (total.reads, total.read_bytes, total.writes, total.written_bytes)),
        )
    for reason, count in sorted(summary.others.items()):
        table.add_row(Text(reason), "", "", "", f"{count}", "")
    Console().print(table)
