"""What a receiver does not take is done for it: checksums and segmentation, as a program sees them."""

from __future__ import annotations

from typing import Any

import pytest

from aiokvm import net
from aiokvm.net import Frame
from aiokvm.net.port import (
    VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
)
from tests.net.packets import TCP, UDP, ones, tcp, udp

pytestmark = pytest.mark.anyio
Linked = Any
PAYLOAD = bytes(range(251)) * 40


def addresses(frame: bytes) -> bytes:
    return frame[26:34] if frame[12:14] == b"\x08\x00" else frame[22:54]


def transport(frame: bytes) -> int:
    return 34 if frame[12:14] == b"\x08\x00" else 54


def pseudo(frame: bytes, protocol: int) -> int:
    length = len(frame) - transport(frame)
    return ones(addresses(frame) + protocol.to_bytes(2, "big") + length.to_bytes(2, "big"))


def unfinished(frame: bytes, protocol: int) -> bytes:
    """With the sum of the pseudo-header in the place of the checksum."""
    at = transport(frame) + (16 if protocol == TCP else 6)
    return frame[:at] + pseudo(frame, protocol).to_bytes(2, "big") + frame[at + 2 :]


def is_right(frame: bytes, protocol: int) -> bool:
    data = frame[transport(frame) :]
    return ones(pseudo(frame, protocol).to_bytes(2, "big") + data) == 0xFFFF


@pytest.mark.parametrize("thread", [None, "net-test"])
@pytest.mark.parametrize(
    ("frame", "protocol", "gso_type"),
    [
        (tcp("10.0.0.1", 1, "10.0.0.2", 80, PAYLOAD), TCP, VIRTIO_NET_HDR_GSO_TCPV4),
        (tcp("fd01::1", 1, "fd02::2", 80, PAYLOAD), TCP, VIRTIO_NET_HDR_GSO_TCPV6),
        (udp("10.0.0.1", 1, "10.0.0.2", 53, PAYLOAD), UDP, VIRTIO_NET_HDR_GSO_UDP_L4),
        (udp("fd01::1", 1, "fd02::2", 53, PAYLOAD), UDP, VIRTIO_NET_HDR_GSO_UDP_L4),
        (tcp("10.0.0.1", 1, "10.0.0.2", 80, PAYLOAD[:1000]), TCP, VIRTIO_NET_HDR_GSO_NONE),
        (udp("fd01::1", 1, "fd02::2", 53, PAYLOAD[:1000]), UDP, VIRTIO_NET_HDR_GSO_NONE),
    ],
)
async def test_segments_and_checksums(
    linked: Linked, frame: bytes, protocol: int, gso_type: int, thread: str | None
) -> None:
    start = transport(frame)
    header = start + (20 if protocol == TCP else 8)
    given = Frame(
        unfinished(frame, protocol),
        needs_csum=True,
        csum_start=start,
        csum_offset=16 if protocol == TCP else 6,
        gso_type=gso_type,
        gso_size=1000 if gso_type else 0,
    )
    sender, receiver = net.Port(), net.Port()
    async with linked(sender, receiver, thread=thread):
        await sender.send(given)
        payload = b""
        while len(payload) < len(frame) - header:
            got = await anext(receiver)
            assert not got.needs_csum
            assert got.gso_type == VIRTIO_NET_HDR_GSO_NONE
            assert is_right(bytes(got), protocol)
            assert len(got) <= header + 1000
            payload += bytes(got)[header:]
        assert payload == frame[header:]
    assert sender.stats().segmented == bool(gso_type)
    assert sender.stats().sent_frames == 1


async def test_who_takes_it_gets_it_as_it_is(linked: Linked) -> None:
    frame = unfinished(tcp("10.0.0.1", 1, "10.0.0.2", 80, PAYLOAD), TCP)
    given = Frame(
        frame,
        needs_csum=True,
        csum_start=34,
        csum_offset=16,
        gso_type=VIRTIO_NET_HDR_GSO_TCPV4,
        gso_size=1000,
    )
    sender, receiver = net.Port(), net.Port(offload=True)
    async with linked(sender, receiver):
        await sender.send(given)
        got = await anext(receiver)
        assert bytes(got) == frame
        assert (got.needs_csum, got.csum_start, got.csum_offset) == (True, 34, 16)
        assert (got.gso_type, got.gso_size) == (VIRTIO_NET_HDR_GSO_TCPV4, 1000)
    assert sender.stats().segmented == 0
