"""What benchmarks that run a whole guest have in common."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import anyio

from aiokvm import AiokvmError, kvm, lab
from aiokvm.aio import current_loop
from aiokvm.kvm.probe import HARDWARE_RING0, ring0_speed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from aiokvm.aio.loop import Handle

MEMORY_MIB = 512
BOOT_SECONDS = 300
LAG_PROBE_NS = 10_000_000
# Of a Debian disk; a prompt of its own makes the end of a command's output known.
CMDLINE = "console=ttyS0 quiet loglevel=3 panic=-1 root=/dev/vda rw aiokvm.autologin"


class Shell:
    """A guest's console with a shell at its end."""

    def __init__(
        self, read: Callable[[], Awaitable[bytes]], write: Callable[[bytes], Awaitable[object]]
    ) -> None:
        self._read = read
        self._write = write
        self._seen = b""

    async def expect(self, pattern: bytes, seconds: float) -> re.Match[bytes]:
        with anyio.move_on_after(seconds):
            while not (found := re.search(pattern, self._seen)):
                chunk = await self._read()
                if not chunk:
                    raise SystemExit(f"the machine ended: {self._seen[-1500:]!r}")
                self._seen += chunk
        if not found:
            raise SystemExit(f"no {pattern!r} in {seconds:g} s, but {self._seen[-1500:]!r}")
        self._seen = self._seen[found.end() :]
        return found

    async def login(self) -> None:
        """Wait for the shell, and make it one that does not echo."""
        await self.expect(rb"root@\w+:~# ", BOOT_SECONDS)
        await self.run("stty -echo; PS1=", BOOT_SECONDS)

    async def run(self, command: str, seconds: float) -> str:
        """What a command prints."""
        await self._write(f"{command}; echo end$((1))\n".encode())
        found = await self.expect(rb"(?s)(.*)end1\r?\n", seconds)
        return found[1].decode(errors="replace").replace("\r", "")


@asynccontextmanager
async def qemu(argv: Sequence[str]) -> AsyncIterator[Shell]:
    """QEMU's microvm with these further arguments."""
    command = [
        *("qemu-system-x86_64", "-M", "microvm,accel=kvm,pcie=off", "-cpu", "host", "-m", str(MEMORY_MIB)),
        *("-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio", *argv),
    ]
    async with await anyio.open_process(command, stderr=subprocess.STDOUT) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            yield Shell(process.stdout.receive, process.stdin.send)
        finally:
            process.kill()


@contextmanager
def lags() -> Iterator[list[float]]:
    """How late, in ms, a timer of this loop rings, each time.

    It takes as little as can be of the loop that it measures: a wake costs the more, the slower the machine.
    """
    loop = current_loop()
    found: list[float] = []
    timer: Handle

    def set_timer() -> None:
        nonlocal timer
        due_ns = loop.now_ns() + LAG_PROBE_NS
        timer = loop.call_at(due_ns, lambda: ring(due_ns))

    def ring(due_ns: int) -> None:
        found.append((loop.now_ns() - due_ns) / 1e6)
        set_timer()

    set_timer()
    yield found
    timer.cancel()


def has_hardware() -> bool:
    try:
        with kvm.System() as system:
            return ring0_speed(system) >= HARDWARE_RING0
    except AiokvmError:
        return False


async def in_the_lab(
    program: str, results: Path, arguments: Sequence[str], memory_bytes: int = 4 << 30
) -> int:
    """Run the same program there, with --here."""

    def output(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    argv = [sys.executable, program, "--here", "--results", str(results), *arguments]
    return await lab.run(argv, lab.LabConfig(memory_bytes=memory_bytes, writable=(results,)), output=output)
