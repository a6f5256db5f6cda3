"""The watchdog names who holds the loop up; that it holds is arranged by waiting for the watchdog."""

from __future__ import annotations

import logging
import threading

import anyio
import anyio.lowlevel
import pytest

from aiokvm import ConfigError, HoldUp, Watchdog
from aiokvm.aio import current_loop

pytestmark = pytest.mark.anyio

THRESHOLD_S = 0.02
LIMIT_S = 30.0


class Holder:
    """Holds the loop up until the watchdog has told of it, and notes what it told."""

    def __init__(self, word: str = "hold") -> None:
        self.word = word
        self.seen: list[HoldUp] = []
        self.told = threading.Event()

    def __call__(self, hold_up: HoldUp) -> None:
        # On a busy machine the loop may be late without anybody's doing.
        if f"in {self.word}\n" in hold_up.stack:
            self.seen.append(hold_up)
            self.told.set()

    def hold(self) -> None:
        assert self.told.wait(LIMIT_S)


async def sign_of_life() -> None:
    """Returns when what the watchdog waits for has been called: the loop calls in order."""
    called = anyio.Event()
    current_loop().call_soon(called.set)
    await called.wait()


async def test_a_task_is_named_with_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    holder = Holder()

    async def hog() -> None:
        await anyio.lowlevel.checkpoint()
        holder.hold()

    async with Watchdog(THRESHOLD_S, holder), anyio.create_task_group() as tasks:
        tasks.start_soon(hog, name="the hog")
    (seen,) = holder.seen
    assert seen.task == "the hog"
    assert seen.seconds == THRESHOLD_S
    inner = seen.stack[seen.stack.index("in hog") :]
    assert "holder.hold()" in inner
    assert "in hold\n" in inner
    told = [record for record in caplog.records if "task the hog has held" in record.getMessage()]
    assert [(record.name, record.levelno) for record in told] == [("aiokvm.aio", logging.WARNING)]
    assert seen.stack.rstrip() in told[0].getMessage()


async def test_a_task_of_the_adapters_is_named() -> None:
    holder = Holder()

    async def hog() -> None:
        holder.hold()

    async with Watchdog(THRESHOLD_S, holder):
        await current_loop().spawn(hog, "aiokvm hog").wait()
    assert [seen.task for seen in holder.seen] == ["aiokvm hog"]


async def test_a_callback_is_shown_by_its_stack() -> None:
    holder = Holder()
    done = anyio.Event()

    def hog() -> None:
        holder.hold()
        done.set()

    async with Watchdog(THRESHOLD_S, holder):
        current_loop().call_soon(hog)
        await done.wait()
    (seen,) = holder.seen
    assert "in hog\n" in seen.stack


async def test_one_hold_up_is_told_once_and_the_next_again() -> None:
    holder = Holder()
    never = threading.Event()
    async with Watchdog(THRESHOLD_S, holder):
        holder.hold()
        for _ in range(5):
            never.wait(THRESHOLD_S)
        assert len(holder.seen) == 1
        await sign_of_life()
        holder.told.clear()
        holder.hold()
    assert len(holder.seen) == 2


def broken(hold_up: HoldUp) -> None:
    raise ZeroDivisionError


async def test_a_callback_that_raises_is_logged_and_the_watchdog_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    holder = Holder()

    def both(hold_up: HoldUp) -> None:
        holder(hold_up)
        broken(hold_up)

    async with Watchdog(THRESHOLD_S, both):
        holder.hold()
        await sign_of_life()
        holder.told.clear()
        holder.hold()
    assert len(holder.seen) == 2
    assert "exception in the watchdog's callback" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_loop_that_runs_is_left_alone_and_the_thread_ends() -> None:
    seen: list[HoldUp] = []
    before = threading.active_count()
    async with Watchdog(threshold=LIMIT_S, callback=seen.append):
        assert any(thread.name == "aiokvm watchdog" for thread in threading.enumerate())
        await anyio.lowlevel.checkpoint()
    assert not any(thread.name == "aiokvm watchdog" for thread in threading.enumerate())
    assert threading.active_count() <= before + 1  # the worker that waited for it
    assert seen == []


async def test_it_ends_when_it_is_cancelled() -> None:
    with anyio.CancelScope() as scope:
        async with Watchdog(THRESHOLD_S):
            scope.cancel()
            await anyio.sleep_forever()
    assert not any(thread.name == "aiokvm watchdog" for thread in threading.enumerate())


@pytest.mark.parametrize("threshold", [0, -1, float("nan"), float("inf"), 10**30])
async def test_a_threshold_is_above_0(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"not above 0|give a number"):
        Watchdog(threshold)
