"""An NBD client on the event loop, which outlives the server's absence."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from anyio.abc import SocketAttribute

from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned
from aiokvm.block.backend import BlockBackend, Data
from aiokvm.budget import BOUNCE_BYTES, Share
from aiokvm.errors import AiokvmError, ConfigError, NbdError
from aiokvm.logs import SeldomLogger
from aiokvm.proto import nbd as proto
from aiokvm.text import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.abc import SocketStream

    from aiokvm.aio import Task
    from aiokvm.proto.nbd import Address, Export, Reply

logger = get_logger("aiokvm.block")

CONNECTIONS_MAX = 16
CONNECT_TIMEOUT_S = 10.0
"""For all connections and their negotiations together."""
BACKOFF_S = (0.05, 5.0)
"""Shortest and longest pause before the server is tried again."""
IN_FLIGHT_MAX = 64
"""Requests that one connection has in flight."""
RECEIVE_BYTES = 1 << 18
COPY_BYTES = 1 << 16
"""Up to here it is cheaper to copy a write's data behind its header than to send twice."""
REQUEST_BYTES = 4 << 20
"""The longest read or write that is one request, if the server takes that: memory for more takes long."""
ZEROES_REQUEST_BYTES = 64 << 20
"""The longest discard or write_zeroes that is one request: a server may have to write it out."""
UNFLUSHED_MAX_BYTES = 64 << 20
"""Writes that are kept because no flush has covered them, unless the process's budget for copies leaves less.

Beyond it the client flushes by itself.
"""
JOB_BYTES = 1024
"""What a kept request counts beside its data."""
DROP_BYTES = 1 << 20
"""Of them that are let go of before the loop has a turn."""

_CHANGES = (proto.NBD_CMD_WRITE, proto.NBD_CMD_WRITE_ZEROES, proto.NBD_CMD_TRIM)
# What sockets raise, on each loop, when a connection is over.
_GONE = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)


@dataclass(slots=True, eq=False)
class _Job:
    """A request: waiting to be sent, in flight, or ended, with ``error`` or ``result``."""

    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    data: bytes = b""
    result: bytearray = field(default_factory=bytearray)
    error: OSError | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)
    # Nobody waits for it any more: not to be sent again.
    abandoned: bool = False
    # Written to a server that has been away, and still kept.
    again: bool = False

    @property
    def kept_bytes(self) -> int:
        return JOB_BYTES + len(self.data)


class _Connection:
    """One connection, after its negotiation."""

    def __init__(self, stream: SocketStream, export: Export) -> None:
        self.stream = stream
        self.export = export
        self.transmission = proto.Transmission(structured=export.structured)
        self.jobs: dict[int, _Job] = {}
        self.room = anyio.Event()

    async def send(self, job: _Job) -> None:
        cookie, header = self.transmission.request(job.command, job.offset, job.length, job.flags)
        self.jobs[cookie] = job
        if len(job.data) <= COPY_BYTES:
            await self.stream.send(header + job.data)
        else:
            await self.stream.send(header)
            await self.stream.send(job.data)

    def take(self, reply: Reply) -> _Job:
        if reply.error == errno.ESHUTDOWN:  # so it was not done: it is sent again to whoever comes next
            raise ConnectionResetError(errno.ESHUTDOWN, "the NBD server is shutting down")
        self.room.set()
        return self.jobs.pop(reply.cookie)

    def shut(self) -> None:
        """Ends it for those who wait to send or receive: no cancellation has to reach them."""
        raw = self.stream.extra(SocketAttribute.raw_socket)
        with suppress(OSError), socket.fromfd(raw.fileno(), raw.family, raw.type) as same:
            same.shutdown(socket.SHUT_RDWR)
        self.room.set()

    async def disconnect(self) -> None:
        with anyio.move_on_after(1):
            with suppress(*_GONE):
                await self.stream.send(self.transmission.request(proto.NBD_CMD_DISC)[1])


async def _close_all(connections: list[_Connection]) -> None:
    async def close() -> None:
        for connection in connections:
            await anyio.aclose_forcefully(connection.stream)

    await current_loop().uncancelled(close)


