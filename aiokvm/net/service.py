"""Services in the process: connections of a guest that coroutines answer."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream, SocketAttribute

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.budget import DESCRIPTORS, Share

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop, Task
    from aiokvm.logs import SeldomLogger
    from aiokvm.net.plane import End

# Handlers of one service that run at a time; more connections wait, and more than that are closed.
MAX_RUNNING = 256
MAX_WAITING = 64
# How long handlers that were cancelled may take to end.
PATIENCE_S = 5.0
# How long `Connection.send` waits for a guest that takes nothing, unless it is told otherwise.
SEND_TIMEOUT_S = 60.0

# Connections that were reset and not closed since, of those that are running and waiting.
MAX_BROKEN = 4096

_CHUNK = 65536


@owned
class Connection(ByteStream):
    """A guest's connection to a service: an anyio byte stream, whose other end is the guest's socket.

    ``guest`` is the guest's address and port, ``service`` those that it has connected to. A guest that takes
    nothing of what is sent to it for ``send_timeout`` seconds is given up: the connection is broken then.
    None waits for as long as it takes.
    """

    send_timeout: float | None = SEND_TIMEOUT_S

    def __init__(
        self,
        raw: socket.socket,
        guest: tuple[str, int],
        service: tuple[str, int],
        connections: Connections | None = None,
        number: int = 0,
    ) -> None:
        raw.setblocking(False)
        self._socket = raw
        self.guest = guest
        self.service = service
        self._connections = connections or Connections()
        self._number = number
        self._is_closed = False
        self._owner: Loop | None = None

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {
            SocketAttribute.family: lambda: socket.AF_INET,
            SocketAttribute.local_address: lambda: self.service,
            SocketAttribute.remote_address: lambda: self.guest,
            SocketAttribute.raw_socket: lambda: self._socket,
        }

    @checked
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
                # To the socket, a reset is an end as well.
                if self._connections.is_broken(self._number):
                    raise anyio.BrokenResourceError
                raise anyio.EndOfStream
            return data

    @checked
    async def send(self, item: bytes) -> None:
        """All of it, waiting for the guest to take it. Raises BrokenResourceError, ClosedResourceError."""
        await anyio.lowlevel.checkpoint()
        view = memoryview(item)
        while view:
            self._check()
            try:
                view = view[self._socket.send(view, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await self._until_writable()
            except OSError as error:
                raise anyio.BrokenResourceError from error

    async def _until_writable(self) -> None:
        with anyio.move_on_after(math.inf if self.send_timeout is None else self.send_timeout) as scope:
            await anyio.wait_writable(self._socket)
        if scope.cancelled_caught:
            self.abort()
            raise anyio.BrokenResourceError from TimeoutError(
                f"the guest took nothing for {self.send_timeout:g} s"
            )

    def has_ended(self) -> bool:
        """Whether the guest has closed or reset it, and all that it had sent was received. Does not wait."""
        if self._is_closed:
            return True
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

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
            self._connections.forget(self._number)

    def abort(self) -> None:
        """Close it with a reset: the guest does not take what it got for all there was. Idempotent."""
        if not self._is_closed:
            self._connections.abort(self._number)
            self.close()

    def _check(self) -> None:
        if self._is_closed:
            raise anyio.ClosedResourceError


class Connections:
    """Connections of a guest to services, as the C core has them: each has a number."""

    def __init__(self, descriptors: Share | None = None) -> None:
        self.end: End | None = None
        """The NAT's, while it is open."""
        self._accepted = ffi.new("struct aiokvm_net_slirp_connection *")
        self._number = ffi.new("uint32_t *")
        self._broken: dict[int, None] = {}
        """Those that the guest has reset, the oldest first."""
        self._descriptors = descriptors.part() if descriptors else Share(DESCRIPTORS)
        self._open: set[int] = set()

    @property
    def _core(self) -> Pointer | None:
        return self.end.core if self.end and self.end.is_open else None

    def accept(self, service: Service) -> Connection | None:
        """The next one of a service; None: nobody waits. Its descriptor was the core's, and counted there."""
        if not (core := self._core):
            return None
        fd = lib.aiokvm_net_slirp_accept(core, service.id, self._accepted)
        if fd < 0:
            return None
        self._descriptors.add(1)
        self._open.add(int(self._accepted.id))
        guest = (str(IPv4Address(self._accepted.address)), int(self._accepted.port))
        return Connection(socket.socket(fileno=fd), guest, service.address, self, int(self._accepted.id))

    def look(self) -> None:
        """See which of them the guest has reset."""
        while (core := self._core) and lib.aiokvm_net_slirp_take_broken(core, self._number) == 1:
            self._broken[int(self._number[0])] = None
            # Those that nobody has accepted, or will.
            if len(self._broken) > MAX_BROKEN:
                del self._broken[next(iter(self._broken))]

    def is_broken(self, number: int) -> bool:
        """Whether the guest has reset it."""
        self.look()
        return number in self._broken

    def abort(self, number: int) -> None:
        """Have the guest get a reset."""
        if core := self._core:
            lib.aiokvm_net_slirp_abort(core, number)

    def forget(self, number: int) -> None:
        """It is closed."""
        self._broken.pop(number, None)
        if number in self._open:
            self._open.remove(number)
            self._descriptors.give(1)


Handler = Callable[[Connection], Awaitable[object]]
"""What answers a connection of a service: when it returns that is closed, when it raises it is reset."""


class Service:
    """A service that is there: its handlers, one a connection."""

    def __init__(self, loop: Loop, address: tuple[str, int], handler: Handler, log: SeldomLogger) -> None:
        self._log = log
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
                self._log.debug("%s: the guest has gone: %r", name, error)
            except Exception:
                connection.abort()
                self._log.exception("exception in the handler of %s", name)
            except BaseException:
                # It was cancelled in its middle.
                connection.abort()
                raise
            finally:
                connection.close()
                self._running.pop(connection, None)
                on_end()

        connection._owner = self._loop
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
            connection.abort()
        if scope.cancelled_caught:
            self._log.warning("handlers of service %s:%d did not end when they were cancelled", *self.address)
