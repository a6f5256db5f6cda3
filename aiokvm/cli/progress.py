"""How far a fetch is, on standard error: a bar on a terminal, a line a step elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from aiokvm.cli.common import say

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from aiokvm.images import Progress

_STAGES = {
    "wait": "waiting for another process",
    "index": "asking Debian for its package list",
    "download": "downloading",
    "unpack": "unpacking",
    "install": "installing packages",
    "build": "building",
}


class Fetching:
    """Shows each `Progress` that it is called with, while it is entered."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._step: tuple[str, str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Show it."""
        step = progress.name, progress.stage
        new = step != self._step
        self._step = step
        if sys.stderr.isatty():
            self._show_bar(progress, new)
        elif new:
            size = f" {progress.total_bytes / 1e6:.1f} MB" if progress.total_bytes else ""
            say(f"{progress.name}: {_STAGES[progress.stage]}{size}")

    def _show_bar(self, progress: Progress, new: bool) -> None:
        bars = self._bars or self._start_bars()
        if new or self._task is None:
            if self._task is not None:
                bars.remove_task(self._task)
            self._task = bars.add_task(f"{progress.name}: {_STAGES[progress.stage]}", total=None)
        bars.update(self._task, completed=progress.done_bytes, total=progress.total_bytes)

    def _start_bars(self) -> Bars:
        # Here, for most commands find everything in the cache.
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bars.start()
        return self._bars
