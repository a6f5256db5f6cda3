"""Every step of a loop is measured, by CPU time, on the three loops."""

from __future__ import annotations

import gc
import os
import time
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from aiokvm.aio import current_loop
from aiokvm.aio.steps import HoldUp, StepMeter, ThreadClock
from tests import holdups

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Long beside what a loop does by itself, and what a test may take.
BURN_S = 0.03
LIMIT_S = 30.0


def burn(seconds: float = BURN_S) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


async def in_a_task() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(burned)


async def burned() -> None:
    await anyio.lowlevel.checkpoint()
    burn()


async def by_a_callback() -> None:
    done = anyio.Event()

    def callback() -> None:
        burn()
        done.set()

    current_loop().call_soon(callback)
    await done.wait()


async def by_a_timer() -> None:
    done = anyio.Event()

    def callback() -> None:
        burn()
        done.set()

    current_loop().call_at(0, callback)
    await done.wait()


async def by_a_descriptor() -> None:
    done = anyio.Event()
    fd = os.eventfd(1)

    def callback() -> None:
        os.eventfd_read(fd)
        burn()
        done.set()

    watch = current_loop().watch(fd, callback)
    await done.wait()
    watch.cancel()
    os.close(fd)


async def in_a_task_of_the_adapters() -> None:
    await current_loop().spawn(burned, "burner").wait()


async def from_another_thread() -> None:
    done = anyio.Event()
    loop = current_loop()

    def callback() -> None:
        burn()
        done.set()

    await anyio.to_thread.run_sync(loop.call_soon_threadsafe, callback)
    await done.wait()


WAYS = [in_a_task, by_a_callback, by_a_timer, by_a_descriptor, in_a_task_of_the_adapters, from_another_thread]


@pytest.mark.parametrize("name", ["asyncio", "uvloop", "trio"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_computes_is_told_with_its_time(name: str, way: Callable[[], Awaitable[None]]) -> None:
    seen: list[HoldUp] = []
    with StepMeter(BURN_S, seen.append) as meter:
        kind, options = holdups.backend(name, meter)
        anyio.run(way, backend=kind, backend_options=options)
    assert meter.worst is not None
    assert meter.worst in seen
    assert meter.worst.cpu_seconds >= BURN_S


@pytest.mark.parametrize("name", ["asyncio", "uvloop", "trio"])
def test_what_a_long_step_does_is_seen(name: str) -> None:
    async def main() -> None:
        # Until the meter's thread has had its chance.
        with anyio.fail_after(LIMIT_S):
            while not any("in burn\n" in hold_up.stack for hold_up in seen):
                burn()
                await anyio.lowlevel.checkpoint()

    seen: list[HoldUp] = []
    with StepMeter(BURN_S, seen.append) as meter:
        kind, options = holdups.backend(name, meter)
        anyio.run(main, backend=kind, backend_options=options)


@pytest.mark.parametrize("name", ["asyncio", "uvloop", "trio"])
def test_a_task_is_named(name: str) -> None:
    async def main() -> None:
        await current_loop().spawn(burned, "the burner").wait()

    with StepMeter(BURN_S) as meter:
        kind, options = holdups.backend(name, meter)
        anyio.run(main, backend=kind, backend_options=options)
    assert meter.worst is not None
    assert meter.worst.task == "the burner"


@pytest.mark.parametrize("name", ["asyncio", "uvloop", "trio"])
def test_steps_do_not_add_up_and_waiting_is_not_computing(name: str) -> None:
    async def main() -> None:
        for _ in range(10):
            burn(BURN_S / 5)
            await anyio.lowlevel.checkpoint()
        time.sleep(2 * BURN_S)  # noqa: ASYNC251

    seen: list[HoldUp] = []
    with StepMeter(BURN_S, seen.append) as meter:
        kind, options = holdups.backend(name, meter)
        anyio.run(main, backend=kind, backend_options=options)
    assert meter.steps > 10
    assert seen == []


def collected(meter: StepMeter) -> float:
    """CPU seconds of a step that collects garbage."""
    meter.begin()
    gc.collect()
    meter.end(None)
    assert meter.worst is not None
    return meter.worst.cpu_seconds


def test_collecting_garbage_is_the_steps_in_which_it_happens() -> None:
    heap = [[] for _ in range(1_000_000)]  # type: ignore[var-annotated]
    with StepMeter(10) as meter:
        before = time.thread_time()
        took = collected(meter)
        assert took > (time.thread_time() - before) / 2
    assert len(heap) == 1_000_000


def test_what_was_there_before_a_test_is_not_collected_in_it(request: pytest.FixtureRequest) -> None:
    heap = [[] for _ in range(1_000_000)]  # type: ignore[var-annotated]
    with StepMeter(10) as meter:
        took = collected(meter)
    with holdups.measured(request) as meter:
        assert collected(meter) < took / 4
    assert gc.get_freeze_count() == 0
    assert len(heap) == 1_000_000


def test_a_threads_clock_is_its_own() -> None:
    clock = ThreadClock()
    before_ns = clock.now_ns()
    burn()
    assert clock.now_ns() - before_ns >= BURN_S * 1e9
    assert "in test_a_threads_clock_is_its_own\n" in clock.stack()
