"""The nameserver of a guest's network: it asks those of the host, one after the other."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from aiokvm._core import ffi, lib
from aiokvm.budget import Descriptors

if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from aiokvm.aio import Loop, Task
    from aiokvm.budget import Share
    from aiokvm.logs import SeldomLogger
    from aiokvm.net.plane import End
    from aiokvm.net.service import Connection

PORT = 53
RESOLV_CONF = Path("/etc/resolv.conf")
# How long one of them may take before the next is asked as well: guests ask again after five seconds.
PATIENCE_S = 1.0
# And how long to the last answer: so long there are sockets, which the core counts for each question.
ANSWER_S = 5.0
# Of a connection: to be made, and without a word of either side.
CONNECT_S = 2.0
IDLE_S = 30.0

# RFC 1035, section 4.1.1: codes by which a nameserver says that it cannot help. RFC 2136 has more.
_SERVFAIL, _NOTIMP, _REFUSED = 2, 4, 5
_CHUNK = 65536
_CONF_BYTES = 65536
_ZONE_MAX = 15  # bytes of an interface's name


def nameservers(text: str) -> list[str]:
    """The addresses that a resolv.conf names; the host itself if it names none, as resolv.conf(5) says."""
    found: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            ip_address(words[1])
        except ValueError:
            continue
        zone = words[1].partition("%")[2]
        # Sockets do not say of another that nobody is there, they raise what is no OSError.
        if len(zone) > _ZONE_MAX or not zone.isascii() or not zone.isprintable():
            continue
        if words[1] not in found:
            found.append(words[1])
    return found or ["127.0.0.1"]


def _text_of(path: Path) -> str:
    """Its text, as much as the loop can bear. Raises OSError, also for what may have no end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(_CONF_BYTES).decode(errors="replace")


class Resolver:
    """Asks the nameservers of ``path``, which is read anew when it has changed."""

    def __init__(self, path: Path | None = None, descriptors: Share | None = None) -> None:
        self._path = path or RESOLV_CONF
        self._read: tuple[object, list[str]] = (None, [])
        self._descriptors = Descriptors(descriptors)
        self._good = ""
        """Who has answered last is asked first."""

    def _servers(self) -> list[str]:
        try:
            status = self._path.stat()
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if state != self._read[0]:
                self._read = (state, nameservers(_text_of(self._path)))
        except OSError:
            self._read = (None, nameservers(""))
        return sorted(self._read[1], key=lambda server: server != self._good)

    async def ask(self, query: bytes) -> bytes | None:
        """The first answer to a query by UDP, or one that says no if all do. None: there is none.

        The core counts descriptors for it, as many as this may need.
        """
        answers: list[bytes] = []
        with anyio.move_on_after(ANSWER_S):
            async with anyio.create_task_group() as tasks:
                for server in self._servers():
                    ended = anyio.Event()
                    tasks.start_soon(self._ask_one, server, query, answers, ended, tasks.cancel_scope)
                    with anyio.move_on_after(PATIENCE_S):
                        await ended.wait()
        return answers[-1] if answers else None

    async def _ask_one(
        self, server: str, query: bytes, answers: list[bytes], ended: anyio.Event, scope: anyio.CancelScope
    ) -> None:
        """``scope`` is cancelled when ``answers`` has one that helps, at its end; others come before it."""
        try:
            answer = await _exchange(server, query)
        except OSError:
            return
        finally:
            ended.set()
        if answer[3] & 15 in (_SERVFAIL, _NOTIMP, _REFUSED):
            answers.insert(0, answer)
            return
        self._good = server
        answers.append(answer)
        scope.cancel()

    async def relay(self, guest: Connection) -> None:
        """Connect a guest that asks by TCP to the first that can be connected to: a descriptor more."""
        if not self._descriptors.take():
            guest.abort()
            return
        try:
            await self._relay(guest)
        finally:
            self._descriptors.give()

    async def _relay(self, guest: Connection) -> None:
        for server in self._servers():
            try:
                with anyio.fail_after(CONNECT_S):
                    upstream = await anyio.connect_tcp(server, PORT)
            except (OSError, TimeoutError):
                continue
            self._good = server
            async with upstream, anyio.create_task_group() as tasks:
                tasks.start_soon(_pump, guest, upstream, tasks.cancel_scope)
                await _pump(upstream, guest, tasks.cancel_scope)
                tasks.cancel_scope.cancel()
            return
        guest.abort()


async def _exchange(server: str, query: bytes) -> bytes:
    """Its answer, for which this waits. Raises OSError if nobody is there."""
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    family, kind, _, _, address = socket.getaddrinfo(server, PORT, type=socket.SOCK_DGRAM, flags=flags)[0]
    # anyio's would not say that nobody is there.
    with socket.socket(family, kind | socket.SOCK_NONBLOCK) as udp:
        udp.connect(address)
        udp.send(query)
        while True:
            await anyio.wait_readable(udp)
            answer = udp.recv(_CHUNK)
            if len(answer) >= 12 and answer[:2] == query[:2] and answer[2] & 0x80:
                return answer


async def _pump(source: ByteStream, sink: ByteStream, scope: anyio.CancelScope) -> None:
    """Move what comes until the end; what breaks, or is silent for too long, ends both directions."""
    try:
        while True:
            with anyio.fail_after(IDLE_S):
                data = await source.receive(_CHUNK)
                await sink.send(data)
    except anyio.EndOfStream:
        try:
            await sink.send_eof()
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            scope.cancel()
    except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        scope.cancel()


class Dns:
    """Answers the questions that the C core has of a guest, while a NAT is open."""

    def __init__(self, loop: Loop, end: End, log: SeldomLogger, descriptors: Share) -> None:
        self.resolver = Resolver(descriptors=descriptors)
        self._log = log
        self._loop = loop
        self._end = end
        self._id = ffi.new("uint32_t *")
        self._data = ffi.new("uint8_t[]", lib.AIOKVM_NET_SLIRP_MAX_QUERY)
        self._tasks: dict[int, Task] = {}

    def look(self, until_ns: int) -> bool:
        """Take what there is, and at least one. False: there may be more, and the time is over."""
        while self._end.is_open:
            size = lib.aiokvm_net_slirp_take_query(self._end.core, self._id, self._data)
            if size < 0:
                break
            self._start(int(self._id[0]), bytes(ffi.buffer(self._data, size)))
            if time.monotonic_ns() >= until_ns:
                return False
        return True

    def _start(self, number: int, query: bytes) -> None:
        async def run() -> None:
            answer: bytes | None = None
            try:
                answer = await self.resolver.ask(query)
            except Exception:
                self._log.exception("a question of the guest cannot be asked")
            finally:
                self._tasks.pop(number, None)
                if self._end.is_open:
                    data = answer or b""
                    lib.aiokvm_net_slirp_answer(self._end.core, number, data, len(data))

        self._tasks[number] = self._loop.spawn(run, f"aiokvm DNS {number}")

    async def stop(self) -> None:
        """Cancel what is being asked."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        for task in tasks:
            await task.wait()
