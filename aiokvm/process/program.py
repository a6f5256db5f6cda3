"""A program that runs beside an event loop.

Not by the loop's own way to start one: uvloop forks, which copies the page tables of the whole process and
holds the loop for 20 ms a GiB. `subprocess` has the child share the memory until it is another program.
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import ByteReceiveStream

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO


class Output(ByteReceiveStream):
    """What a program writes to its standard output."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return what comes next. Raises EndOfStream when all have closed it."""
        await anyio.wait_readable(self._pipe)
        data = os.read(self._pipe.fileno(), max_bytes)
        if not data:
            raise anyio.EndOfStream
        return data

    async def aclose(self) -> None:
        """Close it: a program that still writes gets SIGPIPE."""
        self._pipe.close()


class Process:
    """A program that has been started. ``stdout`` is there if its standard output is a pipe.

    Takes what `subprocess.Popen` does, and raises what that raises.
    """

    def __init__(self, argv: Sequence[str], **options: Any) -> None:
        self._popen = subprocess.Popen(argv, bufsize=0, **options)
        self.pid = self._popen.pid
        self.stdout = Output(self._popen.stdout) if self._popen.stdout else None

    @property
    def returncode(self) -> int | None:
        """Its status, or the signal that ended it below 0; None: it runs."""
        return self._popen.poll()

    def terminate(self) -> None:
        """Send it SIGTERM, if it runs."""
        self._popen.terminate()

    async def wait(self) -> int:
        """Return its status when it has ended."""
        while (status := self._popen.poll()) is None:
            # Nobody else asks for its status, so the number is its own until then.
            pidfd = os.pidfd_open(self.pid)
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        return status

    async def aclose(self) -> None:
        """Close its output, and return when it has ended."""
        if self.stdout:
            await self.stdout.aclose()
        await self.wait()
