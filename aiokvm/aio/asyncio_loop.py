"""The adapter for asyncio, with any event loop that implements its interface."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from aiokvm.aio.failures import call, task_failed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokvm.aio.loop import Event, Handle, Task
    from aiokvm.aio.steps import StepMeter

T = TypeVar("T")

# Of all machines of a loop. Those that are made or closed at once wait for the kernel, not for a CPU.
THREADS_MAX = 40


# What takes a callback, and at which place.
_TAKE_CALLBACKS = {
    "call_soon": 0,
    "call_soon_threadsafe": 0,
    "call_later": 1,
    "call_at": 1,
    "add_reader": 1,
    "add_writer": 1,
}


def measure_steps(loop: asyncio.AbstractEventLoop, meter: StepMeter) -> None:
    """Have ``meter`` measure what the loop is given from now on, for as long as the loop is.

    uvloop has no hook, and asyncio none that tells CPU time, so the callbacks are wrapped. What the loop does
    by itself is not seen: the reading and writing of its transports.
    """

    def wrapped(take: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            callback = args[at]

            def step(*given: Any) -> Any:
                meter.begin()
                try:
                    return callback(*given)
                finally:
                    meter.end(callback)

            return take(*args[:at], step, *args[at + 1 :], **named)

        return call

    for name, at in _TAKE_CALLBACKS.items():
        setattr(loop, name, wrapped(getattr(loop, name), at))


class _Watch:
    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], object]) -> None:
        self._loop = loop
        self._fd: int | None = fd
        loop.add_reader(fd, call, callback)

    def cancel(self) -> None:
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            self._fd = None


class _Task:
    def __init__(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        made = False

        async def run() -> None:
            if not made:
                # An eager task factory runs it at once; who spawns it has not got the task yet.
                await asyncio.sleep(0)
            try:
                await work()
            except Exception:
                task_failed(name)

        self._task = asyncio.create_task(run(), name=name)
        made = True

    def cancel(self) -> None:
        self._task.cancel()

    async def wait(self) -> None:
        await asyncio.wait([self._task])


class AsyncioLoop:
    """See `Loop`."""

    cancelled = asyncio.CancelledError

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ident = threading.get_ident()
        self.pid = os.getpid()
        # asyncio has no variables of a run, as trio has: it hangs off the loop itself.
        self.shared: WeakValueDictionary[type, Any] = vars(self._loop).setdefault(
            "_aiokvm_shared", WeakValueDictionary()
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncioLoop) and other._loop is self._loop

    def __hash__(self) -> int:
        return hash(self._loop)

    def is_here(self) -> bool:
        running = asyncio._get_running_loop()
        return running is self._loop or (running is None and threading.get_ident() == self._ident)

    def watch(self, fd: int, callback: Callable[[], object]) -> Handle:
        return _Watch(self._loop, fd, callback)

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._loop.call_soon(call, callback)

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call, callback)

    def call_at(self, deadline_ns: int, callback: Callable[[], object]) -> Handle:
        return self._loop.call_at(deadline_ns / 1e9, call, callback)

    def now_ns(self) -> int:
        return int(self._loop.time() * 1e9)

    def spawn(self, work: Callable[[], Awaitable[None]], name: str) -> Task:
        return _Task(work, name)

    async def turn(self) -> None:
        await asyncio.sleep(0)

    def event(self) -> Event:
        return asyncio.Event()

    def lock(self) -> AbstractAsyncContextManager[object]:
        return asyncio.Lock()

    async def within(self, seconds: float | None, work: Callable[[], Awaitable[T]]) -> T:
        async with asyncio.timeout(seconds):
            return await work()

    def being_cancelled(self) -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    def running_task(self) -> str:
        task = asyncio.current_task(self._loop)
        return task.get_name() if task else ""

    async def sleep_until(self, deadline_ns: int) -> None:
        await asyncio.sleep((deadline_ns - self.now_ns()) / 1e9)

    async def uncancelled(self, work: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await work()

        # anyio's scopes are kept off by the shield, asyncio's own cancel() by waiting for a task of its own.
        shield: AbstractContextManager[object] = nullcontext()
        # If nobody has loaded it, there are none.
        if "anyio" in sys.modules:
            import anyio

            shield = anyio.CancelScope(shield=True)
        task = asyncio.create_task(run())
        cancelled: asyncio.CancelledError | None = None
        with shield:
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError as error:
                    cancelled = error
        try:
            return task.result()
        finally:
            if cancelled is not None:
                raise cancelled

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await self.uncancelled(lambda: self._loop.run_in_executor(self._threads, work))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        # Not asyncio's own, which is small, and may be full of what blocks the program.
        threads: ThreadPoolExecutor | None = self.shared.get(ThreadPoolExecutor)
        if threads is None:
            threads = self.shared[ThreadPoolExecutor] = ThreadPoolExecutor(THREADS_MAX, "aiokvm")
        return threads
