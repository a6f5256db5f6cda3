"""Services in the process: connections of a guest that coroutines answer."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream, SocketAttribute

from aiokvm.text import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from aiokvm.aio import Loop, Task

logger = get_logger("aiokvm.net")

# Handlers of one service that run at a time; more connections wait, and more than that are closed.
MAX_RUNNING = 256
MAX_WAITING = 64
# How long handlers that were cancelled may take to end.
PATIENCE_S = 5.0

_CHUNK = 65536


class Connection(ByteStream):
    """A guest's connection to a service: an anyio byte stream, whose other end is the guest's socket.

    ``guest`` is the guest's address and port, ``service`` those that it has connected to.
    """

    def __init__(self, raw: socket.socket, guest: tuple[str, int], service: tuple[str, int]) -> None:
        raw.setblocking(False)
        self._socket = raw
        self.guest = guest
        self.service = service
        self._is_closed = False

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {
            SocketAttribute.family: lambda: socket.AF_INET,
            SocketAttribute.local_address: lambda: self.service,
            SocketAttribute.remote_address: lambda: self.guest,
            SocketAttribute.raw_socket: lambda: self._socket,
        }

    async def receive(self, max_bytes: int = _CHUNK) -> bytes:
        """At least one byte. Raises EndOfStream, BrokenResourceError if it was reset, ClosedResourceError."""
        await anyio.lowlevel.checkpoint()
        while True:
            self._check()
            try:
                data = self._socket.recv(max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
                continue
            except OSError as error:
                raise anyio.BrokenResourceError from error
            if not data:
                raise anyio.EndOfStream
            return data

    async def send(self, item: bytes) -> None:
        """All of it, waiting for the guest to take it. Raises BrokenResourceError, ClosedResourceError."""
        await anyio.lowlevel.checkpoint()
        view = memoryview(item)
        while view:
            self._check()
            try:
                view = view[self._socket.send(view, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError as error:
                raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """Nothing more will be sent; the guest may go on."""
        self._check()
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise anyio.BrokenResourceError from error
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Close it. Idempotent; who waits on it gets ClosedResourceError."""
        self.close()
        await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """The same, at once."""
        if not self._is_closed:
            self._is_closed = True
            anyio.notify_closing(self._socket)
            self._socket.close()

    def _check(self) -> None:
        if self._is_closed:
            raise anyio.ClosedResourceError


Handler = Callable[[Connection], Awaitable[object]]
"""What answers the connections of a service; when it returns the connection is closed."""


class Service:
    """A service that is there: its handlers, one a connection."""

    def __init__(self, loop: Loop, address: tuple[str, int], handler: Handler) -> None:
        self.address = address
        self.handler = handler
        self.id = 0
        """What the C core calls it."""
        self._loop = loop
        self._running: dict[Connection, Task] = {}

    @property
    def is_busy(self) -> bool:
        """Whether no more handlers may run now."""
        return len(self._running) >= MAX_RUNNING

    def start(self, connection: Connection, on_end: Callable[[], object]) -> None:
        """Run a handler; ``on_end`` is called when it has ended."""

        async def run() -> None:
            try:
                await self.handler(connection)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                logger.debug("%s: the guest has gone: %r", name, error)
            except Exception:
                logger.exception("exception in the handler of %s", name)
            finally:
                connection.close()
                self._running.pop(connection, None)
                on_end()

        name = "service {}:{} for {}:{}".format(*self.address, *connection.guest)
        self._running[connection] = self._loop.spawn(run, name)

    async def stop(self) -> None:
        """Cancel the handlers and wait for them; those that do not end are left alone."""
        running = dict(self._running)
        for task in running.values():
            task.cancel()
        with anyio.move_on_after(PATIENCE_S) as scope:
            for task in running.values():
                await task.wait()
        for connection in running:
            connection.close()
        if scope.cancelled_caught:
            logger.warning("handlers of service %s:%d did not end when they were cancelled", *self.address)
