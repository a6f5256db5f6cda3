"""The loop adapter: the only part of aiokvm that knows which event loop runs.

`current_loop` gives a `Loop` for the loop that runs the caller: asyncio with any of its event loops, uvloop
included, or trio. It holds what anyio has no words for, and the little that a machine needs to start: loading
anyio's back end takes longer than creating one. Structured concurrency is anyio's everywhere.
"""

from __future__ import annotations

import sys

from aiokvm.aio.loop import Event, Handle, Loop, Task

__all__ = ["Event", "Handle", "Loop", "Task", "current_loop"]


def current_loop() -> Loop:
    """The adapter of the event loop that runs the caller.

    Raises RuntimeError outside of a running loop.
    """
    # A program that runs on trio has imported it; importing it here would cost all others its start-up time.
    if "trio" in sys.modules:
        import trio

        if trio.lowlevel.in_trio_task():
            from aiokvm.aio.trio_loop import TrioLoop

            return TrioLoop()
    from aiokvm.aio.asyncio_loop import AsyncioLoop

    return AsyncioLoop()
