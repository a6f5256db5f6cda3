"""What is fuzzed in Python: each takes bytes, and lets nothing but its own errors out.

`test_targets.py` runs each on what was found before, on its seeds, and on a bounded number of mutations of
them; `search.py` searches on, guided by coverage.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from aiokvm import AiokvmError, boot
from aiokvm.boot.plan import GuestInfo
from aiokvm.images import vmlinux
from aiokvm.net import asgi
from aiokvm.proto import image, nbd, overlay, pcapng, trace
from tests.fuzz import mmio

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    Call = Callable[..., Any]

HERE = Path(__file__).parent
# Of the loop's thread, for each call of what is fuzzed.
LIMIT_S = 0.05
GUEST = GuestInfo(ram=((0, 64 << 20),), rsdp=0xE0000)


@dataclass(frozen=True)
class Target:
    """``run`` does with bytes what a program would, each call by the `Meter` that it is given.

    ``errors`` may come out of it. ``memory_bytes`` are what it may take beside what it is given.
    """

    run: Callable[[bytes, Call], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[Exception], ...] = (AiokvmError,)
    memory_bytes: int = 4 << 20
    mutations: int = 3000

    def check(self, data: bytes, limit_s: float = LIMIT_S) -> float:
        """The CPU seconds of the longest call.

        Raises what must not come out, and AssertionError if a call took too long.
        """
        meter = Meter()
        with contextlib.suppress(*self.errors):
            self.run(data, meter)
        assert meter.worst_s < limit_s, f"a call took {1e3 * meter.worst_s:.1f} ms of CPU time"
        return meter.worst_s


class Meter:
    """Makes calls, and knows the CPU time of the longest."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        begin = time.thread_time()
        try:
            return function(*args)
        finally:
            self.worst_s = max(self.worst_s, time.thread_time() - begin)


def found(name: str) -> Iterator[bytes]:
    """The inputs that were found before."""
    for path in sorted((HERE / name).glob("*")):
        yield path.read_bytes()


_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, put in or taken out; formats keep most of what matters at their beginning."""
    out = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 4, 8, 32))):
        at = chance.randrange(min(len(out), 4096) if chance.random() < 0.8 else len(out))
        kind, size = chance.randrange(10), chance.randrange(1, 64)
        if kind < 3:
            out[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind < 6:
            width = chance.choice((2, 4, 8))
            number = chance.choice((*_NUMBERS, len(out), chance.getrandbits(64))) & (1 << 8 * width) - 1
            out[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))
        elif kind < 7:
            del out[at : at + size]
        elif kind < 8:
            out[at:at] = bytes(size)
        elif kind < 9:
            out[at:at] = out[at : at + size]
        else:
            del out[at + 1 :]
        out = out or bytearray(1)
    return bytes(out)


# ---- files ----


def _trace(data: bytes, call: Call) -> None:
    decoder = trace.Decoder()
    for at in range(0, len(data), 97):
        call(lambda chunk: list(decoder.feed(chunk)), data[at : at + 97])
    call(decoder.close)


def _trace_seed() -> bytes:
    encoder = trace.Encoder()
    record = trace.Record(5, 0, 2, 0x3F8, 1, 3, True, True, b"abc", "Serial")
    return encoder.header(trace.Header("m", 5)) + 5 * encoder.record(record) + encoder.lost(3)


def _pcapng_seed() -> bytes:
    return b"".join(
        (
            pcapng.section_header("x"),
            pcapng.interface_description(pcapng.Interface("a", 100)),
            pcapng.packet(pcapng.Packet(0, 5, b"x" * 61, 61, True)),
            pcapng.statistics(pcapng.Statistics(0, 7, 1, 0)),
        )
    )


def _qcow2_seed() -> bytes:
    fields = (3, 512, 8, 16, 1 << 20, 0, 1, 0x30000, 0x10000, 1, 0, 0, 0, 0, 0, 4, 104)
    header = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", *fields)
    header += struct.pack(">II5s3x", 0xE2792ACA, 5, b"qcow2")
    return header.ljust(512, b"\0") + b"base.img".ljust(512, b"\0")


def _overlay(data: bytes, call: Call) -> None:
    # A checksum that is right, and nothing behind it: else no change gets past either.
    head, bits = data[:28], data[32:]
    page = head + struct.pack("<I", zlib.crc32(head))
    layout = call(overlay.unpack, page.ljust(overlay.PAGE_BYTES, b"\0"))
    if layout.bitmap_bytes <= 1 << 20:
        bitmap = call(overlay.Bitmap, layout, bits[: layout.bitmap_bytes].ljust(layout.bitmap_bytes, b"\0"))
        call(lambda: next(bitmap.runs(0, layout.clusters), None))
        call(bitmap.next, 0)


def _elf_seed() -> bytes:
    elf = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQI", 2, 62, 1, 0x100000, 64, 0, 0)
    elf += struct.pack("<HHHHHH", 64, 56, 2, 0, 0, 0)
    elf += struct.pack("<2I6Q", 1, 7, 0x200, 0x100000, 0x100000, 0x100, 0x1000, 0x1000)
    elf += struct.pack("<2I6Q", 4, 4, 0x300, 0, 0, 20, 20, 4)
    return elf.ljust(0x300, b"\x90") + struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x100010)


def _bzimage_seed() -> bytes:
    data = bytearray(0x1400)
    data[0x1F1] = 4
    struct.pack_into("<I", data, 0x1F4, 0x40)
    struct.pack_into("<H2s4sH", data, 0x1FE, 0xAA55, b"\xeb\x6a", b"HdrS", 0x20F)
    data[0x211] = 1
    struct.pack_into("<II", data, 0x22C, 0x7FFFFFFF, 0x200000)
    struct.pack_into("<BxHI", data, 0x234, 1, 1, 2047)
    struct.pack_into("<II", data, 0x248, 0x100, 0x100)
    struct.pack_into("<QI", data, 0x258, 0x1000000, 0x10000)
    return bytes(data)


def _linux(data: bytes, call: Call) -> None:
    kernel = boot.Linux("k")
    call(kernel.plan, dict.fromkeys(kernel.files(), data), GUEST)


# ---- peers ----

_REPLY = struct.Struct(">QIII")


def _handshake(data: bytes, call: Call) -> None:
    handshake = nbd.Handshake("x")
    for at in range(0, len(data), 13):
        call(handshake.feed, data[at : at + 13])


def _handshake_seed() -> bytes:
    magic = nbd.NBD_OPT_REPLY_MAGIC
    return b"".join(
        (
            struct.pack(">QQH", nbd.NBDMAGIC, nbd.IHAVEOPT, 3),
            _REPLY.pack(magic, 8, 1, 0),
            _REPLY.pack(magic, 7, 3, 12) + struct.pack(">HQH", 0, 1 << 30, 1),
            _REPLY.pack(magic, 7, 3, 14) + struct.pack(">HIII", 3, 1, 4096, 1 << 25),
            _REPLY.pack(magic, 7, 1, 0),
        )
    )


def _transmission(structured: bool) -> Callable[[bytes, Call], None]:
    """What a server says to one who has asked for 4 KiB, and for a flush; cookies are counted."""

    def run(data: bytes, call: Call) -> None:
        client = nbd.Transmission(structured=structured)
        client.request(nbd.NBD_CMD_READ, 0, 4096)
        client.request(nbd.NBD_CMD_FLUSH)
        for at in range(0, len(data), 1499):
            call(client.feed, data[at : at + 1499])

    return run


def _transmission_seed(structured: bool) -> bytes:
    client = nbd.Transmission(structured=structured)
    (read, _), (flush, _) = client.request(nbd.NBD_CMD_READ, 0, 4096), client.request(nbd.NBD_CMD_FLUSH)
    done = struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, 0, flush)
    if not structured:
        return done + struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, 0, read) + bytes(4096)
    magic = nbd.NBD_STRUCTURED_REPLY_MAGIC
    data = struct.pack(">IHHQIQ", magic, 0, 1, read, 8 + 2048, 0) + bytes(2048)
    return done + data + struct.pack(">IHHQIQI", magic, 1, 2, read, 12, 2048, 2048)


class _Guest:
    """A guest's connection to a service: it has said everything in pieces, and is gone."""

    guest, service = ("10.0.2.15", 40000), ("10.0.2.100", 80)

    def __init__(self, data: bytes) -> None:
        self._chunks = [data[at : at + 61] for at in range(0, len(data), 61)][::-1]
        self.got = b""

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if not self._chunks:
            raise anyio.EndOfStream
        return self._chunks.pop()

    def has_ended(self) -> bool:
        return not self._chunks

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        self.got += item

    def abort(self) -> None:
        self._chunks.clear()


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(b"x-path", scope["raw_path"]), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    await receive()


