"""The data of a disk whose backend runs on the loop: each request is a task that awaits it."""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio

from aiokvm.budget import BOUNCE_BYTES, Share
from aiokvm.errors import VirtqueueError
from aiokvm.virtio.blk import (
    SECTOR_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)
from aiokvm.virtio.blk_request import BlkParser, BlkRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiokvm.aio import Loop
    from aiokvm.block import BlockBackend
    from aiokvm.ratelimit import Limit
    from aiokvm.virtio.device import VirtioHost
    from aiokvm.virtio.queue import Virtqueue

T = TypeVar("T")

# Requests under way; with pieces of this size a disk holds at most 64 MiB, whatever its guest asks for, and
# less where others have what the process may have.
MAX_REQUESTS = 64
PIECE_BYTES = 1 << 20
# That requests are taken from a queue before the loop has a turn.
SLICE_NS = 300_000


class _Copies:
    """Data that a disk's requests hold: a share of the process's budget, and one piece in any case."""

    def __init__(self) -> None:
        self._given = anyio.Event()
        self._held = 0
        self._share = Share(BOUNCE_BYTES)

    async def take(self, length: int) -> None:
        """Returns when there is room for so many bytes."""
        while not self._share.take(length):
            if not self._held:
                self._share.add(length)
                break
            await self._given.wait()
        self._held += length

    def give(self, length: int) -> None:
        """They are not held any more."""
        self._held -= length
        self._share.give(length)
        self._given.set()
        self._given = anyio.Event()


