"""A guest behind user-mode NAT, and what it can talk to."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import to_thread

from aiokvm._core import ffi, lib
from aiokvm.aio import current_loop
from aiokvm.budget import DESCRIPTORS
from aiokvm.net.plane import Plane
from tests.net.namespace import namespace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from aiokvm import net
    from aiokvm.net import Connection
    from tests.net.namespace import Namespace

LIMIT_S = 90
PAGE = ("10.0.2.100", 80)

needs_slirp = pytest.mark.skipif(
    not lib.aiokvm_net_slirp_built(), reason="built without libslirp: libslirp-dev is missing"
)


@asynccontextmanager
async def guest_of(
    user: net.User, folder: Path, lease: bool = True, thread: str | None = None
) -> AsyncIterator[Namespace]:
    """A guest behind this NAT."""
    plane = Plane(current_loop(), thread)
    with anyio.fail_after(LIMIT_S):
        async with namespace(folder) as guest:
            try:
                end = await user.open(plane, print)
                end.link(await guest.tap.open(plane, print))
                if lease:
                    await guest.lease()
                yield guest
            finally:
                with anyio.CancelScope(shield=True):
                    await user.close()
                    await guest.tap.close()
                plane.close()


def in_use() -> int:
    """How many descriptors of the process's budget guests have."""
    state = ffi.new("struct aiokvm_budget_state *")
    lib.aiokvm_budget_state(lib.aiokvm_budget_of_process(DESCRIPTORS), state)
    return int(state.used)


@contextmanager
def listening(host: str = "127.0.0.1", kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """A server of the host's: it says back what it hears, once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as server:
        server.bind((host, 0))
        if kind == socket.SOCK_STREAM:
            server.listen()

        def serve() -> None:
            try:
                if kind == socket.SOCK_STREAM:
                    with server.accept()[0] as accepted:
                        accepted.sendall(accepted.recv(1000))
                else:
                    server.sendto(*server.recvfrom(1000))
            except OSError:  # it was closed
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown(socket.SHUT_RDWR) if kind == socket.SOCK_STREAM else server.sendto(
                b"", server.getsockname()
            )
            thread.join()


# What a guest does: connects, says something, prints the answer.
TALK = """
import socket, sys
host, port, kind, text = sys.argv[1:]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family, getattr(socket, kind)) as s:
    s.settimeout(10)
    s.connect((host, int(port)))
    s.send(text.encode())
    print(s.recv(1000).decode(), end="")
"""
# A server of the guest's that says back what it hears.
ECHO = """
import socket, sys
port, kind = int(sys.argv[1]), sys.argv[2]
family = socket.AF_INET6 if kind.endswith("6") else socket.AF_INET
with socket.socket(family, getattr(socket, kind.rstrip("6"))) as s:
    s.bind(("", port))
    if kind.startswith("SOCK_STREAM"):
        s.listen()
    print("ready", flush=True)
    while True:
        if kind.startswith("SOCK_STREAM"):
            with s.accept()[0] as c:
                while data := c.recv(1000):
                    c.sendall(data)
        else:
            s.sendto(*s.recvfrom(1000))
"""


@asynccontextmanager
async def echoing(guest: Namespace, port: int, kind: str) -> AsyncIterator[None]:
    with guest.start(sys.executable, "-c", ECHO, str(port), kind) as process:
        assert process.stdout
        assert await to_thread.run_sync(process.stdout.readline) == "ready\n"
        yield


def ask(family: int, kind: int, address: Any, text: bytes) -> bytes:
    with socket.socket(family, kind) as client:
        client.settimeout(LIMIT_S)
        client.connect(address)
        client.send(text)
        return client.recv(1000)


async def application(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"hello {scope['client'][0]}".encode()})


async def greeting(stream: Connection) -> None:
    await stream.send(b"hello")
    stream.close()
