"""Logging what a guest can bring about as often as it likes."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from aiokvm.budget import LOG_LINES, Share
from aiokvm.ratelimit import Limit

if TYPE_CHECKING:
    from collections.abc import Callable

    Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]

# Records of one kind: so many at once, then one a second.
BURST = 10
# What one counts as at most, of the process's lines, so that none is too long to be logged ever.
MOST_LINES = 100


class SeldomLogger:
    """A logger of what a guest or a peer causes: ten records at once, then one a second, at most its share.

    Each machine or backend has its own, and one more for each kind of record that must not hide the others
    (`kind`). All of them share the process's budget of lines, those of tracebacks included, of which one
    machine or backend has one share: one that is flooded leaves lines to the others. A record says how many
    before it were left out.
    """

    def __init__(
        self, logger: Logger, now_ns: Callable[[], int] = time.monotonic_ns, share: _Share | None = None
    ) -> None:
        self._logger = logger
        self._now_ns = now_ns
        self._limit = Limit(operations_per_second=1, burst_operations=BURST - 1)
        self._share = share or _Share()
        self._left_out = 0

    @property
    def always(self) -> Logger:
        """For lines that the program causes by itself, and no guest."""
        return self._logger

    def kind(self) -> SeldomLogger:
        """One for another kind of record, which has ten of its own but the same share."""
        return SeldomLogger(self._logger, self._now_ns, self._share)

    def log(self, level: int, message: str, *args: object, exc_info: Any = None) -> None:
        """As `logging.Logger.log`, or nothing."""
        if not self._logger.isEnabledFor(level):
            return
        if self._limit.take(self._now_ns(), 0) or not self._share.take(_lines(message, args, exc_info)):
            self._left_out += 1
            return
        if self._left_out:
            message += " (%d more before this one were left out)"
            args = (*args, self._left_out)
            self._left_out = 0
        self._logger.log(level, message, *args, exc_info=exc_info)

    def debug(self, message: str, *args: object) -> None:
        """The same for who looks for a fault."""
        self.log(logging.DEBUG, message, *args)

    def info(self, message: str, *args: object) -> None:
        """The same as information."""
        self.log(logging.INFO, message, *args)

    def warning(self, message: str, *args: object) -> None:
        """The same as a warning."""
        self.log(logging.WARNING, message, *args)

    def error(self, message: str, *args: object, exc_info: Any = None) -> None:
        """The same as an error."""
        self.log(logging.ERROR, message, *args, exc_info=exc_info)

    def exception(self, message: str, *args: object) -> None:
        """The same as an error, with the exception that is being handled."""
        self.log(logging.ERROR, message, *args, exc_info=True)


class _Share:
    """Of the process's lines. Whoever logs nothing has none."""

    def __init__(self) -> None:
        self._share: Share | None = None

    def take(self, lines: int) -> bool:
        if self._share is None:
            self._share = Share(LOG_LINES)
        return self._share.take(lines)


def _lines(message: str, args: tuple[object, ...], exc_info: Any) -> int:
    """How many lines a record is, with its traceback: an exception's, or that which is being handled."""
    error = exc_info if isinstance(exc_info, BaseException) else sys.exception() if exc_info else None
    try:
        text = message % args if args else message
    except Exception:  # for the handlers, which tell it, and do not raise
        text = message
    trace = traceback.format_exception(error) if error else ()
    return min(1 + text.count("\n") + sum(part.count("\n") for part in trace), MOST_LINES)
