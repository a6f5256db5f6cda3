"""Virtqueues against drivers that do what they must not: the queue breaks, and nothing else does."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiokvm.errors import VirtqueueError
from aiokvm.virtio.queue import Chain, Virtqueue
from tests.virtio.driver import (
    DESC_SIZE,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_USED,
    VIRTQ_DESC_F_WRITE,
    Descriptor,
    FakeDriver,
    FakeMemory,
    PackedDriver,
    SplitDriver,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Driver = Callable[..., FakeDriver]

LAYOUTS = pytest.mark.parametrize("layout", [SplitDriver, PackedDriver])
# Two ranges that touch in the host's mind only, and a hole before the third.
RAM = ((0, 0x10000), (0x10000, 0x10000), (0x40000, 0x10000))
SIZE = 8
TABLE = (
    0x8000  # free for indirect tables: the rings begin at 0x1000, and buffers at most some KiB behind them
)
WRITE, NEXT, INDIRECT = VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_INDIRECT


def pair(layout: Driver, features: int = VIRTIO_F_INDIRECT_DESC) -> tuple[FakeDriver, Virtqueue]:
    memory = FakeMemory(*RAM)
    driver, queue = layout(memory, SIZE, features), Virtqueue(memory, 2 * SIZE)
    driver.start(queue)
    return driver, queue


def split(features: int = VIRTIO_F_INDIRECT_DESC) -> tuple[SplitDriver, Virtqueue]:
    driver, queue = pair(SplitDriver, features)
    assert isinstance(driver, SplitDriver)
    return driver, queue


def check_broken(queue: Virtqueue, words: str) -> None:
    """The queue is broken, says why, stays so, and can be started again."""
    for _ in range(2):
        with pytest.raises(VirtqueueError, match=words):
            queue.pop()
        assert words in queue.broken
    queue.stop()
    assert queue.broken == ""
    assert queue.pop() is None


# ---- indices ----


@pytest.mark.parametrize("idx", [SIZE + 1, 0x7FFF, 0x8000, 0xFFFF])
def test_an_available_index_further_ahead_than_the_queue_is_long(idx: int) -> None:
    driver, queue = split()
    driver.set_avail_idx(idx)
    check_broken(queue, "more is available than the queue is long")


def test_an_available_index_that_goes_back() -> None:
    driver, queue = split()
    driver.add([b"x"])
    driver.add([b"x"])
    assert queue.pop()
    assert queue.pop()
    driver.set_avail_idx(1)
    check_broken(queue, "more is available than the queue is long")


def test_an_index_that_breaks_the_queue_while_notifications_are_enabled() -> None:
    driver, queue = split()
    queue.disable_notify()
    driver.set_avail_idx(100)
    assert queue.enable_notify()  # look again, and find it
    check_broken(queue, "more is available")


def test_more_chains_in_flight_than_the_queue_is_long() -> None:
    driver, queue = split()
    for _ in range(SIZE):
        driver.add([b"x"])
    held = [queue.pop() for _ in range(SIZE)]
    driver.make_available(0)
    check_broken(queue, "more is available than the queue is long")
    assert all(held)


def test_more_descriptors_in_flight_than_a_packed_queue_has() -> None:
    driver, queue = pair(PackedDriver)
    for _ in range(SIZE):
        driver.add([b"x"])
    held = [queue.pop() for _ in range(SIZE)]
    # Available in the second lap, though the first one is not completed.
    driver.memory.write(driver.desc, struct.pack("<QIHH", 0x100, 1, 0, VIRTQ_DESC_F_USED))
    check_broken(queue, "more is available than the queue is long")
    assert all(held)


@pytest.mark.parametrize("head", [SIZE, 0xFFFF])
def test_a_head_outside_the_queue(head: int) -> None:
    driver, queue = split()
    driver.make_available(head)
    check_broken(queue, "head")


@pytest.mark.parametrize("next_", [SIZE, 0xFFFF])
def test_a_next_outside_the_queue(next_: int) -> None:
    driver, queue = split()
    driver.write_descriptor(0, 0x100, 4, NEXT, next_)
    driver.make_available(0)
    check_broken(queue, "next descriptor")


# ---- chains ----


@pytest.mark.parametrize("length", [1, 2, SIZE])
@pytest.mark.parametrize("size", [0, 4])
def test_a_chain_that_loops(length: int, size: int) -> None:
    driver, queue = split()
    for slot in range(length):
        driver.write_descriptor(slot, 0x100, size, NEXT, (slot + 1) % length)
    driver.make_available(0)
    check_broken(queue, "loops")


def test_a_packed_chain_without_an_end() -> None:
    driver, queue = pair(PackedDriver)
    driver.expose([Descriptor(0x100, 4, NEXT)] * SIZE)
    check_broken(queue, "loops")


@LAYOUTS
def test_an_indirect_table_that_loops_or_is_longer_than_what_is_left(layout: Driver) -> None:
    driver, queue = pair(layout)
    table = driver.table([Descriptor(0x100, 4)] * SIZE)
    if layout is SplitDriver:
        table = table[:-DESC_SIZE] + struct.pack("<QIHH", 0x100, 4, NEXT, 0)
    driver.memory.write(TABLE, table)
    driver.expose([Descriptor(0x100, 4), Descriptor(TABLE, len(table), INDIRECT)])
    check_broken(queue, "loops")


@LAYOUTS
@pytest.mark.parametrize("flags", [0, WRITE])
def test_a_chain_of_more_than_4_gib(layout: Driver, flags: int) -> None:
    # No test has that much RAM: a range of 4 GiB is only claimed to be there.
    memory = FakeMemory((0, 0x10000))
    [ram] = memory.regions
    claimed = type(ram)(1 << 32, 1 << 32, ram.host_address, ram.bytes)
    memory.regions = (ram, claimed)
    driver, queue = layout(memory, SIZE), Virtqueue(memory, SIZE)
    driver.start(queue)
    driver.expose([Descriptor(1 << 32, 1 << 31), Descriptor(1 << 32, 1 << 31, flags)])
    chain = queue.pop()
    assert chain
    assert chain.readable_bytes + chain.writable_bytes == 1 << 32
    driver.expose([Descriptor(1 << 32, 1 << 31)] * 2 + [Descriptor(1 << 32, 1, flags)])
    check_broken(queue, "more than 2")


# The last of the first range is followed by the second in the guest, not in the host.
OUTSIDE = [
    (0xFFFF, 2),  # across two ranges
    (0x1FFFF, 2),  # across the end
    (0x20000, 1),  # in a hole
    (0x3FFFF, 2),  # from a hole
    (0x4FFFF, 2),
    (0x50000, 1),
    (0xD000_0050, 4),  # a device's own registers
    (0xFFFF_FFFF_FFFF_FFFF, 1),
    (0xFFFF_FFFF_FFFF_FFFF, 2),  # wraps
    (0xFFFF_FFFF_FFFF_F000, 0x2000),  # wraps into RAM
    (0, 0xFFFF_FFF0),
    (0x8000, 0xFFFF_FFF0),
]


@LAYOUTS
@pytest.mark.parametrize(("addr", "length"), OUTSIDE)
@pytest.mark.parametrize("flags", [0, WRITE])
def test_a_buffer_outside_ram(layout: Driver, addr: int, length: int, flags: int) -> None:
    driver, queue = pair(layout)
    driver.expose([Descriptor(0x100, 4), Descriptor(addr, length, flags)])
    check_broken(queue, "RAM")


@LAYOUTS
@pytest.mark.parametrize(("addr", "length"), [(0, 0x10000), (0x1FFFF, 1), (0x10000, 0x10000), (0x4FFF0, 16)])
def test_a_buffer_up_to_the_end_of_its_range(layout: Driver, addr: int, length: int) -> None:
    driver, queue = pair(layout)
    driver.expose([Descriptor(addr, length)])
    chain = queue.pop()
    assert chain
    assert chain.read() == driver.memory.read(addr, length)


@LAYOUTS
@pytest.mark.parametrize("length", [0, 4])
def test_readable_after_writable(layout: Driver, length: int) -> None:
    driver, queue = pair(layout)
    driver.expose([Descriptor(0x100, length, WRITE), Descriptor(0x100, length)])
    check_broken(queue, "after a writable")


@LAYOUTS
def test_readable_after_writable_in_a_table(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.memory.write(TABLE, driver.table([Descriptor(0x100, 4)]))
    driver.expose([Descriptor(0x100, 4, WRITE), Descriptor(TABLE, DESC_SIZE, INDIRECT)])
    check_broken(queue, "after a writable")


# ---- indirect descriptors ----


@LAYOUTS
@pytest.mark.parametrize(
    "length", [0, 1, DESC_SIZE - 1, DESC_SIZE + 1, (SIZE + 1) * DESC_SIZE, 1 << 20, 0xFFFF_FFF0, 0xFFFF_FFFF]
)
def test_an_indirect_table_of_a_length_that_cannot_be(layout: Driver, length: int) -> None:
    driver, queue = pair(layout)
    driver.memory.write(TABLE, driver.table([Descriptor(0x100, 4)] * (SIZE + 1)))
    driver.expose([Descriptor(TABLE, length, INDIRECT)])
    check_broken(queue, "table of no possible size")


@LAYOUTS
def test_indirect_that_was_not_negotiated(layout: Driver) -> None:
    driver, queue = pair(layout, features=0)
    driver.memory.write(TABLE, driver.table([Descriptor(0x100, 4)]))
    driver.expose([Descriptor(TABLE, DESC_SIZE, INDIRECT)])
    check_broken(queue, "not negotiated")


@LAYOUTS
def test_indirect_inside_indirect(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.memory.write(TABLE, driver.table([Descriptor(TABLE, DESC_SIZE, INDIRECT)]))
    driver.expose([Descriptor(TABLE, DESC_SIZE, INDIRECT)])
    check_broken(queue, "nested")


@LAYOUTS
def test_indirect_with_a_next_one(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.memory.write(TABLE, driver.table([Descriptor(0x100, 4)]))
    driver.expose([Descriptor(TABLE, DESC_SIZE, INDIRECT), Descriptor(0x100, 4)])
    check_broken(queue, "has a next one")


@LAYOUTS
@pytest.mark.parametrize("addr", [0x1FFF8, 0x20000, 0xFFF8, 0xFFFF_FFFF_FFFF_FFF8])
def test_an_indirect_table_outside_ram(layout: Driver, addr: int) -> None:
    driver, queue = pair(layout)
    driver.expose([Descriptor(addr, DESC_SIZE, INDIRECT)])
    check_broken(queue, "RAM")


def test_a_next_outside_the_indirect_table() -> None:
    driver, queue = split()
    driver.memory.write(TABLE, struct.pack("<QIHH", 0x100, 4, NEXT, 2) + bytes(DESC_SIZE))
    driver.expose([Descriptor(TABLE, 2 * DESC_SIZE, INDIRECT)])
    check_broken(queue, "next descriptor")


@LAYOUTS
@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])  # of these WRITE is ignored
def test_descriptors_before_an_indirect_one_and_a_table_anywhere(layout: Driver, flags: int) -> None:
    driver, queue = pair(layout)
    driver.memory.write(0x100, b"abcdefgh")
    driver.memory.write(TABLE + 1, driver.table([Descriptor(0x102, 2), Descriptor(0x104, 4, WRITE)]))
    driver.expose([Descriptor(0x100, 2), Descriptor(TABLE + 1, 2 * DESC_SIZE, flags)])
    chain = queue.pop()
    assert chain
    assert (chain.read(), chain.writable_bytes) == (b"abcd", 4)


# ---- rings ----


@LAYOUTS
def test_rings_that_overlap_hurt_the_guest_alone(layout: Driver) -> None:
    memory = FakeMemory(*RAM)
    queue = Virtqueue(memory, SIZE)
    features = VIRTIO_F_RING_PACKED if layout is PackedDriver else 0
    queue.start(SIZE, 0x1000, 0x1000, 0x1000, features)
    memory.write(0x1000, bytes([1, 0, 1, 0]) * 64)
    for _ in range(100):
        try:
            chain = queue.pop()
        except VirtqueueError:
            break
        if chain:
            chain.push()
        queue.publish()


def test_the_used_index_is_the_devices_own() -> None:
    driver, queue = split()
    for i in range(3):
        token = driver.add([b"x"], [4])
        driver.memory.write(driver.device + 2, b"\x55\xaa")
        chain = queue.pop()
        assert chain
        chain.push()
        queue.publish()
        assert driver.memory.read(driver.device + 2, 2) == bytes([i + 1, 0])
        assert [used.token for used in driver.used()] == [token]


@LAYOUTS
def test_a_descriptor_that_is_changed_after_validation(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.add([b"abcd"], [4])
    chain = queue.pop()
    assert chain
    driver.memory.write(driver.desc, b"\xff" * DESC_SIZE * SIZE)
    assert (chain.read(), chain.write(b"efgh!")) == (b"abcd", 4)


PLACES = [
    ("not aligned", 0x1008, 0x2000, 0x3000),
    ("not aligned", 0x1000, 0x2001, 0x3000),
    ("not aligned", 0x1000, 0x2000, 0x3002),
    ("not in one range", 0x20000, 0x2000, 0x3000),
    ("not in one range", 0x1FFF0, 0x2000, 0x3000),
    ("not in one range", 0x1000, 0xFFFE, 0x3000),
    ("not in one range", 0x1000, 0x2000, 0x1FFFC + 4),
    ("not in one range", 1 << 63, 0x2000, 0x3000),
    ("not in one range", (1 << 64) - 16, 0x2000, 0x3000),
]


@pytest.mark.parametrize(("words", "desc", "driver", "device"), PLACES)
@pytest.mark.parametrize("features", [0, VIRTIO_F_EVENT_IDX, VIRTIO_F_RING_PACKED])
def test_areas_that_cannot_be(words: str, desc: int, driver: int, device: int, features: int) -> None:
    queue = Virtqueue(FakeMemory(*RAM), SIZE)
    if features & VIRTIO_F_RING_PACKED and driver % 4 == 1:
        driver += 1
    with pytest.raises(VirtqueueError, match=words):
        queue.start(SIZE, desc, driver, device, features)
    assert not queue.ready
    assert queue.pop() is None
    assert not queue.publish()


@pytest.mark.parametrize("features", [0, VIRTIO_F_EVENT_IDX])
def test_areas_up_to_the_end_of_ram(features: int) -> None:
    queue = Virtqueue(FakeMemory(*RAM), SIZE)
    event = 2 if features else 0
    used = 4 + 8 * SIZE + event
    end = 0x20000
    queue.start(SIZE, end - SIZE * 16, end - 4 - 2 * SIZE - event, (end - used) & ~3, features)
    assert queue.pop() is None


def test_no_ram_at_all() -> None:
    queue = Virtqueue(FakeMemory(), SIZE)
    with pytest.raises(VirtqueueError, match="not in one range"):
        queue.start(SIZE, 0, 0, 0, 0)


@LAYOUTS
def test_what_was_popped_before_the_queue_broke_is_completed(layout: Driver) -> None:
    driver, queue = pair(layout)
    token = driver.add([b"x"], [4])
    chain = queue.pop()
    assert chain
    driver.expose([Descriptor(1 << 40, 1)])
    with pytest.raises(VirtqueueError):
        queue.pop()
    chain.write(b"done")
    chain.push()
    assert queue.publish()
    [used] = driver.used()
    assert (used.token, used.data) == (token, b"done")


@LAYOUTS
def test_a_million_empty_looks_cost_no_memory_and_find_nothing(layout: Driver) -> None:
    _, queue = pair(layout)
    for _ in range(1000):
        assert queue.pop() is None
        assert not queue.publish()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@LAYOUTS
def test_a_child_of_fork_finds_the_queue_stopped(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.add([b"x"])
    child = os.fork()
    if not child:
        try:
            fine = queue.pop() is None and not queue.publish() and not queue.enable_notify()
            try:
                driver.start(queue)
            except VirtqueueError:
                os._exit(0 if fine else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


# ---- by properties ----

WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 8, 0x80, 0x8000, 0x8080, 0xFFFF]), st.integers(0, 0xFFFF)
)


def check_chain(memory: FakeMemory, chain: Chain) -> None:
    """Nothing of a chain lies outside RAM, and nothing is too long."""
    pieces = chain.readable + chain.writable
    assert len(pieces) <= SIZE
    assert all(0 < len(piece) <= 0x10000 for piece in pieces)
    assert sum(map(len, chain.readable)) == chain.readable_bytes
    assert sum(map(len, chain.writable)) == chain.writable_bytes
    chain.read(100)
    chain.write(b"x" * 10)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_garbage_in_the_rings_never_gets_out_of_ram(data: st.DataObject) -> None:
    memory = FakeMemory(*RAM)
    queue = Virtqueue(memory, SIZE)
    features = 0
    for feature in (VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC):
        features |= data.draw(st.sampled_from([0, feature]))
    places = st.sampled_from([0x1000, 0x1040, 0xFFC0, 0x40000])
    desc, driver, device = data.draw(places), data.draw(places), data.draw(places)
    try:
        queue.start(SIZE, desc, driver, device, features)
    except VirtqueueError:
        return
    held: list[Chain] = []
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from("wwwpppcuedr")):
            case "w":
                words = data.draw(st.lists(WORDS, min_size=1, max_size=16))
                area = data.draw(st.sampled_from([desc, driver, device]))
                raw = struct.pack(f"<{len(words)}H", *words)
                memory.write(min(area + data.draw(st.integers(0, 40)) * 2, area | 0xFF80), raw)
            case "p":
                try:
                    chain = queue.pop()
                except VirtqueueError:
                    assert queue.broken
                    continue
                if chain:
                    check_chain(memory, chain)
                    held.append(chain)
            case "c" if held:
                held.pop(data.draw(st.integers(0, len(held) - 1))).push(data.draw(st.integers(0, 1 << 33)))
            case "u":
                queue.publish()
            case "e":
                queue.enable_notify()
            case "d":
                queue.disable_notify()
            case "r":
                queue.stop()
                queue.start(SIZE, desc, driver, device, features)
                assert all(chain.void for chain in held)
