"""Whose turn it is: the exits of all machines of one event loop, served one after the other.

All machines of a loop share a doorbell. When it rings the loop *watches* from then on: it looks at what has
come, by polling, until nothing has for as long as the windows of the machines are (turn.c), and no vCPU need
ring again. Whoever serves looks at the clock after each exit and lets the loop have a turn every `SLICE_NS`,
and the machine whose news has waited for longest is the next, so no guest keeps the loop from another's exit,
timer or socket. While the loop's turns find nothing to do it has them more seldom, every `LONG_SLICE_NS`.

The polling is done by a task, the *leader*, because a device's handler may be a coroutine: it is run by the
leader as if it had been awaited there. One that never suspends costs no task. When one does suspend, the
leader becomes the task of that handler: what a handler has entered in its first step, a cancel scope for
instance, stays with the task that entered it. If there is more to serve another leader is made. If not, the
doorbell is needed again until the handler has ended, and then its task goes on as the leader. There is a
leader only while the loop watches for longer than a slice, or a coroutine answers; else the callback of the
doorbell serves.
"""

from __future__ import annotations

import enum
import errno
import os
import time
from dataclasses import dataclass
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from aiokvm._core import ffi, lib
from aiokvm.errors import AiokvmError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from aiokvm._core import Pointer
    from aiokvm.aio import Handle, Loop, Task
    from aiokvm.machine.exits import Exits

    Work = Coroutine[Any, Any, None]

# How long exits are served before the loop looks at what else there is. The loop's own turn takes some 20 us.
SLICE_NS = 300_000
# The same while the loop has nothing else to do: an exit that comes while the loop has its turn waits for it,
# and this makes such exits fewer than one in a hundred.
LONG_SLICE_NS = 2_000_000
# A turn that takes less has found nothing to do.
_QUIET_TURN_NS = 150_000
# How many exits are taken at once: enough that the call's costs are shared.
BATCH = 32

# CLOCK_MONOTONIC, as aiokvm_now_ns, at a third of a call's cost.
_now_ns = time.monotonic_ns


class Slice:
    """How long something may keep the loop at a time."""

    __slots__ = ("end_ns", "length_ns")

    def __init__(self) -> None:
        self.length_ns = SLICE_NS
        self.begin()

    def begin(self) -> None:
        """The loop has had a turn."""
        self.end_ns = _now_ns() + self.length_ns

    def begin_after(self, turn_ns: int) -> None:
        """The same; the turn took so long, which tells whether others wait for theirs."""
        if turn_ns < _QUIET_TURN_NS:
            self.length_ns = min(2 * self.length_ns, LONG_SLICE_NS)
        else:
            self.length_ns = SLICE_NS
        self.begin()

    def is_over(self) -> bool:
        """Whether the loop is to have a turn now."""
        return _now_ns() >= self.end_ns


# struct aiokvm_news. A field's attribute costs more than all of them in one call.
_NEWS = Struct("=IIIiIIQQIIII")
assert _NEWS.size == ffi.sizeof("struct aiokvm_news")


@dataclass(frozen=True, slots=True)
class News:
    """What a vCPU has to tell: the fields of ``struct aiokvm_news`` in their order."""

    vcpu: int
    state: int
    seq: int
    error: int
    reason: int
    region: int
    offset: int
    value: int
    size: int
    count: int
    is_write: int
    bus: int


class Unfinished(enum.Enum):
    """See `UNFINISHED`."""

    UNFINISHED = enum.auto()


UNFINISHED: Final = Unfinished.UNFINISHED
"""What serving news gives that takes longer than a slice: it is served again, and goes on where it was."""


class _Inline:
    """Awaits a coroutine, and says so if it suspends: once, before it does."""

    def __init__(self, work: Work, on_suspend: Callable[[], None]) -> None:
        self._work = work
        self._on_suspend = on_suspend

    def __await__(self) -> Generator[Any, Any, None]:
        work = self._work
        try:
            wanted = work.send(None)
        except StopIteration:
            return
        self._on_suspend()
        while True:
            # As "yield from", which cannot take over a coroutine that has begun.
            try:
                answer = yield wanted
            except GeneratorExit:
                work.close()
                raise
            except BaseException as error:
                step: Callable[[], Any] = _thrower(work, error)
            else:
                step = _sender(work, answer)
            try:
                wanted = step()
            except StopIteration:
                return


def _thrower(work: Work, error: BaseException) -> Callable[[], Any]:
    return lambda: work.throw(error)


def _sender(work: Work, answer: Any) -> Callable[[], Any]:
    return lambda: work.send(answer)


