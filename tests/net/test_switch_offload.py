"""Segmentation offload through ports and switches: who does not take a large frame gets its pieces."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aiokvm.net import Frame, Port, Switch
from aiokvm.net.port import VIRTIO_NET_HDR_GSO_TCPV4

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.anyio
LIMIT_S = 60.0
EVERYBODY, SOURCE = b"\xff" * 6, b"\2\0\0\0\0\1"
ADDRESSES = bytes((10, 0, 0, 1, 10, 0, 0, 2))


def add(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def large(payload: bytes, tag: int | None = None, mss: int = 1000) -> Frame:
    """TCP to all, whose checksum is that of the pseudo header, as RFC 9293, section 3.1, has it."""
    ethernet = EVERYBODY + SOURCE + (b"" if tag is None else struct.pack(">HH", 0x8100, tag)) + b"\x08\x00"
    length = 40 + len(payload)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, length, 7, 0x4000, 64, 6, 0) + ADDRESSES
    ip = ip[:10] + struct.pack(">H", ~add(ip) & 0xFFFF) + ip[12:]
    pseudo = add(ADDRESSES + struct.pack(">HH", 6, length - 20))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 1000, 0, 0x50, 0x18, 500, pseudo, 0)
    return Frame(
        ethernet + ip + tcp + payload,
        needs_csum=True,
        csum_start=len(ethernet) + 20,
        csum_offset=16,
        gso_type=VIRTIO_NET_HDR_GSO_TCPV4,
        gso_size=mss,
    )


def payload_of(frame: bytes, tag: int | None) -> bytes:
    """What a whole segment carries."""
    head = EVERYBODY + SOURCE + (b"" if tag is None else struct.pack(">HH", 0x8100, tag)) + b"\x08\x00"
    assert frame.startswith(head)
    packet = frame[len(head) :]
    assert add(packet[:20]) == 0xFFFF
    assert struct.unpack(">H", packet[2:4]) == (len(packet),)
    assert add(ADDRESSES + struct.pack(">HH", 6, len(packet) - 20) + packet[20:]) == 0xFFFF
    return packet[40:]


# How each port is made, and what the tag of its frames is.
CASES: list[tuple[Mapping[str, Any], int | None, Mapping[str, Any], int | None]] = [
    ({}, None, {}, None),
    ({"vlan": 10}, None, {"vlan": 10}, None),
    ({"vlan": 10}, None, {"trunk": [10]}, 10),
    ({"trunk": [10]}, 10, {"vlan": 10}, None),
    ({"trunk": [10, 20]}, 10, {"trunk": [10]}, 10),
]


@pytest.mark.parametrize(("given", "tag_given", "taken", "tag_taken"), CASES)
async def test_a_large_frame_is_cut_and_tagged(
    given: Mapping[str, Any], tag_given: int | None, taken: Mapping[str, Any], tag_taken: int | None
) -> None:
    payload = bytes(i * 7 & 0xFF for i in range(3500))
    async with Switch() as switch:
        sender, small, whole = Port(), Port(), Port(offload=True)
        await switch.connect(sender, **given)
        for port in (small, whole):
            await switch.connect(port, **taken)
        with anyio.fail_after(LIMIT_S):
            await sender.send(large(payload, tag_given))
            found = [payload_of(bytes(await anext(small)), tag_taken) for _ in range(4)]
            assert [len(piece) for piece in found] == [1000, 1000, 1000, 500]
            assert b"".join(found) == payload
            frame = await anext(whole)
        expected = large(payload, tag_taken)
        assert bytes(frame) == bytes(expected)
        assert (frame.csum_start, frame.csum_offset) == (expected.csum_start, 16)
        assert (frame.gso_type, frame.gso_size) == (VIRTIO_NET_HDR_GSO_TCPV4, 1000)


@pytest.mark.parametrize("mss", [50, 1000])
async def test_pieces_that_have_to_wait_come_once_and_in_order(mss: int) -> None:
    payloads = [bytes((start + i * 7) & 0xFF for i in range(30_000)) for start in range(5)]
    async with Switch() as switch:
        sender, small = Port(), Port(depth=7)
        await switch.connect(sender)
        await switch.connect(small)
        with anyio.fail_after(LIMIT_S):
            await sender.send([large(payload, mss=mss) for payload in payloads])
            for payload in payloads:
                found = b""
                while len(found) < len(payload):
                    found += payload_of(bytes(await anext(small)), None)
                assert found == payload
        assert small.take_nowait() is None
