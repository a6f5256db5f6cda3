"""What only asyncio has: a task can be cancelled from outside of any scope."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING

import pytest
import uvloop

from aiokvm.aio import current_loop

if TYPE_CHECKING:
    from collections.abc import Callable


def test_no_loop_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError):
        current_loop()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_is_shared_hangs_off_its_loop(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    class Shared:
        def __init__(self) -> None:
            self.loop = current_loop()

    async def share() -> Shared:
        assert Shared not in current_loop().shared
        made = Shared()
        current_loop().shared[Shared] = made
        assert Shared in current_loop().shared
        return made

    loops = [new_loop() for _ in range(2)]
    # One keeps its loop, the loop does not keep it.
    gone = [weakref.ref(loop) for loop in loops]
    made = [loop.run_until_complete(share()) for loop in loops]
    for loop in loops:
        loop.close()
    del loop, loops, made
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_uncancelled_work_survives_task_cancel_and_the_cancellation_follows() -> None:
    async def main() -> list[str]:
        steps: list[str] = []
        go = asyncio.Event()

        async def work() -> None:
            await go.wait()
            steps.append("ended")

        async def caller() -> None:
            await current_loop().uncancelled(work)
            steps.append("not cancelled")

        task = asyncio.create_task(caller())
        await asyncio.sleep(0)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return steps

    assert asyncio.run(main()) == ["ended"]


# What anyio shields is not loaded there.
WITHOUT_ANYIO = """
import asyncio, sys, threading
from aiokvm.aio import current_loop

async def main():
    go, ended = threading.Event(), []
    def work():
        go.wait(5)
        ended.append(True)
    task = asyncio.create_task(current_loop().in_thread(work))
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go.set()
    try:
        await task
    except asyncio.CancelledError:
        assert ended
    else:
        raise SystemExit("not cancelled")

asyncio.run(main())
assert "anyio" not in sys.modules
"""


def test_uncancelled_work_survives_where_anyio_is_not_loaded() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_ANYIO], check=True)


def test_worker_threads_are_apart_from_the_programs_and_end_with_the_last_adapter() -> None:
    async def main() -> None:
        blocked = threading.Event()
        # More than asyncio's own executor has threads.
        others = [asyncio.create_task(asyncio.to_thread(blocked.wait, 30)) for _ in range(40)]
        try:
            async with asyncio.timeout(30):
                worker = await current_loop().in_thread(threading.current_thread)
            assert not blocked.is_set()
        finally:
            blocked.set()
            await asyncio.wait(others)
        gc.collect()
        await asyncio.to_thread(worker.join, 30)
        assert not worker.is_alive()

    asyncio.run(main())
