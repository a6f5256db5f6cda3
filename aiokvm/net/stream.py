"""A network behind a stream socket: passt, gvisor-tap-vsock, another machine, QEMU."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Unpack

from aiokvm._core import ffi, lib
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError
from aiokvm.net.address import (
    Address,
    bind,
    check_address,
    connect,
    duplicate,
    open_socket,
    resolve,
    show_address,
    unlink,
)
from aiokvm.net.backend import NetBackend, Policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.aio import Handle, Task
    from aiokvm.net.plane import End, Plane

# How long a listener that has failed (no descriptors are left, say) is let alone.
_PAUSE_NS = 1_000_000_000


@owned
class Stream(NetBackend):
    """Ethernet frames over a stream socket, each behind its length: what QEMU's ``-netdev stream`` speaks.

    ``where`` is the path of a Unix socket, a host and a port, or a socket that is connected (or its
    descriptor, of which a copy is made; it is made non-blocking). It connects there, or with ``server=True``
    listens there for one peer at a time and does not wait for it. While there is no peer the link is down.

    When the peer closes, or sends what is no frame, that is the end; but with ``reconnect`` the link is
    down until there is a peer again, and the guest sees that: a client tries every so many seconds, a server
    listens on. The first peer need not be there yet, then.

    Opening raises OSError if the address cannot be had, or nobody answers there. Frames have at most 65,550
    bytes; up to 256 KiB wait for a peer that reads slowly, then the sender waits.
    """

    @checked
    def __init__(
        self,
        where: Address | int | socket.socket,
        *,
        server: bool = False,
        reconnect: float | None = None,
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(**policy)
        self._given: int | socket.socket | None = None
        self._address: str | tuple[str, int] | None = None
        if isinstance(where, int | socket.socket):
            if server or reconnect is not None:
                raise ConfigError(
                    "a socket that is connected neither listens nor reconnects: give an address"
                )
            self._given = where
        else:
            self._address = check_address(where)
        if reconnect is not None and not 0 < reconnect <= 3600:
            raise ConfigError(f"reconnect={reconnect}: the pause between attempts is up to 3600 seconds")
        self.server = server
        self.reconnect = reconnect
        self._plane: Plane | None = None
        self._end: End | None = None
        self._on_lost: Callable[[str], None] = _nobody
        self._socket: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._waiting: Handle | None = None
        self._task: Task | None = None

    def __repr__(self) -> str:
        if self._address is not None:
            return f"<Stream {show_address(self._address)!r}{' server' if self.server else ''}>"
        return "<Stream of a socket>"

    @property
    def connected(self) -> bool:
        """Whether there is a peer."""
        return self._socket is not None

    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        error = ffi.new("int *")
        core = lib.aiokvm_net_stream_new(plane.core, error)
        self._plane, self._on_lost = plane, on_lost
        self._end = end = plane.adopt(core, error[0], self._on_news)
        try:
            await self._begin()
        except BaseException:
            end.close()
            await self._close()
            raise
        return end

    async def _begin(self) -> None:
        if self._given is not None:
            self._attach(duplicate(self._given, {socket.SOCK_STREAM}))
            return
        assert self._address is not None
        self._set_up(False)
        if self.server:
            await self._listen(self._address)
        elif self.reconnect is None:
            self._attach(await connect(self._address))
        else:
            self._again(pause=False)

    async def _close(self) -> None:
        task, self._task = self._task, None
        if task:
            task.cancel()
            await task.wait()
        if self._waiting:
            self._waiting.cancel()
        if self._listener:
            self._listener.close()
            unlink(self._address)
        if self._socket:
            self._socket.close()
        self._waiting = self._listener = self._socket = None
        self._end = self._plane = None
        self._on_lost = _nobody

    def _set_up(self, up: bool) -> None:
        if self._end and self._end.is_open:
            self._end.set_up(up)
            self._set_carrier(up)

    def _attach(self, peer: socket.socket) -> None:
        assert self._end
        if not self._end.is_open:
            peer.close()
            return
        if peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = -lib.aiokvm_net_stream_attach(self._end.core, peer.fileno())
        if code:
            peer.close()
            raise OSError(code, os.strerror(code))
        self._socket = peer
        self._set_up(True)

    # A server.

    async def _listen(self, address: str | tuple[str, int]) -> None:
        family, sockaddr = (await resolve(address, socket.SOCK_STREAM))[0]
        listener = open_socket(family, socket.SOCK_STREAM)
        try:
            bind(listener, sockaddr)
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._await_peer()

    def _await_peer(self) -> None:
        if self._plane and self._listener:
            self._waiting = self._plane.loop.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._plane
        assert self._listener
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._await_later()
            return
        # Whoever else comes waits until this one has gone.
        if self._waiting:
            self._waiting.cancel()
            self._waiting = None
        peer.setblocking(False)
        try:
            self._attach(peer)
        except OSError:
            self._await_later()

    def _await_later(self) -> None:
        assert self._plane
        if self._waiting:
            self._waiting.cancel()
        self._waiting = self._plane.loop.call_at(self._plane.loop.now_ns() + _PAUSE_NS, self._await_peer)

    # A client.

    def _again(self, pause: bool = True) -> None:
        assert self._plane
        loop, address, every = self._plane.loop, self._address, self.reconnect
        assert address is not None
        assert every is not None

        async def again() -> None:
            if pause:
                await loop.sleep_until(loop.now_ns() + int(every * 1e9))
            while True:
                try:
                    self._attach(await connect(address))
                except OSError:
                    await loop.sleep_until(loop.now_ns() + int(every * 1e9))
                else:
                    return

        self._task = loop.spawn(again, f"{self!r} connects")

    def _on_news(self, news: int, error: int, detail: int) -> None:
        if not news & lib.AIOKVM_NET_NEWS_CLOSED:
            return
        if self._socket:
            self._socket.close()
            self._socket = None
        self._set_up(False)
        if self.reconnect is None:
            self._on_lost(f"{self!r}: {_reason(error, detail)}")
        elif self.server:
            self._await_peer()
        else:
            self._again()


def _nobody(why: str) -> None:
    pass


def _reason(error: int, detail: int) -> str:
    match error:
        case 0:
            return "the peer has closed the connection"
        case errno.EMSGSIZE:
            return f"the peer announced a frame of {detail} bytes, which none has; the connection was closed"
        case errno.ENODATA:
            return "the peer has closed the connection in the middle of a frame"
    return f"the connection is lost: {os.strerror(error)}"
