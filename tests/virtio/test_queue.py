"""Virtqueues against a driver in Python: what both layouts do for drivers that keep to the specification."""

from __future__ import annotations

import gc
from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiokvm.errors import DeviceError, VirtqueueError
from aiokvm.memory import GuestMemory
from aiokvm.virtio.queue import MAX_SIZE, Chain, Virtqueue
from tests.virtio.driver import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    FakeDriver,
    FakeMemory,
    PackedDriver,
    QueueFullError,
    SplitDriver,
    Used,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Driver = Callable[..., FakeDriver]

LAYOUTS = pytest.mark.parametrize("layout", [SplitDriver, PackedDriver])
RAM = 1 << 20


def pair(layout: Driver, size: int = 8, features: int = 0) -> tuple[FakeDriver, Virtqueue]:
    memory = FakeMemory((0, RAM))
    driver, queue = layout(memory, size, features), Virtqueue(memory, 1024)
    driver.start(queue)
    return driver, queue


def pop(queue: Virtqueue) -> Chain:
    chain = queue.pop()
    assert chain
    return chain


@LAYOUTS
def test_a_chain_comes_out_as_it_went_in(layout: Driver) -> None:
    driver, queue = pair(layout)
    assert queue.pop() is None
    token = driver.add([b"head", b"er"], [3, 5])
    chain = pop(queue)
    assert queue.pop() is None
    assert (chain.readable_bytes, chain.writable_bytes) == (6, 8)
    assert [bytes(piece) for piece in chain.readable] == [b"head", b"er"]
    assert [len(piece) for piece in chain.writable] == [3, 5]
    assert [chain.read(3), chain.read(2), chain.read(), chain.read()] == [b"hea", b"de", b"r", b""]
    assert [chain.write(b"ab"), chain.write(b"cdefgh"), chain.write(b"ij")] == [2, 6, 0]
    assert driver.used() == []
    chain.push()
    assert driver.used() == []
    assert queue.publish()
    assert driver.used() == [Used(token, 8, b"abcdefgh")]
    assert not queue.publish()


@LAYOUTS
def test_a_mapped_memory_serves_as_well(layout: Driver) -> None:
    memory = GuestMemory(1 << 20)
    driver, queue = layout(memory, 8), Virtqueue(memory, 8)
    driver.start(queue)
    token = driver.add([b"x"], [4])
    chain = pop(queue)
    memory.close()
    del memory
    gc.collect()
    assert chain.write(chain.read() * 4) == 4  # the queue keeps it mapped
    chain.push()
    queue.publish()
    assert token


