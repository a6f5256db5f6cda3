"""Whose turn it is: the exits of all machines of one event loop, served one after the other.

A machine whose doorbell rings is *watched* from then on: it is looked at, by polling, until nothing has come
from it for as long as its window is, and its vCPUs need not ring again (exits.c has the windows). Whoever
polls lets the loop have a turn every `SLICE_NS`, and looks at the machines in turn, so no guest keeps the
loop from another's exit, timer or socket.

The polling is done by a task, the *leader*, because a device's handler may be a coroutine: it is run by the
leader as if it had been awaited there. One that never suspends costs no task. When one does suspend, the
leader becomes the task of that handler: what a handler has entered in its first step, a cancel scope for
instance, stays with the task that entered it. If something else is watched another leader is made. If not,
doorbells are needed again until the handler has ended, and then its task goes on as the leader. There is a
leader only while something is watched for longer than a slice, or answered by a coroutine; else the callback
of the doorbell serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Any
from weakref import ref

from anyio.lowlevel import RunVar

from aiokvm._core import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop, Task
    from aiokvm.machine.exits import Exits

    Work = Coroutine[Any, Any, None]

# How long exits are served before the loop looks at what else there is. The loop's own turn takes some 20 us.
SLICE_NS = 300_000
# How many exits are taken at once: enough that the call's costs are shared.
BATCH = 32


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
        self._watched: list[Exits] = []
        self._cores: Pointer = ffi.new("struct aiokvm_machine *[]", 8)
        self._which: Pointer = ffi.new("size_t *")
        # What was taken and has not been served yet: of which machine, from where to where.
        self._news: Pointer = ffi.new("struct aiokvm_news[]", BATCH)
        self._news_bytes = ffi.buffer(self._news)
        self._serving: Exits | None = None
        self._next = 0
        self._end = 0
        self._leader: Task | None = None
        self._handlers = 0
        self._first: Work | None = None

    @staticmethod
    def of(loop: Loop) -> Turn:
        """The turn of the loop that runs the caller."""
        reference = _turn.get(None)
        turn = reference() if reference else None
        if turn is None:
            turn = Turn(loop)
            _turn.set(ref(turn))
        return turn

    def watch(self, exits: Exits) -> None:
        """A machine's doorbell has rung."""
        if exits not in self._watched:
            self._watched.append(exits)
            self._publish()
        if self._leader is None:
            try:
                self._first = self._step(lib.aiokvm_now_ns() + SLICE_NS)
            except BaseException:
                # A device asked for the program's end: SystemExit, KeyboardInterrupt.
                self._unwatch()
                raise
            if self._first is not None or self._watched:
                self._lead()

    def forget(self, exits: Exits) -> None:
        """A machine is about to be freed."""
        if self._serving is exits:
            self._end = 0
            self._serving = None
        if exits in self._watched:
            self._watched.remove(exits)
            self._publish()

    def _lead(self) -> None:
        self._leader = self._loop.spawn(self._run, "aiokvm exits")

    async def _run(self) -> None:
        me = self._leader
        slice_end_ns = lib.aiokvm_now_ns() + SLICE_NS
        try:
            while True:
                work, self._first = self._first or self._step(slice_end_ns), None
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
                elif self._watched:
                    await self._loop.turn()
                    slice_end_ns = lib.aiokvm_now_ns() + SLICE_NS
                else:
                    break
        finally:
            if self._leader is me:
                # At its end, or cancelled with the whole loop.
                self._leader = None
                self._unwatch()

    def _unwatch(self) -> None:
        """Nobody looks any more: the doorbells are needed again."""
        for exits in self._watched:
            exits.unwatch()
        self._watched.clear()

    def _suspended(self, task: Task | None, serving: Exits) -> None:
        assert task is not None
        self._handlers += 1
        serving.on_suspended(task)
        if self._next < self._end or self._watched != [serving]:
            self._lead()
        else:
            # Nothing may come before the handler has gone on; what does, rings.
            self._leader = None
            self._unwatch()

    def _lead_again(self, task: Task | None, served: Exits) -> bool:
        """Whether the task of a handler that has ended becomes the leader, for there is none."""
        if self._leader is not None or not served.watch():
            return False
        self._leader = task
        self._watched.append(served)
        self._publish()
        return True

    def _step(self, slice_end_ns: int) -> Work | None:
        """Serve until a device answers by a coroutine, the slice is over, or nothing is watched any more."""
        while True:
            while self._next < self._end:
                news = _NEWS.unpack_from(self._news_bytes, self._next * _NEWS.size)
                self._next += 1
                assert self._serving is not None
                work = self._serving.serve(news)
                if work is not None:
                    return work
            # A handler that has suspended may be about to go on: no waiting then, only a look.
            if not self._watched or (not self._take(0 if self._handlers else slice_end_ns)):
                return None

    def _take(self, deadline_ns: int) -> bool:
        """Take news, waiting for it until the deadline; False if there is none.

        Machines from which none came for too long are no longer watched.
        """
        watched = self._watched
        while watched:
            count = lib.aiokvm_serve(self._cores, len(watched), deadline_ns, self._news, BATCH, self._which)
            index = self._which[0]
            if count > 0:
                self._serving = watched[index]
                self._next, self._end = 0, count
                return True
            if count < 0:
                # A child of fork, which has inherited the loop, and none of the machines.
                watched.clear()
            elif index < len(watched):
                del watched[index]
                self._publish()
            else:
                return False
        return False

    def _publish(self) -> None:
        watched = self._watched
        if len(watched) > len(self._cores):
            self._cores = ffi.new("struct aiokvm_machine *[]", 2 * len(watched))
        for index, exits in enumerate(watched):
            self._cores[index] = exits.core


# Its machines keep it. Kept here it would keep the loop, by which alone anyio knows when to forget it.
_turn: RunVar[ref[Turn] | None] = RunVar("aiokvm_turn")
