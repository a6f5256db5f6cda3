"""A guest that is a network namespace: Linux's own network stack behind a TAP device that the test holds."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import TYPE_CHECKING

import pytest
from anyio import to_thread

from aiokvm.net import Tap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

PATIENCE_S = 60

# Makes the device, hands its descriptor out, and is there until its standard input ends.
KEEPER = """
import array, fcntl, socket, struct, subprocess, sys
tap = open("/dev/net/tun", "r+b", buffering=0)
flags = 0x0002 | 0x1000 | (0x4000 if sys.argv[2] == "offload" else 0)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap0", flags))
for command in ("ip link set lo up", "ip link set tap0 address 52:54:00:12:34:56", "ip link set tap0 up"):
    subprocess.run(command.split(), check=True)
with socket.socket(fileno=int(sys.argv[1])) as there:
    socket.send_fds(there, [b"x"], [tap.fileno()])
sys.stdin.read()
"""
LEASE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
[ -z "$router" ] || ip route add default via "$router"
echo "lease $ip/$mask router=$router dns=$dns domain=$domain search=$search hostname=$hostname"
"""


@cache
def why_not(*commands: str) -> str:
    """Why there can be no such guest here; empty if there can."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no access to /dev/net/tun"
    for command in ("unshare", "nsenter", "ip", "busybox", *commands):
        if not shutil.which(command):
            return f"no {command}: its Debian package is missing"
    if subprocess.run(("unshare", "-rn", "true"), capture_output=True, check=False).returncode:
        return "no network namespace may be made"
    return ""


def needs(*commands: str) -> pytest.MarkDecorator:
    reason = why_not(*commands)
    return pytest.mark.skipif(bool(reason), reason=reason)


class Namespace:
    """``tap`` leads there."""

    def __init__(self, tap: Tap, pid: int, script: str) -> None:
        self.tap = tap
        self._enter = ("nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials")
        self._script = script

    async def run(self, *argv: str, check: bool = True, stdin: str = "") -> str:
        """What a command there has printed."""

        def run() -> str:
            done = subprocess.run(
                (*self._enter, *argv),
                input=stdin,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE_S,
                check=False,
            )
            assert not check or done.returncode == 0, (argv, done.stdout)
            return done.stdout

        return await to_thread.run_sync(run, abandon_on_cancel=True)

    async def python(self, program: str, *argv: str, check: bool = True) -> str:
        return await self.run(sys.executable, "-c", program, *argv, check=check)

    @contextmanager
    def start(self, *argv: str) -> Iterator[subprocess.Popen[str]]:
        """A command that runs there meanwhile."""
        process = subprocess.Popen(
            (*self._enter, *argv), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    async def lease(self) -> str:
        """Get an address by DHCP; what was said."""
        output = await self.run(
            "busybox", "udhcpc", "-i", "tap0", "-n", "-q", "-f", "-t", "10", "-T", "1",
            "-O", "search", "-s", self._script,
        )  # fmt: skip
        return next(line for line in output.splitlines() if line.startswith("lease "))


@asynccontextmanager
async def namespace(folder: Path, offload: bool = True) -> AsyncIterator[Namespace]:
    """A guest; ``folder`` is for its files."""
    script = folder / "lease"
    script.write_text(LEASE)
    script.chmod(0o755)
    here, there = socket.socketpair()
    with here, _keep(there, offload) as pid:
        _, fds, _, _ = await to_thread.run_sync(socket.recv_fds, here, 1, 1)
        try:
            yield Namespace(Tap(fds=fds), pid, str(script))
        finally:
            os.close(fds[0])


@contextmanager
def _keep(there: socket.socket, offload: bool) -> Iterator[int]:
    kind = "offload" if offload else "plain"
    argv = ("unshare", "-rn", sys.executable, "-c", KEEPER, str(there.fileno()), kind)
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=(there.fileno(),))
    there.close()
    with process:
        yield process.pid
