"""Who holds the event loop up: a thread that asks the loop for a sign of life, and looks when none comes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from anyio import to_thread

from aiokvm.aio import current_loop
from aiokvm.aio.steps import HoldUp, ThreadClock
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError
from aiokvm.logs import SeldomLogger
from aiokvm.text import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from aiokvm.aio.loop import Loop

logger = get_logger("aiokvm.aio")


class Watchdog:
    """Names the coroutine or callback that holds the event loop up; an asynchronous context manager.

    A warning is logged, once a hold-up, when the loop has given no sign of life for ``threshold`` seconds;
    ``callback`` is then called, too, in the watchdog's thread. What lasts twice as long is always noticed.
    It costs the loop one callback every ``threshold`` seconds. Raises ConfigError for a threshold that is not
    above 0, or infinite.

    A C function that does not release Python's global lock keeps the watchdog waiting as well, and may be
    over when it looks.
    """

    @checked
    def __init__(self, threshold: float = 0.1, callback: Callable[[HoldUp], object] | None = None) -> None:
        if not 0 < threshold <= threading.TIMEOUT_MAX:
            raise ConfigError(
                f"a threshold of {threshold} seconds is not above 0, or is more than a clock has"
            )
        self._threshold = threshold
        self._callback = callback
        self._log = SeldomLogger(logger)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        await anyio.lowlevel.checkpoint()
        self._stopped.clear()
        self._thread = threading.Thread(
            target=self._watch,
            args=(current_loop(), ThreadClock()),
            name="aiokvm watchdog",
            daemon=True,
        )
        self._thread.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._thread is not None
        self._stopped.set()
        # The thread waits for the loop at most, which runs.
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self._thread.join)

    def _watch(self, loop: Loop, clock: ThreadClock) -> None:
        while not self._stopped.wait(self._threshold):
            alive = threading.Event()
            try:
                before_ns = clock.now_ns()
                loop.call_soon_threadsafe(alive.set)
            except (OSError, RuntimeError):  # the thread has ended, or the loop is closed
                return
            if alive.wait(self._threshold):
                continue
            task, stack = loop.running_task(), clock.stack()
            if not stack:
                return
            try:
                cpu_seconds = (clock.now_ns() - before_ns) / 1e9
            except OSError:  # the thread has ended
                return
            # Else it went on before all this was read.
            if not alive.is_set():
                self._tell(HoldUp(self._threshold, task, stack, cpu_seconds))
            while not (alive.wait(self._threshold) or self._stopped.is_set()):
                pass

    def _tell(self, hold_up: HoldUp) -> None:
        self._log.warning(
            "%s has held the event loop up for %g s (%.3f s of CPU time):\n%s",
            f"task {hold_up.task}" if hold_up.task else "a callback",
            hold_up.seconds,
            hold_up.cpu_seconds,
            hold_up.stack.rstrip(),
        )
        if self._callback is not None:
            try:
                self._callback(hold_up)
            except Exception:
                self._log.exception("exception in the watchdog's callback")
