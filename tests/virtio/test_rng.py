"""The entropy device: bounded, limited, and never without at least a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import ConfigError
from aiokvm.virtio.rng import REQUEST_BYTES, SERVE_BYTES, WORTH_BYTES, Rng
from tests.virtio.driver import VIRTQ_DESC_F_WRITE, Descriptor
from tests.virtio.guest import LAYOUTS, RANGE_BYTES, DeviceGuest

if TYPE_CHECKING:
    from tests.virtio.driver import Used


CYCLE = bytes(range(256))


class Source:
    """Counts up instead of being random."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, count: int) -> bytes:
        self.asked.append(count)
        start = len(self.asked) & 0xFF
        return (CYCLE * (count // 256 + 2))[start : start + count]


def used(guest: DeviceGuest) -> list[Used]:
    return list(guest.drivers[0].used())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_buffer_is_filled_whatever_its_pieces(layout: int) -> None:
    source = Source()
    guest = DeviceGuest(Rng(source), layout)
    for _ in range(3):
        guest.drivers[0].want_interrupt(True)
        guest.drivers[0].add([], [1, 30, 33])
        guest.notify(0)
        [done] = used(guest)
        assert done.written == 64
        assert done.data == bytes((len(source.asked) + i) & 0xFF for i in range(64))
    assert source.asked == [64] * 3
    assert guest.host.interrupts == [0] * 3


def test_what_was_asked_for_before_the_device_was_ready_is_served() -> None:
    guest = DeviceGuest(Rng(Source()), start=False)
    guest.start()
    assert used(guest) == []
    guest.reset()
    guest.start()
    guest.drivers[0].add([], [8])
    guest.notify(0)
    assert [done.written for done in used(guest)] == [8]


def test_a_source_may_give_less_than_asked_for() -> None:
    guest = DeviceGuest(Rng(lambda count: b"x" * (count // 2 + 1)))
    guest.drivers[0].add([], [100])
    guest.notify(0)
    assert [done.written for done in used(guest)] == [51]


def test_a_request_of_4_gib_gets_64_kib() -> None:
    source = Source()
    guest = DeviceGuest(Rng(source), size=64)
    buffer = Descriptor(RANGE_BYTES // 2, RANGE_BYTES // 4, VIRTQ_DESC_F_WRITE)
    guest.drivers[0].expose([buffer] * 64)
    guest.notify(0)
    assert source.asked == [REQUEST_BYTES]


def test_nothing_to_write_to_comes_back_empty() -> None:
    source = Source()
    guest = DeviceGuest(Rng(source))
    guest.drivers[0].add([b"readable"], [])
    guest.notify(0)
    assert [done.written for done in used(guest)] == [0]
    assert source.asked == []


def test_a_full_queue_of_large_requests_gives_the_loop_its_turns() -> None:
    source = Source()
    guest = DeviceGuest(Rng(source), size=64)
    buffer = Descriptor(RANGE_BYTES // 2, RANGE_BYTES // 4, VIRTQ_DESC_F_WRITE)
    for _ in range(16):
        guest.drivers[0].expose([buffer])
    guest.notify(0)
    assert sum(source.asked) == SERVE_BYTES
    turns = 0
    while guest.again():
        turns += 1
    assert sum(source.asked) == 16 * REQUEST_BYTES
    assert turns <= 16 * REQUEST_BYTES // SERVE_BYTES


def test_a_limit_holds_and_a_pause_earns_no_more_than_a_burst() -> None:
    guest = DeviceGuest(Rng(Source(), bytes_per_second=1000, burst_bytes=100))
    rng = guest.device
    assert isinstance(rng, Rng)

    def drink() -> None:
        while guest.drivers[0].free:
            guest.drivers[0].add([], [1000])
        guest.notify(0)
        used(guest)

    drink()
    assert rng.served_bytes == 100
    for _ in range(1000):
        guest.host.advance(10_000_000)
        drink()
    assert 100 + 10_000 - WORTH_BYTES <= rng.served_bytes <= 100 + 10_000
    served = rng.served_bytes
    guest.host.timers.clear()
    rng.reset()
    guest.host.advance(3_600_000_000_000)
    drink()
    assert rng.served_bytes <= served + 100


def test_a_limited_request_waits_for_its_timer_not_for_a_notification() -> None:
    guest = DeviceGuest(Rng(Source(), bytes_per_second=64, burst_bytes=64))
    for _ in range(2):
        guest.drivers[0].add([], [64])
    guest.notify(0)
    assert [done.written for done in used(guest)] == [64]
    guest.device.notified(0)
    assert used(guest) == []
    assert len(guest.host.timers) == 1
    guest.host.advance(1_100_000_000)
    assert [done.written for done in used(guest)] == [64]


def test_a_reset_ends_the_wait() -> None:
    guest = DeviceGuest(Rng(Source(), bytes_per_second=1, burst_bytes=64))
    for _ in range(2):
        guest.drivers[0].add([], [64])
    guest.notify(0)
    [timer] = guest.host.timers
    guest.reset()
    assert timer.cancelled
    guest.device.notified(0)
    guest.start()
    guest.drivers[0].add([], [64])
    guest.notify(0)
    assert used(guest) == []  # a reset gives no new credit


def test_a_broken_ring_needs_a_reset_and_is_told() -> None:
    guest = DeviceGuest(Rng(Source()))
    guest.drivers[0].expose([Descriptor(1 << 40, 8, VIRTQ_DESC_F_WRITE)])
    guest.notify(0)
    assert len(guest.host.reasons) == 1


def test_notifications_of_what_is_not_there_are_ignored() -> None:
    guest = DeviceGuest(Rng(Source()), missing=(0,))
    guest.device.notified(0)
    guest.device.notified(1)
    guest.reset()
    guest.device.notified(0)
    assert guest.host.reasons == []


@pytest.mark.parametrize(
    "limit", [{"bytes_per_second": 0}, {"bytes_per_second": -1}, {"burst_bytes": WORTH_BYTES - 1}]
)
def test_a_limit_that_gives_nothing_is_refused(limit: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        Rng(Source(), **limit)