@owned
class NbdClient(BlockBackend):
    """What `Nbd` says, for a server that `_locate` finds, or starts; ``name`` is for messages."""

    def __init__(self, name: str, readonly: bool, connections: int, timeout: float) -> None:
        if not 1 <= connections <= CONNECTIONS_MAX:
            raise ConfigError(f"{connections} connections: 1 to {CONNECTIONS_MAX} of them make sense")
        if not 0 < timeout <= 3600:
            raise ConfigError(f"a timeout of {timeout} s: it has to be above 0, and an hour at most")
        self.connections = connections
        self.timeout = timeout
        self._name = name
        self._log = SeldomLogger(logger)  # a server may come and go as often as it likes
        self._attempts = self._log.kind()
        self._wanted_readonly = readonly
        self._task: Task | None = None

    async def _locate(self) -> Address:
        """Where the server is, each time before it is connected to."""
        raise NotImplementedError

    def _begin(self) -> None:
        """What is new each time it is opened; much of it belongs to the loop that runs."""
        self._export: Export | None = None
        self._live: list[_Connection] = []
        self._broken = False  # the connections that are live are to be given up
        self._closing = False
        self._waiting: deque[_Job] = deque()
        self._news = anyio.Event()
        self._running = 0
        self._idle = anyio.Event()
        self._unflushed: deque[_Job] = deque()
        self._unflushed_bytes = 0
        self._share = Share(BOUNCE_BYTES)
        self._kept, self._dropped = 0, 0  # jobs that have ever been put into _unflushed, and taken from it
        self._flush_error: OSError | None = None
        self._flush_lock = anyio.Lock()
        self._last_error: BaseException | None = None

    # What a machine calls.

    async def open(self) -> None:
        if self._task is not None:
            raise OSError(errno.EBUSY, f"{self._name} is open")
        self._begin()
        live = await self._connect_all()
        export = self._export = live[0].export
        self.block_size = max(512, export.min_block_bytes)
        self.size_bytes = export.size_bytes // self.block_size * self.block_size
        self.readonly = self._wanted_readonly or bool(export.flags & proto.NBD_FLAG_READ_ONLY)
        trims = export.flags & proto.NBD_FLAG_SEND_TRIM and not self.readonly
        self.discard_granularity_bytes = self.block_size if trims else 0
        self._live = live
        self._owner = loop = current_loop()
        self._task = loop.spawn(self._run, f"aiokvm {self._name}")

    async def close(self) -> None:
        if self._task is not None:
            await current_loop().uncancelled(self._close)
            self._owner = None

    async def read(self, offset: int, length: int) -> Data:
        self._check_open()
        self.check(offset, length)
        if length <= (most := self._most()):
            return (await self._request(_Job(proto.NBD_CMD_READ, offset, length))).result
        data = bytearray()
        for at in range(offset, offset + length, most):
            piece = min(most, offset + length - at)
            data += (await self._request(_Job(proto.NBD_CMD_READ, at, piece))).result
        return data

    async def write(self, offset: int, data: memoryview) -> None:
        self._check_open()
        self.check(offset, len(data), writes=True)
        most = self._most()
        for at in range(0, len(data), most):
            piece = bytes(data[at : at + most])
            await self._change(_Job(proto.NBD_CMD_WRITE, offset + at, len(piece), data=piece))

    async def discard(self, offset: int, length: int) -> None:
        self._check_open()
        self.check(offset, length, writes=True)
        if not self.discard_granularity_bytes:
            await super().discard(offset, length)
        await self._ranges(proto.NBD_CMD_TRIM, offset, length)

    async def write_zeroes(self, offset: int, length: int, unmap: bool = False) -> None:
        self._check_open()
        self.check(offset, length, writes=True)
        if self._export is None or not self._export.flags & proto.NBD_FLAG_SEND_WRITE_ZEROES:
            await super().write_zeroes(offset, length, unmap)
            return
        flags = 0 if unmap else proto.NBD_CMD_FLAG_NO_HOLE
        await self._ranges(proto.NBD_CMD_WRITE_ZEROES, offset, length, flags)

    async def flush(self) -> None:
        self._check_open()
        if self._flush_error is not None:
            raise OSError(self._flush_error.errno, f"an earlier flush failed: {self._flush_error.strerror}")
        if self.readonly:
            return
        covered = self._kept
        job = _Job(proto.NBD_CMD_FLUSH)
        with self._busy():
            try:
                await self._request(job)
            except OSError:
                if job.error is not None and not isinstance(job.error, NbdError):  # the server's own answer
                    self._flush_error = job.error
                raise
            self._drop_some(covered)
            while self._dropped < covered:
                await current_loop().turn()
                self._drop_some(covered)

    def _drop_some(self, covered: int) -> None:
        """Some of the writes that are safe now: a hundred thousand of them at once take long."""
        end_bytes = self._unflushed_bytes - DROP_BYTES
        while self._dropped < covered and self._unflushed_bytes > end_bytes:
            kept_bytes = self._unflushed.popleft().kept_bytes
            self._unflushed_bytes -= kept_bytes
            self._share.give(kept_bytes)
            self._dropped += 1

    # Requests.

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """What `close` waits for."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def _most(self) -> int:
        """The longest read or write that is one request."""
        most = min(self._export.max_request_bytes, REQUEST_BYTES) if self._export else self.block_size
        return max(most // self.block_size, 1) * self.block_size

    def _check_open(self) -> None:
        if self._task is None:
            raise OSError(errno.EBADF, f"{self._name} is not open")

    async def _ranges(self, command: int, offset: int, length: int, flags: int = 0) -> None:
        for at in range(offset, offset + length, ZEROES_REQUEST_BYTES):
            piece = min(ZEROES_REQUEST_BYTES, offset + length - at)
            await self._change(_Job(command, at, piece, flags))

    async def _change(self, job: _Job) -> None:
        if self._keeps_much(job):
            async with self._flush_lock:
                if self._keeps_much(job):
                    await self.flush()
        await self._request(job)

    def _keeps_much(self, job: _Job) -> bool:
        """Whether what it keeps is to be flushed before this one."""
        kept = self._unflushed_bytes
        return kept >= UNFLUSHED_MAX_BYTES or (kept > 0 and not self._share.fits(job.kept_bytes))

    async def _request(self, job: _Job) -> _Job:
        self._check_open()
        self._waiting.append(job)
        self._wake()
        with self._busy():
            try:
                with anyio.move_on_after(self.timeout):
                    await job.ended.wait()
                if not job.ended.is_set():
                    self._time_out(job)
            finally:
                job.abandoned = True
                # By asking, as the error of a remove in vain would show all of the job's data.
                if job in self._waiting:
                    self._waiting.remove(job)
        if job.error is not None:
            raise job.error
        return job

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    def _time_out(self, job: _Job) -> None:
        # In flight it may yet be done, after what comes next: it must not outlive its connection.
        if any(job in connection.jobs.values() for connection in self._live):
            self._last_error = TimeoutError(errno.ETIMEDOUT, "the server does not answer")
            self._break()
        why = f": {self._last_error}" if self._last_error else ""
        raise OSError(errno.EIO, f"{self._name} has not answered within {self.timeout} s{why}")

    # The task behind them.

    async def _run(self) -> None:
        delay = BACKOFF_S[0]
        try:
            while True:
                if await self._session():
                    delay = BACKOFF_S[0]
                if self._closing:
                    return
                self._log.warning("%s: the connection is lost: %s", self._name, self._last_error)
                while not self._live:
                    await anyio.sleep(delay)
                    delay = min(2 * delay, BACKOFF_S[1])
                    try:
                        self._live = await self._connect_all()
                    except (OSError, AiokvmError) as error:
                        self._last_error = error
                        self._attempts.debug("%s: %s", self._name, error)
                self._log.warning("%s: connected again", self._name)
        finally:
            await _close_all(self._live)
            self._live = []

    async def _session(self) -> bool:
        """Serve requests until a connection breaks; whether any was answered."""
        live = self._live
        answered = self._broken = False

        async def receive(connection: _Connection) -> None:
            nonlocal answered
            try:
                while True:
                    data = await connection.stream.receive(RECEIVE_BYTES)
                    while True:
                        for reply in connection.transmission.feed(data):
                            self._ended(connection.take(reply), reply)
                            answered = True
                        if not connection.transmission.more:
                            break
                        data = b""
                        await current_loop().turn()
            except _GONE as error:
                self._last_error = error
                if isinstance(error, NbdError):
                    for job in connection.jobs.values():
                        job.error = NbdError(error.errno, error.strerror)
                        job.ended.set()
            except Exception as error:
                self._log.exception("%s: a bug in the NBD client", self._name)
                self._last_error = error
            self._break()

        async def send(connection: _Connection) -> None:
            try:
                while not self._broken:
                    if len(connection.jobs) >= IN_FLIGHT_MAX:
                        connection.room = anyio.Event()
                        await connection.room.wait()
                    elif not self._waiting:
                        await self._news.wait()
                    elif not (job := self._waiting.popleft()).abandoned:
                        await connection.send(job)
            except _GONE as error:
                self._last_error = error
                self._break()

        try:
            async with anyio.create_task_group() as tasks:
                for connection in live:
                    tasks.start_soon(receive, connection)
                if await self._write_again(live[0]):
                    for connection in live:
                        tasks.start_soon(send, connection)
                else:
                    self._break()
        finally:
            self._live = []
            jobs = [job for connection in live for job in connection.jobs.values()]
            lost = [job for job in jobs if not (job.abandoned or job.again or job.ended.is_set())]
            self._waiting.extendleft(reversed(lost))
            await _close_all(live)
        return answered

    def _break(self) -> None:
        self._broken = True
        for connection in self._live:
            connection.shut()
            for job in connection.jobs.values():
                if job.again:
                    job.ended.set()
        self._wake()

    def _ended(self, job: _Job, reply: Reply) -> None:
        if reply.error:
            job.error = OSError(reply.error, reply.message or os.strerror(reply.error))
        elif job.command in _CHANGES and not job.again:
            self._unflushed.append(job)
            self._unflushed_bytes += job.kept_bytes
            self._share.add(job.kept_bytes)
            self._kept += 1
        job.result = reply.data or job.result
        job.ended.set()

    async def _write_again(self, connection: _Connection) -> bool:
        """What a server that has been away may have lost, in order; False if it does not answer."""
        for done in list(self._unflushed):
            job = _Job(done.command, done.offset, done.length, done.flags, done.data, again=True)
            with anyio.move_on_after(self.timeout):
                try:
                    await connection.send(job)
                except _GONE:
                    return False
                await job.ended.wait()
            if self._broken or not job.ended.is_set():
                return False
            self._flush_error = self._flush_error or job.error
        return True

    # Connections.

    async def _connect_all(self) -> list[_Connection]:
        address = await self._locate()
        live: list[_Connection] = []
        failures: list[OSError | AiokvmError] = []

        async def connect() -> None:
            try:
                live.append(await self._connect(address))
            except (OSError, AiokvmError) as error:
                failures.append(error)

        try:
            with anyio.move_on_after(CONNECT_TIMEOUT_S) as scope:
                await connect()
                # What the first has been told says whether there may be more.
                if live and live[0].export.flags & proto.NBD_FLAG_CAN_MULTI_CONN:
                    async with anyio.create_task_group() as tasks:
                        for _ in range(self.connections - 1):
                            tasks.start_soon(connect)
            if scope.cancelled_caught:
                failures.append(NbdError(errno.ETIMEDOUT, f"{self._name} does not answer"))
            if not live:
                raise failures[0]
        except BaseException:
            await _close_all(live)
            raise
        for error in failures[:1]:
            self._log.info(
                "%s: %d connections, not %d: %s",
                *(self._name, len(live), self.connections, error),
            )
        return live

    async def _connect(self, address: Address) -> _Connection:
        stream: SocketStream | None = None
        try:
            if address.socket:
                stream = await anyio.connect_unix(address.socket)
            else:
                stream = await anyio.connect_tcp(address.host, address.port)
                self._configure(stream.extra(SocketAttribute.raw_socket))
            handshake = proto.Handshake(address.export)
            while handshake.result is None:
                if out := handshake.feed(await stream.receive(RECEIVE_BYTES)):
                    await stream.send(out)
            self._check_export(handshake.result)
            return _Connection(stream, handshake.result)
        except BaseException as error:
            if stream is not None:
                await anyio.aclose_forcefully(stream)
            if isinstance(error, _GONE) and not isinstance(error, NbdError):
                code = getattr(error, "errno", None) or errno.ECONNREFUSED
                why = str(error) or type(error).__name__
                raise NbdError(code, f"{self._name} cannot be reached: {why}") from error
            raise

    def _configure(self, raw: socket.socket) -> None:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that has vanished is noticed before the requests' time is up.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.timeout * 500))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(int(self.timeout / 2), 1))

    def _check_export(self, export: Export) -> None:
        if export.min_block_bytes > 1 << 16:
            raise NbdError(errno.EPROTO, f"{self._name} has blocks of {export.min_block_bytes} bytes")
        writes = not self._wanted_readonly and not export.flags & proto.NBD_FLAG_READ_ONLY
        if writes and not export.flags & proto.NBD_FLAG_SEND_FLUSH:
            raise NbdError(
                errno.ENOTSUP,
                f"{self._name} cannot flush, so no write is ever safe: open it with readonly=True",
            )
        old = self._export
        if old is not None and (
            (old.size_bytes, old.flags, old.min_block_bytes, old.max_request_bytes)
            != (export.size_bytes, export.flags, export.min_block_bytes, export.max_request_bytes)
        ):
            raise NbdError(errno.EPROTO, f"{self._name} is not what it was: {export} instead of {old}")

    async def _close(self) -> None:
        task, self._task = self._task, None
        while self._running:
            self._idle = anyio.Event()
            await self._idle.wait()
        self._closing = True
        for connection in self._live:
            await connection.disconnect()
        if task is not None:
            if self._live:
                self._break()
            else:
                task.cancel()
            await task.wait()
        self._unflushed.clear()
        self._share.give(self._unflushed_bytes)
