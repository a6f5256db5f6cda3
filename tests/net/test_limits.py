"""Rate limits of backends."""

from __future__ import annotations

import time
from typing import Any

import anyio
import pytest

from aiokvm import net
from tests.net.packets import ethernet

pytestmark = pytest.mark.anyio
Linked = Any
FRAME = ethernet(0x88B5, bytes(986))  # 1,000 bytes


async def seconds(sender: net.Port, receiver: net.Port, count: int) -> float:
    """How long so many frames take, by the limit's own clock: a loop's may stand still for a millisecond."""
    begun_ns = time.monotonic_ns()
    async with anyio.create_task_group() as group:
        group.start_soon(sender.send, [FRAME] * count)
        for _ in range(count):
            await anext(receiver)
    return (time.monotonic_ns() - begun_ns) / 1e9


@pytest.mark.parametrize("thread", [None, "net-test"])
async def test_a_burst_passes_and_the_rest_at_its_rate(linked: Linked, thread: str | None) -> None:
    limit = net.Limit(operations_per_second=500, burst_operations=100)
    here, guest = net.Port(egress=limit), net.Port()
    async with linked(here, guest, thread=thread):
        # 100 at once, and 50 more that take at least 0.1 s: a limit never lets through too much.
        assert await seconds(guest, here, 150) >= 0.098
    assert guest.stats().throttled >= 1
    assert here.stats().received_frames == 150


async def test_each_direction_has_its_own(linked: Linked) -> None:
    here, guest = net.Port(ingress=net.Limit(bytes_per_second=400_000, burst_bytes=10_000)), net.Port()
    async with linked(here, guest):
        await seconds(guest, here, 1000)
        assert guest.stats().throttled == 0
        # 10 are the burst, one more may overdraw it.
        assert await seconds(here, guest, 50) >= 0.0975
        assert here.stats().throttled >= 1


async def test_two_share_a_limit(linked: Linked) -> None:
    limit = net.Limit(operations_per_second=500, burst_operations=50)
    pairs = [(net.Port(egress=limit), net.Port()) for _ in range(2)]
    async with linked(*pairs[0]), linked(*pairs[1], thread="net-test"):
        begun_ns = time.monotonic_ns()
        async with anyio.create_task_group() as group:
            for here, guest in pairs:
                group.start_soon(seconds, guest, here, 50)
        assert time.monotonic_ns() - begun_ns >= 98_000_000


async def test_closing_does_not_wait_for_a_limit(linked: Linked) -> None:
    here, guest = net.Port(egress=net.Limit(operations_per_second=1, burst_operations=1)), net.Port()
    async with linked(here, guest):
        assert guest.send_nowait([FRAME] * 100) == 100
        await anext(here)
        while not guest.stats().throttled:
            await anyio.lowlevel.checkpoint()
    assert here.stats().received_frames <= 2
