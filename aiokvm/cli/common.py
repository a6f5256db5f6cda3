"""What the commands share: exit statuses, messages, signals, sizes."""

from __future__ import annotations

import logging
import signal
from contextlib import contextmanager, suppress
from errno import ENOENT
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import anyio
import click

from aiokvm import AiokvmError, ConfigError
from aiokvm.size import parse_size
from aiokvm.text import printable_lines

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from anyio.abc import TaskStatus

# As timeout(1) and the shell have them; 75 is EX_TEMPFAIL of sysexits.h: run it again.
STATUS_RESET = 75
STATUS_TIMEOUT = 124
STATUS_FAILED = 125
STATUS_CRASH = 128 + signal.SIGABRT
STATUS_KVM_ERROR = 135
STATUS_INTERRUPTED = 128 + signal.SIGINT
STATUS_BROKEN_PIPE = 128 + signal.SIGPIPE


def size(text: str) -> int:
    """Return the bytes of a number with K, M, G or T: a parameter type. A usage error for anything else."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None


def seconds(text: str) -> float:
    """Return a time above 0: a parameter type. A usage error for anything else."""
    with suppress(ValueError):
        if (number := float(text)) > 0:  # which NaN is not
            return number
    raise click.BadParameter(f"{text!r} is no number of seconds above 0")


def say(text: str) -> None:
    """Tell the user something, on standard error."""
    click.echo(f"aiokvm: {printable_lines(text)}", err=True)


class Warnings(logging.Handler):
    """Shows what the library logs; ``raw`` while the terminal does not turn LF into CR LF."""

    raw = False

    def __init__(self, level: int, on_stderr: bool = True) -> None:
        super().__init__(level)
        self._on_stderr = on_stderr

    def emit(self, record: logging.LogRecord) -> None:
        text = f"aiokvm: {printable_lines(self.format(record))}\n"
        click.echo(text.replace("\n", "\r\n") if self.raw else text, nl=False, err=self._on_stderr)


def execute(work: Callable[[Interrupts], Awaitable[int]]) -> int:
    """Run ``work`` on asyncio and return the exit status, which is its result unless a signal ended it.

    An error of aiokvm's own is one message on standard error and `STATUS_FAILED`. BrokenPipeError if nobody
    reads the output any more.
    """

    async def interruptible() -> int:
        interrupts = Interrupts()
        status = STATUS_FAILED
        with ungrouped():
            async with anyio.create_task_group() as tasks:
                await tasks.start(interrupts.watch, tasks.cancel_scope)
                status = await work(interrupts)
                tasks.cancel_scope.cancel()
        return interrupts.status or status

    options = {"use_uvloop": True} if find_spec("uvloop") else {}
    try:
        return anyio.run(interruptible, backend="asyncio", backend_options=options)
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        raise  # main() answers it for all commands
    except (AiokvmError, OSError) as error:
        say(describe(error))
        return STATUS_FAILED


def describe(error: Exception) -> str:
    """Return an error's message for people."""
    if isinstance(error, OSError) and not isinstance(error, AiokvmError):
        if error.errno == ENOENT and not error.filename:
            return "the current directory does not exist any more"
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)


class Interrupts:
    """Ends the work at SIGINT, SIGTERM and SIGHUP: with ``gently`` at the first, if set; else at once."""

    def __init__(self) -> None:
        self.status: int | None = None
        """128 + the first signal; None if there was none."""
        self.gently: Callable[[], Coroutine[Any, Any, object]] | None = None

    async def watch(
        self, scope: anyio.CancelScope, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Cancel ``scope`` at a signal; to be started as a task."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            async with anyio.create_task_group() as tasks:
                async for number in signals:
                    gently = self.gently if self.status is None else None
                    self.status = self.status or 128 + number
                    if gently is None:
                        scope.cancel()
                        return
                    tasks.start_soon(gently)


@contextmanager
def ungrouped() -> Iterator[None]:
    """Around a task group: its only error comes out as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
