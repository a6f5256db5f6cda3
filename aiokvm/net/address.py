"""Addresses of sockets: paths of Unix sockets, and hosts with ports."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import anyio

from aiokvm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

Address: TypeAlias = str | os.PathLike[str] | tuple[str, int]
"""A path (one that begins with a zero byte is an abstract name), or a host and a port."""

Resolved: TypeAlias = tuple[int, "str | tuple[str | int, ...]"]
"""An address family, and what `socket.socket.bind` takes there."""

CONNECT_TIMEOUT_S = 10.0

# sun_path has 108 bytes, of which a path needs one for its end.
_PATH_BYTES = 107


def check_address(address: Address) -> str | tuple[str, int]:
    """The address in its plain form. Raises ConfigError for what is none."""
    if isinstance(address, tuple):
        match address:
            case (str(host), int(port)) if 0 < port < 65536:
                return host, port
        raise ConfigError(f"{address!r} is no address: a host's name and a port of 1 to 65535 are")
    if not isinstance(address, (str, os.PathLike)):
        raise ConfigError(f"{address!r} is no address: give a path, or a host's name and a port")
    return check_path(os.fspath(address))


def check_path(path: str) -> str:
    """A path that a Unix socket can have. Raises ConfigError for another."""
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= _PATH_BYTES or "\0" in path[1:]:
        raise ConfigError(f"{path!r} is no path of a Unix socket: these have 1 to {_PATH_BYTES} bytes")
    return path


def show_address(address: str | tuple[str, int]) -> str:
    """For people to read."""
    if isinstance(address, tuple):
        host, port = address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return address.replace("\0", "@")


async def resolve(address: str | tuple[str, int], kind: socket.SocketKind) -> list[Resolved]:
    """Where an address leads, best first. Raises OSError for a host that nobody knows."""
    if isinstance(address, str):
        return [(socket.AF_UNIX, address)]
    host, port = address
    found = await anyio.getaddrinfo(host, port, type=kind)
    return [(int(family), sockaddr) for family, _, _, _, sockaddr in found]


def pack_sockaddr(family: int, address: str | tuple[str | int, ...]) -> bytes:
    """A ``struct sockaddr_un``, ``sockaddr_in`` or ``sockaddr_in6``."""
    if isinstance(address, str):
        return struct.pack("=H", family) + os.fsencode(address) + (b"" if address.startswith("\0") else b"\0")
    host, _, zone = str(address[0]).partition("%")
    number = socket.inet_pton(family, host)
    if family == socket.AF_INET:
        return struct.pack("=H", family) + struct.pack("!H4s8x", address[1], number)
    scope = 0
    if zone:
        scope = int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)
    return struct.pack("=H", family) + struct.pack("!HI16s", address[1], 0, number) + struct.pack("=I", scope)


def open_socket(family: int, kind: socket.SocketKind) -> socket.socket:
    """One that does not block."""
    return socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def bind(made: socket.socket, address: str | tuple[str | int, ...]) -> None:
    """Bind it; what a program that has ended left of a Unix socket is taken away. Raises OSError."""
    if isinstance(address, str):
        remove_stale(address, made.type)
    elif made.type == socket.SOCK_STREAM:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)


def remove_stale(path: str, kind: socket.SocketKind) -> None:
    """Take away a Unix socket that nobody is at: a killed program has left it. Raises OSError."""
    if path.startswith("\0"):
        return
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with open_socket(socket.AF_UNIX, kind) as probe:
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            with suppress(FileNotFoundError):
                os.unlink(path)


def unlink(address: str | tuple[str, int] | None) -> None:
    """Take away what `bind` left in the file system."""
    if isinstance(address, str) and not address.startswith("\0"):
        with suppress(OSError):
            os.unlink(address)


async def connect(address: str | tuple[str, int]) -> socket.socket:
    """A stream socket that is connected there. Raises OSError, after 10 s ETIMEDOUT."""
    try:
        with anyio.fail_after(CONNECT_TIMEOUT_S):
            error: OSError | None = None
            for family, sockaddr in await resolve(address, socket.SOCK_STREAM):
                try:
                    return await _connect(family, sockaddr)
                except OSError as why:
                    error = why
            raise error or OSError(errno.EADDRNOTAVAIL, "the host has no address")
    except TimeoutError as timeout:
        raise OSError(errno.ETIMEDOUT, f"{show_address(address)} does not answer") from timeout


async def _connect(family: int, sockaddr: str | tuple[str | int, ...]) -> socket.socket:
    made = open_socket(family, socket.SOCK_STREAM)
    try:
        code = made.connect_ex(sockaddr)
        if code == errno.EINPROGRESS:
            await anyio.wait_writable(made)
            code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code), sockaddr if isinstance(sockaddr, str) else None)
    except BaseException:
        made.close()
        raise
    return made


def duplicate(given: int | socket.socket, kinds: set[socket.SocketKind]) -> socket.socket:
    """A descriptor of our own of a socket that the caller has. Raises ConfigError if it is none of these."""
    fd = given if isinstance(given, int) else given.fileno()
    try:
        copy = socket.socket(fileno=os.dup(fd))
    except OSError as error:
        raise ConfigError(f"descriptor {fd} is no socket: {error.strerror}") from error
    if copy.type not in kinds:
        copy.close()
        names = " or ".join(sorted(kind.name for kind in kinds))
        raise ConfigError(f"descriptor {fd} is a socket of another type: {names} is needed")
    copy.setblocking(False)
    return copy


def connected(made: socket.socket) -> bool:
    """Whether a socket has a peer."""
    with suppress(OSError):
        made.getpeername()
        return True
    return False


def _families(found: list[Resolved]) -> Iterator[int]:
    for family, _ in found:
        yield family


def same_family(local: list[Resolved], remote: list[Resolved]) -> tuple[Resolved, Resolved] | None:
    """The first pair that can talk to each other."""
    for family in _families(remote):
        for here in local:
            if here[0] == family:
                return here, next(there for there in remote if there[0] == family)
    return None