class LoopData:
    """`aiokvm.virtio.blk.BlkData` of a backend that is open; closes it.

    ``on_failed(type, offset, length, errno)`` is told of requests that the host has failed, and ``on_bug`` of
    what a backend has raised that is no OSError.
    """

    engine = "loop"
    refused = ""

    def __init__(
        self,
        loop: Loop,
        backend: BlockBackend,
        *,
        serial: str,
        pause: bool,
        limit: Limit | None,
        on_failed: Callable[[int, int, int, int], None],
        on_bug: Callable[[Exception], None],
    ) -> None:
        self._loop = loop
        self._backend = backend
        self._pause = pause
        self._limit = limit
        self._turn = anyio.Lock()  # at the limit: first come, first served
        self._on_failed = on_failed
        self._on_bug = on_bug
        self._parser = BlkParser(
            backend.size_bytes // SECTOR_BYTES, backend.block_size, backend.readonly, serial
        )
        self._host: VirtioHost | None = None
        self._queues: list[Virtqueue | None] = []
        self._dirty: set[int] = set()
        self._waiting: set[int] = set()  # queues with more than MAX_REQUESTS allow
        self._running: set[BlkRequest] = set()
        self._tasks: dict[BlkRequest, anyio.CancelScope] = {}
        self._copies = _Copies()
        self._ended = anyio.Event()
        self._retry = anyio.Event()
        self._writeback = True
        self._closed = False
        self._flush_failed = False
        self._stats = dict.fromkeys(
            ("reads", "writes", "flushes", "discards", "read_bytes", "written_bytes", "errors", "throttled"),
            0,
        )

    def stats(self) -> dict[str, int]:
        """As `CoreData.stats`, as far as it is known here."""
        return {**self._stats, "in_flight": len(self._running)}

    def retry(self) -> None:
        """Try again what has failed and waits."""
        self._retry.set()
        self._retry = anyio.Event()

    # `aiokvm.virtio.blk.BlkData`.

    def activate(self, host: VirtioHost, features: int, queues: Sequence[Virtqueue]) -> None:
        self._host = host
        self._queues = list(queues)
        self._parser.features = features

    def notified(self, queue: int) -> None:
        self._pump(queue)

    def reset(self) -> Awaitable[None] | None:
        """The tasks are the host's: it waits for their ends."""
        for scope in self._tasks.values():
            scope.cancel()
        self._forget()
        return None

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        tasks = [request for request in self._tasks if request.queue == queue]
        for request in tasks:
            self._tasks[request].cancel()
        if queue < len(self._queues):
            self._queues[queue] = None
        return self._gone(tasks) if tasks else None

    def set_writeback(self, writeback: bool) -> None:
        self._writeback = writeback

    def set_capacity(self, sectors: int) -> None:
        self._parser.capacity_sectors = sectors

    def close(self) -> Awaitable[None] | None:
        self.reset()
        if self._closed:
            return None
        self._closed = True
        return self._backend.close()

    def _forget(self) -> None:
        self._host = None
        self._queues = []
        self._dirty.clear()
        self._waiting.clear()

    async def _gone(self, requests: Sequence[BlkRequest]) -> None:
        while any(request in self._tasks for request in requests):
            await self._ended.wait()

    def _pump(self, index: int) -> None:
        """Starts what the queue has, as far as may be now. Raises VirtqueueError if it is broken."""
        queue = self._queues[index] if index < len(self._queues) else None
        if queue is None or self._host is None or queue.broken:
            return
        queue.disable_notify()
        deadline_ns = self._loop.now_ns() + SLICE_NS
        while self._loop.now_ns() < deadline_ns:
            if len(self._running) >= MAX_REQUESTS:
                self._waiting.add(index)
                return
            chain = queue.pop()
            if chain is None:
                if queue.enable_notify():
                    continue
                return
            try:
                request = self._parser.take(chain, index)
            except VirtqueueError:
                self._queues[index] = None
                raise
            if request is None:
                self._publish_soon(index)
            else:
                self._running.add(request)
                self._host.spawn(partial(self._serve, request), f"request of queue {index}")
        self._host.again(index)

    async def _serve(self, request: BlkRequest) -> None:
        try:
            with anyio.CancelScope() as scope:
                self._tasks[request] = scope
                if request.void:
                    return
                await self._allowed(request)
                status = await self._status(request)
                self._count(request, status)
                request.complete(status)
                self._publish_soon(request.queue)
        finally:
            self._tasks.pop(request, None)
            self._running.discard(request)
            self._ended.set()
            self._ended = anyio.Event()
            request.release()
            self._pump_waiting()

    def _pump_waiting(self) -> None:
        while self._waiting and self._host:
            self._host.again(self._waiting.pop())

    async def _allowed(self, request: BlkRequest) -> None:
        """Returns when the rate limit lets the request begin."""
        if not self._limit:
            return
        async with self._turn:
            wait_ns = self._limit.take(self._loop.now_ns(), request.cost_bytes)
            self._stats["throttled"] += wait_ns > 0
            while wait_ns:
                await self._loop.sleep_until(self._loop.now_ns() + wait_ns)
                wait_ns = self._limit.take(self._loop.now_ns(), request.cost_bytes)

    async def _status(self, request: BlkRequest) -> int:
        try:
            await self._do(request)
        except OSError as error:
            # Who keeps the error (a worker thread does) is not to keep guest RAM by it.
            error.__traceback__ = None
            if error.errno != errno.EOPNOTSUPP:
                return VIRTIO_BLK_S_IOERR
            # A discard is a hint.
            return VIRTIO_BLK_S_OK if request.type == VIRTIO_BLK_T_DISCARD else VIRTIO_BLK_S_UNSUPP
        return VIRTIO_BLK_S_OK

    async def _do(self, request: BlkRequest) -> None:
        backend = self._backend
        if request.type == VIRTIO_BLK_T_FLUSH:
            await self._flush(request)
            return
        # A backend may do without ever waiting: between two pieces the loop has a turn, whatever it is.
        if request.type in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT):
            for offset, length in request.pieces(PIECE_BYTES):
                if offset != request.offset:
                    await self._loop.turn()
                await self._move(request, offset, length)
        for part in request.ranges:
            if request.type == VIRTIO_BLK_T_DISCARD:
                work = partial(backend.discard, part.offset, part.length)
            else:
                work = partial(backend.write_zeroes, part.offset, part.length, part.unmap)
            await self._try(request, part.offset, part.length, work)
            await self._loop.turn()
        if not self._writeback and request.type in (VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES):
            await self._flush(request)

    async def _move(self, request: BlkRequest, offset: int, length: int) -> None:
        await self._copies.take(length)
        try:
            if request.type == VIRTIO_BLK_T_IN:
                request.write(await self._try(request, offset, length, partial(self._read, offset, length)))
            else:
                work = partial(self._backend.write, offset, request.read(length))
                await self._try(request, offset, length, work)
        finally:
            self._copies.give(length)

    async def _read(self, offset: int, length: int) -> memoryview:
        data = memoryview(await self._backend.read(offset, length))
        if len(data) != length:
            raise OSError(errno.EIO, f"read {len(data)} bytes where {length} were asked for")
        return data

    async def _flush(self, request: BlkRequest) -> None:
        # Whatever the backend says the second time: the guest must not believe what was lost to be safe.
        if self._flush_failed:
            self._on_failed(request.type, 0, 0, errno.EIO)
            raise OSError(errno.EIO, "an earlier flush has failed")
        try:
            await self._once(request, 0, 0, self._backend.flush)
        except OSError:
            self._flush_failed = True
            raise

    async def _try(
        self, request: BlkRequest, offset: int, length: int, work: Callable[[], Awaitable[T]]
    ) -> T:
        """Its result; an error of the host's is waited out if so configured."""
        while True:
            retry = self._retry
            try:
                return await self._once(request, offset, length, work)
            except OSError as error:
                if not self._pause or error.errno == errno.EOPNOTSUPP:
                    raise
                error.__traceback__ = None
            await retry.wait()

    async def _once(
        self, request: BlkRequest, offset: int, length: int, work: Callable[[], Awaitable[T]]
    ) -> T:
        try:
            return await work()
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                self._on_failed(request.type, offset, length, error.errno or errno.EIO)
            raise
        except Exception as error:
            self._on_bug(error)
            self._on_failed(request.type, offset, length, errno.EIO)
            error.__traceback__ = None
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _count(self, request: BlkRequest, status: int) -> None:
        stats = self._stats
        if status != VIRTIO_BLK_S_OK:
            stats["errors"] += 1
        elif request.type == VIRTIO_BLK_T_IN:
            stats["reads"] += 1
            stats["read_bytes"] += request.length
        elif request.type == VIRTIO_BLK_T_OUT:
            stats["writes"] += 1
            stats["written_bytes"] += request.length
        else:
            stats["flushes" if request.type == VIRTIO_BLK_T_FLUSH else "discards"] += 1

    def _publish_soon(self, index: int) -> None:
        """Once for all that ends in this turn of the loop."""
        if not self._dirty:
            self._loop.call_soon(self._publish)
        self._dirty.add(index)

    def _publish(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for index in dirty:
            queue = self._queues[index] if index < len(self._queues) else None
            if queue is not None and self._host is not None and queue.ready and queue.publish():
                self._host.interrupt(index)
