"""The adapter for trio."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import trio

from aiokvm.aio.failures import call, task_failed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from aiokvm.aio.loop import Event, Handle, Task
    from aiokvm.aio.steps import StepMeter

T = TypeVar("T")

# That callbacks which wait together keep the loop: one at least is called.
SLICE_NS = 300_000


class StepInstrument(trio.abc.Instrument):
    """Has ``meter`` measure all steps of a run: an instrument of `trio.run`.

    What several threads had called soon is one step, as trio looks at nothing else between the calls.
    """

    def __init__(self, meter: StepMeter) -> None:
        self._meter = meter

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        self._meter.begin()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._meter.end(task)


class _Callback:
    """A callback driven by a system task, which a cancel scope ends."""

    def __init__(
        self, wait: Callable[[], Awaitable[None]], callback: Callable[[], object], again: bool
    ) -> None:
        self._scope = trio.CancelScope()
        self._wait = wait
        self._callback = callback
        self._again = again
        trio.lowlevel.spawn_system_task(self._run)

    async def _run(self) -> None:
        with self._scope:
            # When it is cancelled, what it waits for may be gone, and its descriptor another's: before the
            # first wait, after any, and after the callback.
            while not self._is_cancelled():
                await self._wait()
                if self._is_cancelled():
                    return
                call(self._callback)
                if not self._again:
                    return

    def _is_cancelled(self) -> bool:
        return self._scope.cancel_called

    def cancel(self) -> None:
        self._scope.cancel()


class _Watch(_Callback):
    def __init__(self, fd: int, callback: Callable[[], object]) -> None:
        self._fd: int | None = fd

        async def readable() -> None:
            try:
                await trio.lowlevel.wait_readable(fd)
            except trio.ClosedResourceError:
                self._scope.cancel()

        super().__init__(readable, callback, again=True)

    def cancel(self) -> None:
        super().cancel()
        if self._fd is not None:
            # The owner closes the descriptor next, before the task has run again.
            trio.lowlevel.notify_closing(self._fd)
            self._fd = None


class _Soon:
    """Callbacks for the loop's next turn. Those of `run_sync_soon` are all called in one step."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._runs = False

    def add(self, callback: Callable[[], object]) -> None:
        self._waiting.append(callback)
        if not self._runs:
            trio.lowlevel.spawn_system_task(self._run)
            self._runs = True

    async def _run(self) -> None:
        try:
            while self._waiting:
                end_ns = time.monotonic_ns() + SLICE_NS
                # What is added meanwhile is for the turn after this one.
                for _ in range(len(self._waiting)):
                    call(self._waiting.popleft())
                    if time.monotonic_ns() >= end_ns:
                        break
                # It is cancelled when the run ends, with whatever calls itself again and again.
                await trio.lowlevel.checkpoint()
        finally:
            self._runs = False


class _Task:
    def __init__(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        self._scope = trio.CancelScope()
        self._work = work
        self._name = name
        self._ended = trio.Event()
        trio.lowlevel.spawn_system_task(self._run, name=name)

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._work()
        except Exception:
            task_failed(self._name)
        finally:
            self._ended.set()

    def cancel(self) -> None:
        self._scope.cancel()

    async def wait(self) -> None:
        await self._ended.wait()


_shared: trio.lowlevel.RunVar[WeakValueDictionary[type, Any]] = trio.lowlevel.RunVar("aiokvm_shared")


class TrioLoop:
    """See `Loop`."""

    cancelled = trio.Cancelled

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._root = trio.lowlevel.current_root_task()
        self._ident = threading.get_ident()
        self.pid = os.getpid()
        try:
            self.shared = _shared.get()
        except LookupError:
            self.shared = WeakValueDictionary()
            _shared.set(self.shared)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrioLoop) and other._token is self._token

    def __hash__(self) -> int:
        return hash(self._token)

    def is_here(self) -> bool:
        try:
            return trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            return threading.get_ident() == self._ident

    def watch(self, fd: int, callback: Callable[[], object]) -> Handle:
        return _Watch(fd, callback)

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._soon.add(callback)

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        self._token.run_sync_soon(call, callback)

    def call_at(self, deadline_ns: int, callback: Callable[[], object]) -> Handle:
        return _Callback(lambda: trio.sleep_until(deadline_ns / 1e9), callback, again=False)

    def now_ns(self) -> int:
        return int(trio.current_time() * 1e9)

    def spawn(self, work: Callable[[], Awaitable[None]], name: str) -> Task:
        return _Task(work, name)

    @cached_property
    def _soon(self) -> _Soon:
        soon: _Soon | None = self.shared.get(_Soon)
        if soon is None:
            soon = self.shared[_Soon] = _Soon()
        return soon

    async def turn(self) -> None:
        await trio.lowlevel.checkpoint()

    def event(self) -> Event:
        return trio.Event()

    def lock(self) -> AbstractAsyncContextManager[object]:
        return trio.Lock()

    async def within(self, seconds: float | None, work: Callable[[], Awaitable[T]]) -> T:
        try:
            with trio.fail_after(inf if seconds is None else max(0, seconds)):
                return await work()
        except trio.TooSlowError:
            raise TimeoutError from None

    def being_cancelled(self) -> bool:
        # trio has no other cancellation than that of a scope around the task.
        return trio.current_effective_deadline() == -inf

    def running_task(self) -> str:
        # trio tells the current task to its own thread only.
        tasks = [self._root] if self._root else []
        try:
            for task in tasks:
                if getattr(task.coro, "cr_running", False):
                    return task.name
                tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        except RuntimeError:  # tasks came or went meanwhile
            pass
        return ""

    async def sleep_until(self, deadline_ns: int) -> None:
        await trio.sleep_until(deadline_ns / 1e9)

    # A scope that nobody can cancel swallows nothing: the function always returns.
    async def uncancelled(self, work: Callable[[], Awaitable[T]]) -> T:  # type: ignore[return]
        with trio.CancelScope(shield=True):
            return await work()

    async def in_thread(self, work: Callable[[], T]) -> T:
        result = await self.uncancelled(lambda: trio.to_thread.run_sync(work))
        await trio.lowlevel.checkpoint_if_cancelled()
        return result