class Turn:
    """Serves the machines of one loop. `of` gives the loop's own."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        # There is one as long as there are machines.
        self._core: Pointer | None = None
        self._doorbell: Handle | None = None
        self._machines: dict[int, Exits] = {}
        self._last_id = 0
        self._watching = False
        self._which: Pointer = ffi.new("uint32_t *")
        # What was taken and has not been served yet: of which machine, from where to where.
        self._news: Pointer = ffi.new("struct aiokvm_news[]", BATCH)
        self._news_bytes = ffi.buffer(self._news)
        self._serving: Exits | None = None
        self._next = 0
        self._end = 0
        self._leader: Task | None = None
        self._handlers = 0
        self._first: Work | None = None
        self.slice = Slice()

    @staticmethod
    def of(loop: Loop) -> Turn:
        """The loop's turn. Its machines keep it."""
        turn: Turn | None = loop.shared.get(Turn)
        if turn is None:
            turn = loop.shared[Turn] = Turn(loop)
        return turn

    def add(self, exits: Exits) -> tuple[int, Pointer]:
        """Serve a machine from now on; its core is made with this id and turn.

        Raises AiokvmError if the host has no descriptor left.
        """
        if self._core is None:
            code = ffi.new("int *")
            core = lib.aiokvm_turn_new(code)
            if not core:
                error = OSError(code[0], os.strerror(code[0]))
                raise AiokvmError(f"cannot make a doorbell: {error.strerror}") from error
            self._core = core
            self._doorbell = self._loop.watch(lib.aiokvm_turn_doorbell(core), self._on_doorbell)
        while True:
            self._last_id = (self._last_id + 1) % (1 << 32)
            if self._last_id not in self._machines:
                break
        self._machines[self._last_id] = exits
        return self._last_id, self._core

    def forget(self, number: int) -> None:
        """A machine has been freed."""
        exits = self._machines.pop(number)
        if self._serving is exits:
            self._end = 0
            self._serving = None
        if not self._machines and self._doorbell is not None and self._core is not None:
            self._doorbell.cancel()
            self._doorbell = None
            lib.aiokvm_turn_free(self._core)
            self._core = None
            self._watching = False

    def _on_doorbell(self) -> None:
        # It fails in a child of fork, which has inherited the loop, and none of the machines.
        if self._core is None or lib.aiokvm_turn_answer(self._core) < 0:
            return
        self._watching = True
        if self._leader is None:
            try:
                self.slice.begin()
                self._first = self._step()
            except BaseException:
                # A device asked for the program's end: SystemExit, KeyboardInterrupt.
                self._unwatch()
                raise
            if self._first is not None or self._watching:
                self._lead()

    def _lead(self) -> None:
        self._leader = self._loop.spawn(self._run, "aiokvm exits")

    async def _run(self) -> None:
        me = self._leader
        self.slice.begin()
        try:
            while True:
                work, self._first = self._first or self._step(), None
                if work is not None:
                    serving = self._serving
                    assert serving is not None
                    try:
                        await _Inline(work, partial(self._suspended, me, serving))
                    finally:
                        if self._leader is not me:
                            self._handlers -= 1
                            serving.on_finished(me)
                    if self._leader is not me and not self._lead_again(me, serving):
                        return
                    if not self.slice.is_over():
                        continue
                elif not (self._watching or self._next < self._end):
                    break
                began_ns = _now_ns()
                await self._loop.turn()
                self.slice.begin_after(_now_ns() - began_ns)
        finally:
            if self._leader is me:
                # At its end, or cancelled with the whole loop.
                self._leader = None
                self._unwatch()

    def _unwatch(self) -> None:
        """Nobody looks any more: the doorbell is needed again."""
        self._watching = False
        if self._core is not None:
            lib.aiokvm_turn_unwatch(self._core)

    def _suspended(self, task: Task | None, serving: Exits) -> None:
        assert task is not None
        self._handlers += 1
        serving.on_suspended(task)
        if self._next < self._end or (self._core is not None and lib.aiokvm_turn_ready(self._core)):
            self._lead()
        else:
            # Nothing may come before the handler has gone on; what does, rings.
            self._leader = None
            self._unwatch()

    def _lead_again(self, task: Task | None, served: Exits) -> bool:
        """Whether the task of a handler that has ended becomes the leader, for there is none."""
        if self._leader is not None or self._core is None or not served.is_open:
            return False
        if lib.aiokvm_turn_watch(self._core, served.core) < 0:
            return False
        self._leader = task
        self._watching = True
        return True

    def _step(self) -> Work | None:
        """Serve until a device answers by a coroutine, the slice is over, or nothing is watched any more."""
        while True:
            while self._next < self._end:
                news = _NEWS.unpack_from(self._news_bytes, self._next * _NEWS.size)
                self._next += 1
                assert self._serving is not None
                work = self._serving.serve(news)
                if work is UNFINISHED:
                    self._next -= 1
                    return None
                if work is not None:
                    return work
                if _now_ns() >= self.slice.end_ns:
                    return None
            # A handler that has suspended may be about to go on: no waiting then, only a look.
            if not self._watching or not self._take(0 if self._handlers else self.slice.end_ns):
                return None

    def _take(self, deadline_ns: int) -> bool:
        """Take news, waiting for it until the deadline; False if there is none."""
        if self._core is None:
            return False
        count = lib.aiokvm_serve(self._core, deadline_ns, self._news, BATCH, self._which)
        if count > 0:
            self._serving = self._machines[self._which[0]]
            self._next, self._end = 0, count
            return True
        # The deadline has come. If not, every window is over, or this is a child of fork.
        self._watching = count == -errno.EAGAIN
        return False
