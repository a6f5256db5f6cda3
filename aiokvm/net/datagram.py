"""A network behind a datagram socket: another machine, VDE plugs, QEMU."""

from __future__ import annotations

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
    connected,
    duplicate,
    open_socket,
    pack_sockaddr,
    resolve,
    same_family,
    show_address,
    unlink,
)
from aiokvm.net.backend import NetBackend, Policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.net.plane import End, Plane

# What comes while the machine is busy waits here; the kernel gives less if it wants to.
_BUFFER_BYTES = 4 << 20


@owned
class Datagram(NetBackend):
    """Ethernet frames, one in each datagram: what QEMU's ``-netdev dgram`` speaks.

    ``local`` is where it listens, ``remote`` where the peer does: two paths of Unix sockets, or a host and a
    port each, for UDP. The peer need not be there, and may go and come back; meanwhile frames are dropped.
    Of UDP only ``remote`` is heard; who may write to a path is what the file system says.

    Or ``fd``: a datagram or seqpacket socket that is connected, or its descriptor, of which a copy is made;
    it is made non-blocking. When the other one of a pair closes, that is the end: for datagrams it is seen
    when something is sent.

    Opening raises OSError if an address cannot be had.
    """

    @checked
    def __init__(
        self,
        local: Address | None = None,
        remote: Address | None = None,
        *,
        fd: int | socket.socket | None = None,
        **policy: Unpack[Policy],
    ) -> None:
        super().__init__(**policy)
        self._given = fd
        self._local: str | tuple[str, int] | None = None
        self._remote: str | tuple[str, int] | None = None
        if fd is None:
            if local is None or remote is None:
                raise ConfigError("a Datagram needs both a local and a remote address, or fd=")
            self._local, self._remote = check_address(local), check_address(remote)
            if type(self._local) is not type(self._remote):
                raise ConfigError("local and remote are two paths, or a host and a port each")
        elif local is not None or remote is not None:
            raise ConfigError("with fd= there are no addresses: the socket is connected already")
        self._on_lost: Callable[[str], None] = _nobody
        self._socket: socket.socket | None = None
        self._bound = False

    def __repr__(self) -> str:
        if self._local is not None and self._remote is not None:
            return f"<Datagram {show_address(self._local)!r} to {show_address(self._remote)!r}>"
        return "<Datagram of a socket>"

    async def _open(self, plane: Plane, on_lost: Callable[[str], None]) -> End:
        self._on_lost = on_lost
        try:
            sockaddr = await self._make_socket()
            assert self._socket
            error = ffi.new("int *")
            core = lib.aiokvm_net_datagram_new(
                plane.core, self._socket.fileno(), sockaddr, len(sockaddr), error
            )
            if not core:
                raise OSError(error[0], f"{self!r}: {os.strerror(error[0])}")
            return plane.adopt(core, 0, self._on_news)
        except BaseException:
            await self._close()
            raise

    async def _make_socket(self) -> bytes:
        """Makes it, and gives the peer's sockaddr, which is empty if it is connected."""
        if self._given is not None:
            self._socket = duplicate(self._given, {socket.SOCK_DGRAM, socket.SOCK_SEQPACKET})
            if not connected(self._socket):
                raise ConfigError(f"{self!r} is not connected: connect it first, or give addresses")
            return b""
        assert self._local is not None
        assert self._remote is not None
        local = await resolve(self._local, socket.SOCK_DGRAM)
        remote = await resolve(self._remote, socket.SOCK_DGRAM)
        pair = same_family(local, remote)
        if pair is None:
            raise ConfigError(f"{self!r}: one address is of IPv4, the other of IPv6")
        (family, here), (_, there) = pair
        self._socket = open_socket(family, socket.SOCK_DGRAM)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        bind(self._socket, here)
        self._bound = True
        return pack_sockaddr(family, there)

    async def _close(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None
        if self._bound:
            unlink(self._local)
            self._bound = False
        self._on_lost = _nobody

    def _on_news(self, news: int, error: int, _detail: int) -> None:
        if news & lib.AIOKVM_NET_NEWS_CLOSED:
            why = f"the socket failed: {os.strerror(error)}" if error else "the peer has closed its socket"
            self._on_lost(f"{self!r}: {why}")


def _nobody(why: str) -> None:
    pass
