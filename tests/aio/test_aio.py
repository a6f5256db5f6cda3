"""The loop adapter keeps one contract on asyncio, uvloop and trio."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import TYPE_CHECKING, NoReturn

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from aiokvm.aio import current_loop
from aiokvm.logs import BURST

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


async def test_watch_calls_back_until_the_descriptor_is_drained(eventfd: int) -> None:
    calls: list[int] = []
    seen = anyio.Event()

    def readable() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            os.eventfd_read(eventfd)
            seen.set()

    watch = current_loop().watch(eventfd, readable)
    os.eventfd_write(eventfd, 1)
    with anyio.fail_after(5):
        await seen.wait()
    await anyio.wait_all_tasks_blocked()
    watch.cancel()
    assert calls == [0, 1, 2]


async def test_watch_is_silent_after_cancel_even_if_the_descriptor_is_closed(eventfd: int) -> None:
    calls: list[None] = []
    fd = os.dup(eventfd)
    watch = current_loop().watch(fd, lambda: calls.append(None))
    await anyio.wait_all_tasks_blocked()
    os.eventfd_write(eventfd, 1)
    watch.cancel()
    watch.cancel()
    os.close(fd)
    await anyio.wait_all_tasks_blocked()
    assert calls == []


async def test_a_watch_may_be_cancelled_before_the_loop_has_looked_at_it(eventfd: int) -> None:
    fd = os.dup(eventfd)
    current_loop().watch(fd, lambda: None).cancel()
    os.close(fd)
    await anyio.wait_all_tasks_blocked()


async def test_adapters_of_one_loop_are_equal() -> None:
    here, there = current_loop(), []

    async def other() -> None:
        there.append(current_loop())

    thread = threading.Thread(target=lambda: anyio.run(other))
    thread.start()
    await anyio.to_thread.run_sync(thread.join)
    assert current_loop() == here
    assert hash(current_loop()) == hash(here)
    assert there != [here]


async def test_a_watch_may_cancel_itself_and_close_its_descriptor(eventfd: int) -> None:
    fd = os.dup(eventfd)
    closed = anyio.Event()

    def readable() -> None:
        watch.cancel()
        os.close(fd)
        closed.set()

    watch = current_loop().watch(fd, readable)
    os.eventfd_write(eventfd, 1)
    with anyio.fail_after(5):
        await closed.wait()
    await anyio.wait_all_tasks_blocked()


async def test_being_cancelled_is_told_from_awaiting_what_was() -> None:
    seen: list[bool] = []
    entered = anyio.Event()

    async def work() -> None:
        seen.append(current_loop().being_cancelled())
        entered.set()
        try:
            await anyio.sleep_forever()
        except BaseException:
            seen.append(current_loop().being_cancelled())
            raise

    task = current_loop().spawn(work, "work")
    await entered.wait()
    task.cancel()
    await task.wait()
    assert seen == [False, True]


async def test_a_watch_may_cancel_itself(eventfd: int) -> None:
    calls: list[None] = []
    done = anyio.Event()

    def readable() -> None:
        calls.append(None)
        watch.cancel()
        done.set()

    watch = current_loop().watch(eventfd, readable)
    os.eventfd_write(eventfd, 1)
    with anyio.fail_after(5):
        await done.wait()
    await anyio.wait_all_tasks_blocked()
    assert calls == [None]


async def test_call_soon_keeps_order_and_waits_for_the_caller() -> None:
    loop = current_loop()
    order: list[str] = []
    done = anyio.Event()
    loop.call_soon(lambda: order.append("first"))
    loop.call_soon(lambda: order.append("second"))
    loop.call_soon(done.set)
    order.append("caller")
    with anyio.fail_after(5):
        await done.wait()
    assert order == ["caller", "first", "second"]


async def test_callbacks_that_wait_together_do_not_add_up() -> None:
    # Planes and hooks that have more to do each call back soon, however many there are: under the measure.
    loop = current_loop()
    called = 0
    done = anyio.Event()

    def callback() -> None:
        nonlocal called
        end = time.thread_time() + 0.0005
        while time.thread_time() < end:
            pass
        called += 1
        if called == 400:
            done.set()

    def both() -> None:
        loop.call_soon(callback)
        callback()

    for _ in range(200):
        loop.call_soon(both)
    with anyio.fail_after(30):
        await done.wait()


async def test_call_soon_threadsafe_runs_on_the_loops_thread() -> None:
    loop = current_loop()
    done = anyio.Event()
    threads: list[int] = []

    def called() -> None:
        threads.append(threading.get_ident())
        done.set()

    thread = threading.Thread(target=loop.call_soon_threadsafe, args=(called,))
    thread.start()
    with anyio.fail_after(5):
        await done.wait()
    thread.join()
    assert threads == [threading.get_ident()]


async def test_call_at_is_not_early_and_can_be_cancelled() -> None:
    loop = current_loop()
    done = anyio.Event()
    times: list[int] = []
    deadline = loop.now_ns() + 5_000_000
    cancelled = loop.call_at(deadline - 1_000_000, lambda: times.append(-1))
    cancelled.cancel()

    def due() -> None:
        times.append(loop.now_ns())
        done.set()

    loop.call_at(deadline, due)
    with anyio.fail_after(5):
        await done.wait()
    # Clocks of loops are floats of seconds, and loops take what is due within the clock's resolution.
    assert len(times) == 1
    assert times[0] >= deadline - 2_000_000


async def test_sleep_until_reaches_its_deadline() -> None:
    loop = current_loop()
    deadline = loop.now_ns() + 2_000_000
    await loop.sleep_until(deadline)
    assert loop.now_ns() >= deadline - 2_000_000


async def test_uncancelled_work_ends_before_the_cancellation_gets_through() -> None:
    loop = current_loop()
    steps: list[str] = []
    go = anyio.Event()

    async def work() -> str:
        steps.append("begun")
        await go.wait()
        steps.append("ended")
        return "result"

    async def caller() -> None:
        try:
            await loop.uncancelled(work)
            await anyio.lowlevel.checkpoint()
            steps.append("not cancelled")
        finally:
            steps.append("left")

    async with anyio.create_task_group() as group:
        group.start_soon(caller)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.lowlevel.checkpoint()
            assert steps == ["begun"]
            go.set()
    assert steps == ["begun", "ended", "left"]


async def test_uncancelled_hands_on_results_and_exceptions() -> None:
    async def good() -> int:
        await anyio.lowlevel.checkpoint()
        return 7

    async def bad() -> int:
        raise ValueError("bad work")

    loop = current_loop()
    assert await loop.uncancelled(good) == 7
    with pytest.raises(ValueError, match="bad work"):
        await loop.uncancelled(bad)


@pytest.mark.parametrize("how", ["watch", "call_soon", "call_soon_threadsafe", "call_at", "spawn"])
async def test_what_raises_again_and_again_is_logged_ever_so_seldom(
    how: str, eventfd: int, caplog: pytest.LogCaptureFixture, fresh_log: None
) -> None:
    loop, count, done = current_loop(), 0, anyio.Event()

    def bad() -> NoReturn:
        nonlocal count
        count += 1
        if count == 100:
            watch.cancel()
            done.set()
        elif how != "watch":
            again()
        raise ValueError("bad callback")

    async def bad_task() -> NoReturn:
        bad()

    def again() -> None:
        if how == "spawn":
            loop.spawn(bad_task, "bad task")
        elif how == "call_at":
            loop.call_at(loop.now_ns(), bad)
        else:
            getattr(loop, how)(bad)

    watch = loop.watch(eventfd, bad)
    if how == "watch":
        os.eventfd_write(eventfd, 1)
    else:
        again()
    with anyio.fail_after(60):
        await done.wait()
    await loop.turn()
    assert BURST <= len(caplog.records) < 30
    record = caplog.records[0]
    assert record.name == "aiokvm.aio"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "bad callback"


async def test_an_event_wakes_all_who_wait_and_whoever_comes_later() -> None:
    event = current_loop().event()
    woken: list[int] = []

    async def wait(number: int) -> None:
        await event.wait()
        woken.append(number)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(wait, number)
            await anyio.wait_all_tasks_blocked()
            assert woken == []
            event.set()
            event.set()
        await event.wait()
    assert sorted(woken) == [0, 1, 2]


async def test_a_lock_is_had_by_one_at_a_time_and_left_by_whoever_is_cancelled() -> None:
    lock = current_loop().lock()
    steps: list[str] = []

    async def work(name: str) -> None:
        async with lock:
            steps.append(f"{name} begins")
            await anyio.lowlevel.checkpoint()
            steps.append(f"{name} ends")

    async def give_up() -> None:
        with anyio.move_on_after(0):
            await work("cancelled")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group, lock:
            group.start_soon(work, "first")
            await anyio.wait_all_tasks_blocked()
            group.start_soon(give_up)
            group.start_soon(work, "second")
            await anyio.wait_all_tasks_blocked()
            assert steps == []
    assert steps == ["first begins", "first ends", "second begins", "second ends"]


async def test_within_hands_on_what_ends_in_time_and_cancels_what_does_not() -> None:
    loop = current_loop()
    ended: list[str] = []

    async def quick() -> int:
        await anyio.lowlevel.checkpoint()
        return 7

    async def slow() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("slow")

    for seconds in (None, 5, 0.5):
        assert await loop.within(seconds, quick) == 7
    for late in (0.01, 0, -1):
        with pytest.raises(TimeoutError):
            await loop.within(late, slow)
    assert ended == 3 * ["slow"]
    with anyio.move_on_after(0.01) as scope:
        await loop.within(60, slow)
    assert scope.cancelled_caught


async def test_what_runs_in_a_thread_ends_before_a_cancellation_gets_through() -> None:
    loop = current_loop()
    begun, go = threading.Event(), threading.Event()
    ended: list[int] = []

    def work() -> int:
        begun.set()
        assert go.wait(5)
        ended.append(threading.get_ident())
        return 7

    async def caller() -> None:
        await loop.in_thread(work)
        await anyio.lowlevel.checkpoint()
        ended.append(0)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(caller)
            while not begun.is_set():
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
            go.set()
        assert len(ended) == 1
        assert ended[0] != threading.get_ident()
        # Nor is it left out for one who has been cancelled before: a machine is closed so.
        with anyio.CancelScope() as scope:
            scope.cancel()
            await loop.in_thread(work)
        assert len(ended) == 2
        assert await loop.in_thread(lambda: 7) == 7
        with pytest.raises(ValueError, match="bad work"):
            await loop.in_thread(lambda: int("bad work"))


class Shared:
    pass


async def test_what_a_loop_shares_is_forgotten_with_the_last_who_keeps_it() -> None:
    kept = current_loop().shared[Shared] = Shared()
    assert current_loop().shared[Shared] is kept
    del kept
    gc.collect()
    assert Shared not in current_loop().shared
