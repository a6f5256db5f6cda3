"""Sockets with a path that a killed program has left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aiokvm import net
from aiokvm.aio import current_loop
from aiokvm.net.plane import Plane

sys.path.append(str(Path(__file__).parents[2]))  # behind what is installed

from tests.net.nat import needs_slirp

LIMIT_S = 90

KILLED = """
import os, signal, sys
import anyio
from aiokvm import net
from aiokvm.aio import current_loop
from aiokvm.net.plane import Plane

path = sys.argv[2]
backends = {
    "forward": lambda: net.User(forward={path: 22}, services={("10.0.2.100", 80): handler}),
    "stream": lambda: net.Stream(path, server=True),
    "datagram": lambda: net.Datagram(local=path, remote=path + ".peer"),
}

async def handler(stream): ...

async def main():
    plane = Plane(current_loop())
    await backends[sys.argv[1]]().open(plane, print)
    print("open", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

anyio.run(main)
"""


@pytest.mark.parametrize("kind", [pytest.param("forward", marks=needs_slirp), "stream", "datagram"])
def test_what_a_killed_program_leaves_is_in_nobody_s_way(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "guest.sock"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for _ in range(2):
        done = subprocess.run(
            (sys.executable, "-c", KILLED, kind, path),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        assert (done.stdout, done.returncode) == ("open\n", -signal.SIGKILL), done.stderr
        assert path.is_socket()
    # Of the folders with sockets of services there is the last one's.
    assert len(list(temporary.iterdir())) == (kind == "forward")


@needs_slirp
@pytest.mark.anyio
async def test_a_socket_that_somebody_is_at_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "guest.sock"
    plane = Plane(current_loop())
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            with pytest.raises(OSError, match="remove the file"):
                await net.User(forward={str(path): 22}).open(plane, print)
            assert path.is_socket()
        user = net.User(forward={str(path): 22})
        await user.open(plane, print)
        await user.close()
        assert not path.exists()
    finally:
        plane.close()
