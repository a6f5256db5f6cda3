"""How long the virtio devices of all machines of a loop keep it at a time, whichever queues are notified."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from aiokvm.machine.turn import SLICE_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.aio import Loop

_now_ns = time.monotonic_ns
# The loop has had a turn since, for nothing else lasts as long.
_PAUSE_NS = 4 * SLICE_NS


class LoopShare:
    """Serves at once while there is time, and what is left in later turns of the loop, in order.

    A device bounds what it does for one queue; this bounds what all of them do before the loop looks at
    anything else. `of` gives the loop's own.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], object]] = deque()
        self._spent_ns = 0
        self._last_ns = 0
        # Whether `_turned` is to be called.
        self._called = False

    @staticmethod
    def of(loop: Loop) -> LoopShare:
        """The loop's share. Its machines keep it, as they do their turn."""
        share: LoopShare | None = loop.shared.get(LoopShare)
        if share is None:
            share = loop.shared[LoopShare] = LoopShare(loop)
        return share

    def serve(self, work: Callable[[], object]) -> None:
        """Do it now, or as soon as there is time. It must not raise."""
        if self._waiting or self._spent_ns >= SLICE_NS:
            self.later(work)
            return
        now_ns = _now_ns()
        if now_ns - self._last_ns > _PAUSE_NS:
            self._spent_ns = 0
        self._do(work, now_ns)
        # Most kicks take a few microseconds: calling back for each would cost more.
        if self._spent_ns > SLICE_NS // 4:
            self._call()

    def later(self, work: Callable[[], object]) -> None:
        """Do it after the loop has looked at what else there is."""
        self._waiting.append(work)
        self._call()

    def _call(self) -> None:
        if not self._called:
            self._called = True
            self._loop.call_soon(self._turned)

    def _turned(self) -> None:
        self._called = False
        self._spent_ns = 0
        # What is called for meanwhile is for the next turn.
        for _ in range(len(self._waiting)):
            self._do(self._waiting.popleft(), _now_ns())
            if self._spent_ns >= SLICE_NS:
                break
        if self._waiting:
            self._call()

    def _do(self, work: Callable[[], object], now_ns: int) -> None:
        work()
        self._last_ns = _now_ns()
        self._spent_ns += self._last_ns - now_ns
