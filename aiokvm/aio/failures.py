"""What callbacks and tasks raise: logged, ever so seldom, for what a guest does may be what raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.logs import SeldomLogger
from aiokvm.text import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

log = SeldomLogger(get_logger("aiokvm.aio"))


def task_failed(name: str) -> None:
    """What runs by itself under this name has raised the exception that is being handled."""
    log.exception("exception in %s", name)


def call(callback: Callable[[], object]) -> None:
    """Call it. asyncio would log each exception, without a limit, and trio would end the whole run."""
    try:
        callback()
    except Exception:
        log.exception("exception in callback %r", callback)