@LAYOUTS
def test_how_much_was_written_can_be_said(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.add([b"r"], [10])
    driver.add([b"r"], [10])
    chain = pop(queue)
    chain.writable[0][:4] = b"data"
    chain.push(4)
    pop(queue).push(1 << 40)  # more than there is: what there is
    queue.publish()
    assert [used.written for used in driver.used()] == [4, 10]


@LAYOUTS
@pytest.mark.parametrize("features", [0, VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER])
def test_a_queue_goes_round_many_times(layout: Driver, features: int) -> None:
    driver, queue = pair(layout, 4, features)
    for i in range(1000):
        token = driver.add([b"%d" % i], [8])
        chain = pop(queue)
        chain.write(chain.read())
        chain.push()
        queue.publish()
        assert driver.used() == [Used(token, len(str(i)), b"%d" % i)]


@LAYOUTS
def test_completions_in_any_order(layout: Driver) -> None:
    driver, queue = pair(layout)
    tokens = [driver.add([b"%d" % i], [4]) for i in range(4)]
    chains = [pop(queue) for _ in tokens]
    for i in (2, 0, 3, 1):
        chains[i].write(b"%d" % i)
        chains[i].push()
    queue.publish()
    assert driver.used() == [Used(tokens[i], 1, b"%d" % i) for i in (2, 0, 3, 1)]


@LAYOUTS
def test_in_order_completions_wait_for_each_other(layout: Driver) -> None:
    driver, queue = pair(layout, features=VIRTIO_F_IN_ORDER)
    tokens = [driver.add([b"x"], [1]) for _ in range(4)]
    chains = [pop(queue) for _ in tokens]
    chains[1].push()
    chains[2].push()
    assert not queue.publish()
    assert driver.used() == []
    chains[0].push()
    assert queue.publish()
    assert [used.token for used in driver.used()] == tokens[:3]
    chains[3].push()
    queue.publish()
    assert [used.token for used in driver.used()] == tokens[3:]


@LAYOUTS
def test_in_order_a_batch_is_one_entry_only_if_all_was_written(layout: Driver) -> None:
    driver, queue = pair(layout, features=VIRTIO_F_IN_ORDER)
    tokens = [driver.add([b"x"], [2]) for _ in range(4)]
    for written in (2, 1, 2, 0):
        chain = pop(queue)
        chain.write(b"ab"[:written])
        chain.push()
    queue.publish()
    assert driver.used() == [
        Used(token, len(data), data) for token, data in zip(tokens, (b"ab", b"a", b"ab", b""), strict=True)
    ]


@LAYOUTS
def test_indirect_chains_take_one_descriptor(layout: Driver) -> None:
    driver, queue = pair(layout, features=VIRTIO_F_INDIRECT_DESC)
    for _ in range(8):
        driver.add([b"a", b"b", b"c"], [1, 2], indirect=True)
    with pytest.raises(QueueFullError):
        driver.add([b"x"])
    for _ in range(8):
        chain = pop(queue)
        assert chain.read() == b"abc"
        assert chain.writable_bytes == 3
        chain.push()


@LAYOUTS
def test_empty_descriptors_are_skipped(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.add([b"", b"a", b""], [0, 1, 0])
    driver.add([b""], [0])
    chain = pop(queue)
    assert (len(chain.readable), len(chain.writable), chain.read()) == (1, 1, b"a")
    empty = pop(queue)
    assert (empty.readable_bytes, empty.writable_bytes, empty.read(), empty.write(b"x")) == (0, 0, b"", 0)


@LAYOUTS
@pytest.mark.parametrize("features", [0, VIRTIO_F_EVENT_IDX])
def test_the_driver_notifies_when_it_is_asked_to(layout: Driver, features: int) -> None:
    driver, queue = pair(layout, features=features)
    driver.add([b"x"])
    assert driver.notifies()
    queue.disable_notify()
    pop(queue)
    driver.add([b"x"])
    assert not driver.notifies()
    assert queue.enable_notify()  # that one has come meanwhile
    pop(queue)
    assert not queue.enable_notify()
    driver.add([b"x"])
    assert driver.notifies()


@LAYOUTS
@pytest.mark.parametrize("features", [0, VIRTIO_F_EVENT_IDX])
def test_a_queue_that_was_found_empty_is_notified_of(layout: Driver, features: int) -> None:
    driver, queue = pair(layout, features=features)
    for _ in range(20):
        driver.add([b"x"])
        assert driver.notifies()
        pop(queue).push()
        queue.publish()
        driver.used()
        assert queue.pop() is None


@LAYOUTS
@pytest.mark.parametrize("features", [0, VIRTIO_F_EVENT_IDX])
def test_the_driver_gets_the_interrupts_that_it_wants(layout: Driver, features: int) -> None:
    driver, queue = pair(layout, features=features)

    def complete() -> bool:
        driver.add([b"x"], [1])
        pop(queue).push()
        return queue.publish()

    for _ in range(20):
        driver.want_interrupt(True)
        assert complete()
        driver.used()
        driver.want_interrupt(False)
        assert not complete()
        assert len(driver.used()) == 1


@LAYOUTS
def test_with_an_event_index_a_batch_is_one_interrupt(layout: Driver) -> None:
    driver, queue = pair(layout, features=VIRTIO_F_EVENT_IDX)
    for _ in range(10):
        driver.want_interrupt(True)
        for _ in range(3):
            driver.add([b"x"], [1])
        interrupts = []
        while chain := queue.pop():
            chain.push()
            interrupts.append(queue.publish())
        assert interrupts == [True, False, False]
        assert len(driver.used()) == 3


@LAYOUTS
def test_stopping_makes_chains_void(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.add([b"x"], [4])
    chain = pop(queue)
    queue.stop()
    assert chain.void
    assert (chain.read(), chain.write(b"abc"), chain.readable, chain.writable) == (b"", 0, [], [])
    chain.push()
    assert not queue.publish()
    assert not queue.ready
    assert queue.pop() is None
    assert not queue.enable_notify()
    queue.disable_notify()
    assert driver.used() == []


@LAYOUTS
def test_a_chain_is_completed_once(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.add([b"x"], [4])
    chain = pop(queue)
    chain.push()
    chain.push()
    chain.drop()
    queue.publish()
    assert len(driver.used()) == 1
    assert queue.pop() is None


@LAYOUTS
def test_a_dropped_chain_does_not_come_back(layout: Driver) -> None:
    driver, queue = pair(layout)
    driver.add([b"x"], [4])
    pop(queue).drop()
    assert not queue.publish()
    assert driver.used() == []


@LAYOUTS
def test_a_queue_starts_anew(layout: Driver) -> None:
    memory = FakeMemory((0, RAM))
    queue = Virtqueue(memory, 8)
    for base in (0x1000, 0x40000, 0x80000):
        driver = layout(memory, 8, base=base)
        driver.start(queue)
        assert (queue.ready, queue.size, queue.broken) == (True, 8, "")
        for i in range(4):
            driver.add([b"%d" % i], [8])
            assert pop(queue).read() == b"%d" % i


def test_a_packed_queue_may_have_any_size() -> None:
    driver, queue = pair(PackedDriver, 7)
    for i in range(100):
        token = driver.add([b"%d" % i], [8])
        chain = pop(queue)
        chain.write(chain.read())
        chain.push()
        queue.publish()
        assert driver.used() == [Used(token, len(str(i)), b"%d" % i)]


@pytest.mark.parametrize("size", [0, MAX_SIZE + 1])
def test_a_queue_has_a_largest_size(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 1024"):
        Virtqueue(FakeMemory((0, RAM)), size)


@pytest.mark.parametrize("size", [0, 3, 12, 16, 1 << 16, (1 << 32) - 1])
def test_a_split_queue_of_a_size_that_cannot_be_never_gets_ready(size: int) -> None:
    queue = Virtqueue(FakeMemory((0, RAM)), 8)
    with pytest.raises(VirtqueueError, match="queue size"):
        queue.start(size, 0x1000, 0x2000, 0x3000, 0)
    assert not queue.ready
    assert queue.pop() is None


def test_the_error_is_a_device_error() -> None:
    assert issubclass(VirtqueueError, DeviceError)


# ---- by properties ----

BUFFERS = st.tuples(
    st.lists(st.binary(max_size=40), max_size=4), st.lists(st.integers(0, 40), max_size=4)
).filter(any)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_whatever_goes_in_comes_out_and_goes_back(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from([SplitDriver, PackedDriver]))
    features = data.draw(st.sampled_from([0, VIRTIO_F_EVENT_IDX]))
    features |= data.draw(st.sampled_from([0, VIRTIO_F_IN_ORDER])) | VIRTIO_F_INDIRECT_DESC
    size = data.draw(st.sampled_from([8, 16] if layout is SplitDriver else [8, 11, 16]))
    driver, queue = pair(layout, size, features)
    added: dict[int, tuple[list[bytes], list[int]]] = {}  # by token
    available: deque[int] = deque()
    popped: list[tuple[int, Chain]] = []
    answers: dict[int, bytes] = {}
    asked = True  # to be notified
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from("aaappcuen")):
            case "a":
                readable, writable = data.draw(BUFFERS)
                try:
                    token = driver.add(readable, writable, indirect=data.draw(st.booleans()))
                except QueueFullError:
                    continue
                added[token] = readable, writable
                if asked and not available and not features & VIRTIO_F_EVENT_IDX:
                    assert driver.notifies()
                available.append(token)
            case "p":
                chain = queue.pop()
                assert (chain is not None) == bool(available)
                if chain:
                    token = available.popleft()
                    readable, writable = added[token]
                    assert [bytes(piece) for piece in chain.readable] == [
                        piece for piece in readable if piece
                    ]
                    assert [len(piece) for piece in chain.writable] == [n for n in writable if n]
                    popped.append((token, chain))
            case "c" if popped:
                token, chain = popped.pop(data.draw(st.integers(0, len(popped) - 1)))
                assert chain.read() == b"".join(added[token][0])
                answer = data.draw(st.binary(max_size=chain.writable_bytes))
                chain.write(answer)
                answers[token] = answer
                chain.push()
            case "u":
                queue.publish()
                for used in driver.used():
                    assert used.data == answers.pop(used.token)
            case "e":
                asked = True
                assert queue.enable_notify() == bool(available)
            case "n":
                asked = False
                queue.disable_notify()
    while chain := queue.pop():
        popped.append((available.popleft(), chain))
    for token, chain in popped:
        answers[token] = b""
        chain.push()
    queue.publish()
    assert {used.token: used.data for used in driver.used()} == answers
    assert not driver.buffers
