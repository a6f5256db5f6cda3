"""Frames with IP in them, and a way to see which of them pass."""

from __future__ import annotations

import ipaddress
import struct
from typing import TYPE_CHECKING

from aiokvm import net

if TYPE_CHECKING:
    from collections.abc import Iterable

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
GUEST_MAC, HOST_MAC, LAST_MAC = (bytes.fromhex(f"02000000000{digit}") for digit in "12e")
# The end of what is sent: it passes everything that begins with `pass_last`.
LAST = HOST_MAC + LAST_MAC + bytes.fromhex("88b5") + bytes(46)
pass_last = net.allow(src_mac="02:00:00:00:00:0e", replies=False)


def ethernet(ethertype: int, payload: bytes) -> bytes:
    return HOST_MAC + GUEST_MAC + ethertype.to_bytes(2, "big") + payload.ljust(46, b"\0")


def ip(protocol: int, src: str, dst: str, payload: bytes) -> bytes:
    source, destination = ipaddress.ip_address(src).packed, ipaddress.ip_address(dst).packed
    if len(source) == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0)
        checksum = ones(header + source + destination)
        header = header[:10] + (checksum ^ 0xFFFF).to_bytes(2, "big")
        return ethernet(0x0800, header + source + destination + payload)
    header = struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64)
    return ethernet(0x86DD, header + source + destination + payload)


def udp(src: str, src_port: int, dst: str, dst_port: int, payload: bytes = b"hello") -> bytes:
    return ip(UDP, src, dst, struct.pack(">HHHH", src_port, dst_port, 8 + len(payload), 0) + payload)


def tcp(src: str, src_port: int, dst: str, dst_port: int, payload: bytes = b"") -> bytes:
    header = struct.pack(">HHIIBBHHH", src_port, dst_port, 1, 0, 5 << 4, 2, 1000, 0, 0)
    return ip(TCP, src, dst, header + payload)


def icmp(src: str, dst: str, kind: int, payload: bytes = bytes(4)) -> bytes:
    protocol = ICMP6 if ":" in src else ICMP
    return ip(protocol, src, dst, bytes([kind, 0, 0, 0]) + payload)


def ones(data: bytes) -> int:
    """RFC 1071, not inverted."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


async def passing(sender: net.Port, receiver: net.Port, frames: Iterable[bytes]) -> list[bytes]:
    """Those that get through."""
    await sender.send([*frames, LAST])
    got: list[bytes] = []
    async for frame in receiver:
        if bytes(frame) == LAST:
            break
        got.append(bytes(frame))
    return got
