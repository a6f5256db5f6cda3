"""Regular expressions over what a guest prints: no pattern holds the loop, however it backtracks."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread
from anyio.lowlevel import RunVar

from aiokvm.errors import ConfigError

if TYPE_CHECKING:
    import re

    import regex

# That a search may keep the loop: most take microseconds.
ON_LOOP_SECONDS = 0.002
# That it may take on a thread after that. None is left running for longer, for threads cannot be cancelled.
ON_THREAD_SECONDS = 2.0
# Searches on threads at a time, of all consoles of a loop: what guests print is not to take the threads that
# the program and its machines have for everything else.
THREADS_MAX = 4


@lru_cache
def compiled(pattern: re.Pattern[bytes]) -> regex.Pattern[bytes]:
    """The same pattern for a matcher that can be interrupted, and lets other threads run."""
    # Loaded by programs that search only.
    import re

    import regex

    return regex.compile(pattern.pattern, pattern.flags & ~re.DEBUG)


async def search(pattern: regex.Pattern[bytes], text: bytes, begin: int) -> regex.Match[bytes] | None:
    """The first match that begins at ``begin`` or later.

    Raises ConfigError for a pattern that backtracks for so long that it would take seconds.
    """
    try:
        return pattern.search(text, begin, timeout=ON_LOOP_SECONDS)
    except TimeoutError:
        pass
    again = partial(pattern.search, text, begin, timeout=ON_THREAD_SECONDS, concurrent=True)
    try:
        return await to_thread.run_sync(again, abandon_on_cancel=True, limiter=_limiter())
    except TimeoutError:
        raise ConfigError(
            f"{pattern.pattern!r} backtracks: it takes more than {ON_THREAD_SECONDS:g} s on "
            f"{len(text)} bytes of output; make its repetitions exclude each other, or overlap smaller"
        ) from None


def _limiter() -> anyio.CapacityLimiter:
    limiter = _threads.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(THREADS_MAX)
        _threads.set(limiter)
    return limiter


_threads: RunVar[anyio.CapacityLimiter | None] = RunVar("aiokvm_search")
