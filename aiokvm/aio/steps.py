"""What each step of an event loop takes of its thread's CPU time.

A step is what the loop does without looking at anything else: a callback, or a task from one await to the
next. CPU time is measured, because on a busy host any step may last long without anybody's doing.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self


@dataclass(frozen=True, slots=True)
class HoldUp:
    """The loop looked at nothing else for ``seconds``.

    ``cpu_seconds`` is the CPU time that its thread took of them: much less says that it waited, for a lock, a
    system call or a CPU. ``task`` is the name of the task that ran then, empty for a callback or the loop
    itself. ``stack`` is what the loop's thread was doing, as a traceback has it, the innermost call last.
    """

    seconds: float
    task: str
    stack: str
    cpu_seconds: float = 0.0


class ThreadClock:
    """The CPU time of a thread, the caller's own unless told otherwise, from any thread."""

    def __init__(self, ident: int | None = None) -> None:
        self.ident = threading.get_ident() if ident is None else ident
        self._clock = time.pthread_getcpuclockid(self.ident)

    def now_ns(self) -> int:
        """How much CPU time the thread has had. Raises OSError when it has ended."""
        return time.clock_gettime_ns(self._clock)

    def stack(self) -> str:
        """What the thread runs at this moment, as a traceback has it; empty if it runs no Python."""
        frame = sys._current_frames().get(self.ident)
        return "".join(traceback.format_stack(frame)) if frame else ""


class StepMeter:
    """Measures the steps of one loop; a context manager. ``begin`` and ``end`` are called around each.

    A step that has taken ``threshold`` seconds of CPU time is told to ``on_hold_up`` when it has ended, on
    the loop's thread. ``worst`` is the longest of all, None before the first; ``steps`` counts them. What
    collects garbage counts as the step's in which it happens: the loop waits for it. It takes long where a
    program has many objects, of which `gc.freeze` keeps it off.

    A thread looks at what a step does when it has taken half of the threshold: that is the stack of the
    `HoldUp`. What holds Python's global lock keeps that thread waiting, and the stack may then be empty, or
    of a moment after.
    """

    def __init__(self, threshold: float = 0.05, on_hold_up: Callable[[HoldUp], object] | None = None) -> None:
        self.steps = 0
        self.worst: HoldUp | None = None
        self._threshold_ns = int(threshold * 1e9)
        self._on_hold_up = on_hold_up
        self._depth = 0
        self._clock: ThreadClock | None = None
        self._began_ns = self._began_at_ns = 0
        self._worst_ns = -1
        # Of the step of this number the thread has seen what it did.
        self._seen = 0
        self._stack = ""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._stopped.clear()
        self._thread = threading.Thread(target=self._look, name="aiokvm step meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._thread is not None
        self._stopped.set()
        self._thread.join()

    def begin(self) -> None:
        """A step begins, on the loop's thread. Steps within a step are part of it."""
        self._depth += 1
        if self._depth == 1:
            self.steps += 1
            self._began_at_ns = time.perf_counter_ns()
            self._began_ns = time.thread_time_ns()
            if self._clock is None or self._clock.ident != threading.get_ident():
                self._clock = ThreadClock()

    def end(self, step: object) -> None:
        """It has ended; ``step`` is the callback, or the task that it belongs to."""
        self._depth -= 1
        if self._depth > 0:
            return
        took_ns = time.thread_time_ns() - self._began_ns
        if took_ns > self._worst_ns or took_ns >= self._threshold_ns:
            self._long(took_ns, step)

    def _long(self, took_ns: int, step: object) -> None:
        took_at_ns = time.perf_counter_ns() - self._began_at_ns
        stack = self._stack if self._seen == self.steps else ""
        hold_up = HoldUp(took_at_ns / 1e9, _task_name(step), stack, took_ns / 1e9)
        if took_ns > self._worst_ns:
            self._worst_ns = took_ns
            self.worst = hold_up
        if took_ns >= self._threshold_ns and self._on_hold_up is not None:
            self._on_hold_up(hold_up)

    def _look(self) -> None:
        while not self._stopped.wait(self._threshold_ns / 4e9):
            clock, step, began_ns = self._clock, self.steps, self._began_ns
            if not self._depth or clock is None or self._seen == step:
                continue
            try:
                taken_ns = clock.now_ns() - began_ns
            except OSError:  # the loop's thread has ended
                continue
            if taken_ns >= self._threshold_ns // 2 and self._depth and step == self.steps:
                self._stack, self._seen = clock.stack(), step


def _task_name(step: object) -> str:
    # asyncio steps a task by a method of its own; trio tells the task.
    owner = getattr(step, "__self__", step)
    get_name = getattr(owner, "get_name", None)
    name = get_name() if get_name else getattr(owner, "name", "")
    return name if isinstance(name, str) else ""
