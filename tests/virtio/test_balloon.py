"""The memory balloon: what goes back to the host, and what a guest may not do to it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm._core import ffi
from aiokvm.errors import DeviceError
from aiokvm.virtio.balloon import (
    DEFLATEQ,
    INFLATEQ,
    PAGE_BYTES,
    PAGES_AT_ONCE,
    RELEASE_BYTES,
    REPORTING_VQS,
    STATSQ,
    VIRTIO_BALLOON_F_PAGE_POISON,
    VIRTIO_BALLOON_F_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ,
    Balloon,
)
from tests.virtio.driver import VIRTQ_DESC_F_WRITE, Descriptor, FakeMemory
from tests.virtio.guest import LAYOUTS, RANGE_BYTES, DeviceGuest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RINGS = 5 * RANGE_BYTES
# RAM beyond that of the rings, with a hole before it: page numbers, first and last.
FIRST, LAST = 0x1000, 0x10FF
NUM_PAGES, ACTUAL, FREE_PAGE_HINT_CMD_ID, POISON_VAL = 0, 4, 8, 12


class Rig:
    """A balloon with its drivers, and what it gave back: (first page, how many), in order."""

    def __init__(
        self, features: int = 0, *, size: int = 8, without: int = 0, memory: FakeMemory | None = None
    ) -> None:
        self.memory = memory or FakeMemory(
            *((index * RANGE_BYTES, RANGE_BYTES) for index in range(5)),
            (FIRST * PAGE_BYTES, (LAST + 1 - FIRST) * PAGE_BYTES),
        )
        self.released: list[tuple[int, int]] = []
        self.actual: list[int] = []
        self.stats: list[Mapping[str, int]] = []
        self.balloon = Balloon(
            self.memory,
            self.release,
            on_actual=lambda: self.actual.append(self.balloon.actual),
            on_stats=self.stats.append,
        )
        self.guest = DeviceGuest(self.balloon, features, memory=self.memory, size=size, without=without)
        self.drivers = self.guest.drivers

    def release(self, view: memoryview) -> None:
        address = int(ffi.cast("uintptr_t", ffi.from_buffer("char[]", view)))
        for region in self.memory.regions:
            if 0 <= address - region.host_address < region.size:
                gpa = region.gpa + address - region.host_address
                assert gpa % PAGE_BYTES == 0
                self.released.append((gpa // PAGE_BYTES, -(-len(view) // PAGE_BYTES)))

    def send(self, queue: int, pages: Iterable[int]) -> None:
        self.drivers[queue].add([b"".join(struct.pack("<I", page) for page in pages)])
        self.guest.notify(queue)
        assert [used.written for used in self.drivers[queue].used()] == [0]

    def inflate(self, *pages: int) -> None:
        self.send(INFLATEQ, pages)

    def deflate(self, *pages: int) -> None:
        self.send(DEFLATEQ, pages)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_go_back_to_the_host_neighbours_in_one_call(layout: int) -> None:
    rig = Rig(layout)
    rig.inflate(FIRST + 7, FIRST + 5, FIRST + 9, FIRST + 6)
    assert rig.released == [(FIRST + 5, 3), (FIRST + 9, 1)]
    assert (rig.balloon.pages, rig.balloon.dropped) == (4, 0)
    assert rig.balloon.released_bytes == 4 * PAGE_BYTES
    rig.deflate(FIRST + 6, FIRST + 9)
    assert rig.balloon.pages == 2
    rig.inflate(FIRST + 6)
    assert rig.released[2:] == [(FIRST + 6, 1)]


def test_neighbours_in_two_ranges_of_ram_are_two_calls() -> None:
    rig = Rig()
    border = RANGE_BYTES // PAGE_BYTES
    rig.inflate(0, border - 1, border)
    assert rig.released == [(0, 1), (border - 1, 1), (border, 1)]


def test_pages_outside_ram_and_pages_twice_are_dropped_and_counted() -> None:
    rig = Rig()
    rig.inflate(FIRST, FIRST, FIRST - 1, LAST + 1, 0xFFFF_FFFF, RINGS // PAGE_BYTES, LAST)
    assert rig.released == [(FIRST, 1), (LAST, 1)]
    assert (rig.balloon.pages, rig.balloon.dropped) == (2, 5)
    rig.inflate(FIRST, LAST)
    assert (rig.balloon.pages, rig.balloon.dropped) == (2, 7)
    rig.deflate(FIRST, FIRST, FIRST + 1, LAST + 1)
    assert (rig.balloon.pages, rig.balloon.dropped) == (1, 10)
    assert rig.guest.host.reasons == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from([INFLATEQ, DEFLATEQ]),
            st.lists(st.integers(FIRST - 2, FIRST + 20) | st.integers(0, 0xFFFF_FFFF), max_size=40),
        ),
        max_size=12,
    )
)
def test_the_count_is_that_of_a_set(requests: list[tuple[int, list[int]]]) -> None:
    rig = Rig()
    inside: set[int] = set()
    dropped = 0
    for queue, pages in requests:
        rig.send(queue, pages)
        for page in pages:
            in_ram = page < RINGS // PAGE_BYTES or FIRST <= page <= LAST
            if not in_ram or (page in inside) == (queue == INFLATEQ):
                dropped += 1
            elif queue == INFLATEQ:
                inside.add(page)
            else:
                inside.remove(page)
    assert (rig.balloon.pages, rig.balloon.dropped) == (len(inside), dropped)


def test_a_chain_of_more_pages_than_fit_one_turn_is_carried_on() -> None:
    rig = Rig()
    pages = struct.pack("<I", 0xFFFF_FFFF) * (3 * PAGES_AT_ONCE + 1)
    rig.drivers[INFLATEQ].add([pages[:101], pages[101:]])
    rig.guest.notify(INFLATEQ)
    assert rig.balloon.dropped == PAGES_AT_ONCE
    assert rig.drivers[INFLATEQ].used() == []
    while rig.guest.again():
        pass
    assert rig.balloon.dropped == 3 * PAGES_AT_ONCE + 1
    assert len(rig.drivers[INFLATEQ].used()) == 1


def test_a_chain_of_a_gigabyte_holds_nothing_up() -> None:
    rig = Rig(size=64)
    part = Descriptor(RANGE_BYTES // 2, RANGE_BYTES // 2)
    rig.drivers[INFLATEQ].expose([part] * 64)
    rig.guest.notify(INFLATEQ)
    for _ in range(10):
        before = rig.balloon.dropped + rig.balloon.pages
        assert rig.guest.again()
        assert rig.balloon.dropped + rig.balloon.pages - before == PAGES_AT_ONCE
    rig.guest.reset()
    assert not rig.guest.again() or not rig.guest.again()
    assert rig.balloon.pages == 0


def test_half_a_page_number_is_none() -> None:
    rig = Rig()
    rig.drivers[INFLATEQ].add([b"\x00\x10\x00", b"\x00\x01\x10"])
    rig.guest.notify(INFLATEQ)
    assert rig.released == [(FIRST, 1)]
    rig.drivers[INFLATEQ].add([], [16])
    rig.guest.notify(INFLATEQ)
    assert [used.written for used in rig.drivers[INFLATEQ].used()] == [0, 0]
    assert rig.balloon.dropped == 0


def test_target_and_actual() -> None:
    rig = Rig()
    rig.balloon.num_pages = 0x123
    assert rig.guest.host.config_changes == 1
    assert rig.balloon.read_config(NUM_PAGES, 4) == 0x123
    rig.balloon.write_config(ACTUAL, 4, 0x77)
    assert rig.balloon.read_config(ACTUAL, 4) == 0x77
    assert rig.balloon.actual == 0x77
    assert rig.actual == [0x77]
    for pages in (-1, RINGS // PAGE_BYTES + LAST + 2 - FIRST, 1 << 40):
        with pytest.raises(DeviceError, match="RAM has"):
            rig.balloon.num_pages = pages
    assert rig.balloon.num_pages == 0x123


@pytest.mark.parametrize(
    ("offset", "size"), [(NUM_PAGES, 4), (FREE_PAGE_HINT_CMD_ID, 4), (ACTUAL, 1), (ACTUAL + 2, 2), (16, 4)]
)
def test_the_rest_of_the_configuration_is_read_only(offset: int, size: int) -> None:
    rig = Rig()
    before = bytes(rig.balloon.config)
    rig.balloon.write_config(offset, size, (1 << 8 * size) - 1)
    assert rig.balloon.config == before
    assert rig.actual == []


def stats(*entries: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", *entry) for entry in entries)


def test_statistics_are_asked_for_by_giving_the_buffer_back() -> None:
    rig = Rig()
    driver = rig.drivers[STATSQ]
    assert not rig.balloon.request_stats()
    driver.add([stats((4, 1 << 40), (5, 7))])
    rig.guest.notify(STATSQ)
    assert rig.stats == [{"free": 1 << 40, "total": 7}]
    assert driver.used() == []
    assert rig.balloon.request_stats()
    assert [used.written for used in driver.used()] == [0]
    assert rig.guest.host.interrupts == [STATSQ]
    # Until the guest has answered there is nothing to ask with.
    assert not rig.balloon.request_stats()
    # In any order, and with tags that nobody knows (5.5.6.3).
    driver.add([stats((5, 8), (10, 1), (0xFFFF, 2), (4, 9)) + b"half"])
    rig.guest.notify(STATSQ)
    assert rig.stats[1:] == [{"total": 8, "free": 9}]


def test_a_driver_with_many_statistics_buffers_gets_all_but_the_newest_back() -> None:
    rig = Rig(size=16)
    driver = rig.drivers[STATSQ]
    for value in range(5):
        driver.add([stats((0, value))])
    rig.guest.notify(STATSQ)
    assert rig.stats == [{"swap_in": 4}]
    assert len(driver.used()) == 4


def test_huge_and_empty_statistics_are_taken_in_bounds() -> None:
    rig = Rig()
    rig.drivers[STATSQ].add([stats((1, 5)) * 5000 + stats((1, 6))])
    rig.guest.notify(STATSQ)
    assert rig.stats == [{"swap_out": 5}]
    rig.balloon.request_stats()
    rig.drivers[STATSQ].add([], [10])
    rig.guest.notify(STATSQ)
    assert rig.stats[1:] == [{}]


@pytest.mark.parametrize("queue", REPORTING_VQS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reported_pages_go_back_before_the_report_does(queue: int, layout: int) -> None:
    rig = Rig(layout)
    pages = [Descriptor((FIRST + n) * PAGE_BYTES, 2 * PAGE_BYTES, VIRTQ_DESC_F_WRITE) for n in (4, 8, 0)]
    rig.drivers[queue].expose(pages)
    rig.guest.notify(queue)
    assert sorted(rig.released) == [(FIRST, 2), (FIRST + 4, 2), (FIRST + 8, 2)]
    assert rig.balloon.released_bytes == 6 * PAGE_BYTES
    assert rig.balloon.pages == 0
    assert rig.guest.host.interrupts[-1:] == [queue] or layout


def test_a_report_of_all_memory_many_times_over_gives_the_loop_its_turns() -> None:
    rig = Rig(size=128)
    whole = Descriptor(0, RANGE_BYTES, VIRTQ_DESC_F_WRITE)
    rig.drivers[REPORTING_VQS[1]].expose([whole] * 128)
    rig.guest.notify(REPORTING_VQS[1])
    done = rig.balloon.released_bytes
    assert done == RELEASE_BYTES
    while rig.guest.again():
        assert rig.balloon.released_bytes - done <= RELEASE_BYTES
        done = rig.balloon.released_bytes
    assert done == 128 * RANGE_BYTES


def test_a_report_of_crumbs_gives_the_loop_its_turns() -> None:
    rig = Rig(size=128)
    crumb = Descriptor(0, 1, VIRTQ_DESC_F_WRITE)
    for _ in range(2):
        for _ in range(8):
            rig.drivers[REPORTING_VQS[0]].expose([crumb] * 8)
    rig.guest.notify(REPORTING_VQS[0])
    assert rig.balloon.released_bytes == 128


def test_pages_that_have_to_keep_a_value_stay() -> None:
    rig = Rig()
    page = Descriptor(FIRST * PAGE_BYTES, PAGE_BYTES, VIRTQ_DESC_F_WRITE)
    rig.balloon.write_config(POISON_VAL, 4, 0xAAAA_AAAA)
    rig.drivers[REPORTING_VQS[0]].expose([page])
    rig.guest.notify(REPORTING_VQS[0])
    assert rig.released == []
    assert rig.guest.host.interrupts == [REPORTING_VQS[0]]
    rig.balloon.write_config(POISON_VAL, 4, 0)
    rig.drivers[REPORTING_VQS[0]].expose([page])
    rig.guest.notify(REPORTING_VQS[0])
    assert rig.released == [(FIRST, 1)]


def test_a_poison_value_without_the_feature_means_nothing() -> None:
    rig = Rig(without=VIRTIO_BALLOON_F_PAGE_POISON)
    rig.balloon.write_config(POISON_VAL, 4, 1)
    rig.drivers[REPORTING_VQS[0]].expose([Descriptor(FIRST * PAGE_BYTES, PAGE_BYTES, VIRTQ_DESC_F_WRITE)])
    rig.guest.notify(REPORTING_VQS[0])
    assert rig.released == [(FIRST, 1)]


@pytest.mark.parametrize(
    ("feature", "queue"),
    [(VIRTIO_BALLOON_F_STATS_VQ, STATSQ), *((VIRTIO_BALLOON_F_REPORTING, queue) for queue in REPORTING_VQS)],
)
def test_queues_that_were_not_negotiated_are_not_touched(feature: int, queue: int) -> None:
    rig = Rig(without=feature)
    rig.drivers[queue].add([stats((0, 1))], [4096])
    rig.guest.notify(queue)
    rig.balloon.notified(99)
    assert rig.drivers[queue].used() == []
    assert rig.released == []
    assert not rig.balloon.request_stats()


def test_a_reset_forgets_the_guest_and_keeps_the_target() -> None:
    rig = Rig()
    rig.balloon.num_pages = 5
    rig.inflate(FIRST)
    rig.balloon.write_config(ACTUAL, 4, 1)
    rig.drivers[STATSQ].add([stats((0, 1))])
    rig.guest.notify(STATSQ)
    rig.guest.reset()
    assert (rig.balloon.pages, rig.balloon.actual, rig.balloon.num_pages) == (0, 0, 5)
    assert not rig.balloon.request_stats()
    rig.balloon.num_pages = 6
    assert rig.guest.host.config_changes == 1  # nobody is there to hear it
    rig.guest.start()
    rig.drivers = rig.guest.drivers
    rig.inflate(FIRST)
    assert (rig.balloon.pages, rig.balloon.dropped) == (1, 0)


@pytest.mark.parametrize("queue", [INFLATEQ, STATSQ, REPORTING_VQS[1]])
def test_a_queue_that_is_taken_back_ends_what_is_under_way_in_it(queue: int) -> None:
    rig = Rig(size=128)
    if queue == INFLATEQ:
        rig.drivers[queue].add([bytes(16 * PAGES_AT_ONCE)])
    elif queue == STATSQ:
        rig.drivers[queue].add([stats((0, 1))])
    else:
        rig.drivers[queue].expose([Descriptor(0, RANGE_BYTES, VIRTQ_DESC_F_WRITE)] * 128)
    rig.guest.notify(queue)
    rig.balloon.stop_queue(queue)
    rig.guest.queues[queue].stop()
    before = rig.balloon.dropped, rig.balloon.released_bytes
    while rig.guest.again():
        pass
    assert not rig.balloon.request_stats()
    assert (rig.balloon.dropped, rig.balloon.released_bytes) == before


def test_a_broken_ring_needs_a_reset() -> None:
    rig = Rig()
    for queue in range(5):
        rig.drivers[queue].expose([Descriptor(1 << 40, 8)])
        rig.guest.notify(queue)
    assert len(rig.guest.host.reasons) == 5