def answered(data: bytes, call: Call) -> bytes:
    """What a service says to a guest that has said this."""
    connection: Any = _Guest(data)
    logger = logging.getLogger("aiokvm.net")
    level = logger.level
    # That a guest has gone in the middle of it is told, and often.
    logger.setLevel(logging.CRITICAL)
    try:
        call(anyio.run, asgi.Asgi(_echo, lifespan=False), connection)
    finally:
        logger.setLevel(level)
    got: bytes = connection.got
    return got


ASGI_SEEDS = (
    b"GET /%41?q=1 HTTP/1.1\r\nhost: a\r\n\r\nPOST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc",
    b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n"
    b"3\r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nx:" + b" " * 200 + b"\r\n\r\n"
    b"1;" + b" " * 200 + b"\r\na\r\n0\r\nx:" + b" " * 200 + b"\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\nxx",
    b"HEAD * HTTP/1.0\r\nconnection: keep-alive\r\nupgrade: websocket\r\n\r\n",
)

TARGETS = {
    "trace": Target(_trace, (_trace_seed(),)),
    "pcapng": Target(lambda data, call: call(lambda: list(pcapng.read(data))), (_pcapng_seed(),)),
    "qcow2": Target(lambda data, call: call(image.inspect, data), (_qcow2_seed(),)),
    "overlay": Target(_overlay, (overlay.Layout(1 << 30, 65536).pack()[:32] + b"\1\0\xff",)),
    "elf": Target(_linux, (_elf_seed(),)),
    "bzimage": Target(_linux, (_bzimage_seed(),)),
    "vmlinux": Target(lambda data, call: call(vmlinux.payload, data), (_bzimage_seed(),)),
    "nbd_handshake": Target(_handshake, (_handshake_seed(),)),
    "nbd_simple": Target(_transmission(False), (_transmission_seed(False),)),
    "nbd_structured": Target(_transmission(True), (_transmission_seed(True),)),
    "asgi": Target(answered, ASGI_SEEDS, (), mutations=300),
    **{
        f"mmio_{name}": Target(run, mmio.SEEDS, (), memory_bytes=8 << 20, mutations=300)
        for name, run in mmio.RUNS.items()
    },
}
