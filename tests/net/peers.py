"""A backend linked to a socket that the test has in its hands, and frames made by hand."""

from __future__ import annotations

import socket
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import anyio

from aiokvm.aio import current_loop
from aiokvm.net import Datagram
from aiokvm.net.plane import Plane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aiokvm.net import NetBackend

T = TypeVar("T")

PATIENCE_S = 60.0
GUEST_MAC = b"\x02\0\0\0\0\x02"
BROADCAST = b"\xff" * 6
ETH_P_IP, ETH_P_ARP, ETH_P_LOCAL = 0x0800, 0x0806, 0x88B5


class Peer:
    """What is on the other side of the link: it sends and receives frames."""

    def __init__(self, plane: Plane, near: Datagram, far: socket.socket) -> None:
        self.plane = plane
        self.near = near
        self.lost: list[str] = []
        self._far = far
        self._changed = anyio.Event()

    def on_lost(self, why: str) -> None:
        self.lost.append(why)
        self._changed.set()

    async def until_lost(self) -> str:
        with anyio.fail_after(PATIENCE_S):
            while not self.lost:
                self._changed = anyio.Event()
                await self._changed.wait()
        return self.lost[0]

    async def send(self, *frames: bytes) -> None:
        with anyio.fail_after(PATIENCE_S):
            for frame in frames:
                while True:
                    try:
                        self._far.send(frame)
                        break
                    except BlockingIOError:
                        await anyio.wait_writable(self._far)

    async def receive(self, wanted: Callable[[bytes], bool] = lambda frame: True) -> bytes:
        """The next frame that is wanted."""
        with anyio.fail_after(PATIENCE_S):
            while True:
                with suppress(BlockingIOError):
                    frame = self._far.recv(1 << 17)
                    if wanted(frame):
                        return frame
                    continue
                await anyio.wait_readable(self._far)

    async def ask(self, frame: bytes, wanted: Callable[[bytes], bool]) -> bytes:
        """Sends it again and again, as a program would, until there is an answer."""
        return await insist(lambda: self.send(frame), lambda: self.receive(wanted))


async def insist(send: Callable[[], Awaitable[object]], receive: Callable[[], Awaitable[T]]) -> T:
    """Sends again and again until something comes: a device that was just made loses frames for a while."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            await send()
            with anyio.move_on_after(1):
                return await receive()


@asynccontextmanager
async def linked(backend: NetBackend, *, thread: str | None = None) -> AsyncIterator[Peer]:
    """The backend, open and linked to a peer."""
    plane = Plane(current_loop(), thread)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    near = Datagram(fd=ours)
    peer = Peer(plane, near, theirs)
    try:
        end = await backend.open(plane, peer.on_lost)
        (await near.open(plane, peer.on_lost)).link(end)
        yield peer
    finally:
        with anyio.CancelScope(shield=True):
            await backend.close()
            await near.close()
        plane.close()
        ours.close()
        theirs.close()


def ethernet(payload: bytes, kind: int = ETH_P_LOCAL, to: bytes = BROADCAST) -> bytes:
    return to + GUEST_MAC + struct.pack("!H", kind) + payload.ljust(46, b"\0")


def is_local(frame: bytes) -> bool:
    return frame[12:14] == struct.pack("!H", ETH_P_LOCAL)


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data + b'x') // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: str, destination: str, protocol: int, payload: bytes, to: bytes = BROADCAST) -> bytes:
    def header(sum_: int) -> bytes:
        addresses = socket.inet_aton(source), socket.inet_aton(destination)
        return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, sum_, *addresses)

    return ethernet(header(checksum(header(0))) + payload, ETH_P_IP, to)


def dhcp_discover(transaction: int) -> bytes:
    head = struct.pack("!BBBBIHH16s", 1, 1, 6, 0, transaction, 0, 0x8000, b"")
    # sname and file are in the 192 bytes.
    head += struct.pack("!16s192sI", GUEST_MAC, b"", 0x63825363)
    payload = head + b"\x35\x01\x01\xff"
    udp = struct.pack("!HHHH", 68, 67, 8 + len(payload), 0)
    return ipv4("0.0.0.0", "255.255.255.255", 17, udp + payload)


def offered(frame: bytes, transaction: int) -> str | None:
    """The address that a DHCPOFFER has for us."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 17 or frame[34:38] != b"\0\x43\0\x44":
        return None
    dhcp = frame[42:]
    if dhcp[4:8] != struct.pack("!I", transaction) or b"\x35\x01\x02" not in dhcp[240:]:
        return None
    return socket.inet_ntoa(dhcp[16:20])


async def dhcp(peer: Peer, transaction: int = 0x12345678) -> str:
    """The address that a DHCP server behind the backend offers."""
    frame = await peer.ask(dhcp_discover(transaction), lambda frame: offered(frame, transaction) is not None)
    address = offered(frame, transaction)
    assert address
    return address
