"""What aiokvm asks of an event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from weakref import WeakValueDictionary

T = TypeVar("T")


class Event(Protocol):
    """Something that happens once, and that tasks can wait for."""

    def set(self) -> None:
        """It has happened. Idempotent."""

    async def wait(self) -> object:
        """Returns when it has happened."""


class Handle(Protocol):
    """Something that the loop does until told not to."""

    def cancel(self) -> None:
        """Ends it; the callback is not called any more. Idempotent."""


class Task(Handle, Protocol):
    """A coroutine that runs by itself. Cancelling it does not wait for its end; awaiting `wait` does."""

    async def wait(self) -> None:
        """Returns when it has ended. Cancelling the wait leaves the task alone."""


class Loop(Protocol):
    """An event loop. All methods belong to its own thread, unless they say otherwise.

    Two that stand for the same loop are equal. Callbacks are plain functions. One that raises is logged by
    the loop and does not end it.
    """

    pid: int
    """The process that it runs in: a child of fork has only a copy."""
    shared: WeakValueDictionary[type, Any]
    """What there is one of on this loop, by its class, for as long as somebody else keeps it."""

    @property
    def cancelled(self) -> type[BaseException]:
        """What is raised in a task that is cancelled."""

    def is_here(self) -> bool:
        """Whether the caller runs on it, or in its thread while no loop runs there. From any thread."""

    def watch(self, fd: int, callback: Callable[[], object]) -> Handle:
        """Calls back whenever the descriptor is readable (level-triggered)."""

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Calls back once, after the loop has looked at its descriptors again."""

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        """The same, from any thread."""

    def call_at(self, deadline_ns: int, callback: Callable[[], object]) -> Handle:
        """Calls back once, when `now_ns` has reached the deadline."""

    def now_ns(self) -> int:
        """The loop's monotonic clock, in nanoseconds."""

    def spawn(self, work: Callable[[], Awaitable[None]], name: str) -> Task:
        """Runs a coroutine function on its own until it ends or is cancelled; an exception is logged.

        It begins after this has returned, whatever the loop's task factory is.
        """

    async def turn(self) -> None:
        """Returns when the loop has looked at everything else that is due."""

    def event(self) -> Event:
        """An event that has not happened yet."""

    def lock(self) -> AbstractAsyncContextManager[object]:
        """What one task has at a time; others wait for their turn. Entering a free one may not suspend."""

    async def within(self, seconds: float | None, work: Callable[[], Awaitable[T]]) -> T:
        """What work returns. Raises TimeoutError, with it cancelled, if it takes longer; None is for ever."""

    def being_cancelled(self) -> bool:
        """Whether the task that runs is cancelled, as opposed to something that it awaits."""

    def running_task(self) -> str:
        """From any thread: the name of the task that runs at this moment; empty if none does."""

    async def sleep_until(self, deadline_ns: int) -> None:
        """Returns when `now_ns` has reached the deadline."""

    async def uncancelled(self, work: Callable[[], Awaitable[T]]) -> T:
        """Runs work to its end whatever cancels the caller, and only then lets the cancellation through."""

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs a function that blocks in a worker thread, to its end whatever cancels the caller."""
