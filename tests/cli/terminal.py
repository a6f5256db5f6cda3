"""The command line on a terminal of its own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time
from select import select
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

# For a guest's shell: shows the size of its terminal now and at each change, as an editor or a pager does.
WATCH = b"""sh -c 'trap "stty size" WINCH; stty size; echo watch"ing"; while :; do sleep 0.1; done'\n"""


class Terminal:
    """The other side of a terminal, 24 rows high and 80 columns wide at first, on which the command runs."""

    def __init__(self, *argv: object) -> None:
        self.fd, self._theirs = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(self.fd)
        self._seen = b""
        # So that the terminal's signals are for it.
        argv = ("setsid", "--ctty", sys.executable, "-P", "-m", "aiokvm", *argv)
        self.process = subprocess.Popen(
            [*map(str, argv)], stdin=self._theirs, stdout=self._theirs, stderr=self._theirs
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._theirs)
        os.close(self.fd)

    def resize(self, rows: int, cols: int) -> None:
        """As a user does with a window."""
        termios.tcsetwinsize(self.fd, (rows, cols))

    def type(self, data: bytes) -> None:
        """Press keys."""
        os.write(self.fd, data)

    def expect(self, wanted: bytes, timeout: float = 60) -> bytes:
        """Wait until something is shown, and return what was up to its end."""
        deadline = time.monotonic() + timeout
        while wanted not in self._seen:
            if not select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {wanted!r}, but {self._seen!r}")
            self._seen += os.read(self.fd, 4096)
        before, found, self._seen = self._seen.partition(wanted)
        return before + found

    def is_raw(self) -> bool:
        """Whether every key is passed on as it is."""
        return not termios.tcgetattr(self.fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
