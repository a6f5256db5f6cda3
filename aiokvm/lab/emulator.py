"""The program that emulates the lab's machine: its output while it runs, its last words if it dies."""

from __future__ import annotations

import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from aiokvm.errors import LabError
from aiokvm.images.process import child

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

CONSOLE = "console"
"""The file in the machine's folder that gets what its kernel says."""

_STDERR = "stderr"
_LINES = 15


@asynccontextmanager
async def beside(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run ``work`` while the block runs. What either raises is raised as it is, not in a group."""
    failed: Exception | None = None

    async def guarded() -> None:
        nonlocal failed
        try:
            await work()
        except Exception as error:
            failed = error
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(guarded)
        try:
            yield
        except Exception as error:
            failed = error
        tasks.cancel_scope.cancel()
    if failed:
        raise failed


async def emulate(
    argv: Sequence[str],
    folder: Path,
    output: Callable[[bytes], Awaitable[None] | None],
) -> int:
    """Run an emulator in ``folder`` to its end, its standard error in a file there; return its exit status.

    ``output`` gets its standard output as it comes, and is waited for.
    """
    with (folder / _STDERR).open("wb") as stderr:
        async with child(argv, stderr=stderr, cwd=folder) as process:
            assert process.stdout is not None
            async for chunk in process.stdout:
                result = output(chunk)
                if inspect.isawaitable(result):
                    await result
            return await process.wait()


def died(how: str, folder: Path) -> LabError:
    """Return the error of a machine that ended too early, with the last that it said in ``folder``."""
    lines = [*_read(folder / _STDERR).splitlines(), *_read(folder / CONSOLE).splitlines()]
    told = "its last words:" if lines else "it has said nothing"
    return LabError(f"the lab's machine {how} before the command had ended; {told}", *lines[-_LINES:])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
