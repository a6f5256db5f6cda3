"""The data of a raw disk: what the loop has to do with its I/O thread, which is ``_core/blk.c``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio

from aiokvm._core import ffi, lib
from aiokvm.errors import AiokvmError
from aiokvm.virtio.blk import SECTOR_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiokvm._core import Pointer
    from aiokvm.aio import Handle, Loop
    from aiokvm.block import Raw
    from aiokvm.ratelimit import Limit
    from aiokvm.virtio.device import VirtioHost
    from aiokvm.virtio.queue import Virtqueue

_ENGINES = {
    "auto": lib.AIOKVM_BLK_AUTO,
    "io_uring": lib.AIOKVM_BLK_IO_URING,
    "threads": lib.AIOKVM_BLK_THREADS,
}
# That events of one disk are told before the loop has a turn.
SLICE_NS = 300_000
_BROKEN = {
    lib.AIOKVM_BLK_EHEADER: "a request is shorter than its header",
    lib.AIOKVM_BLK_ESTATUS: "a request has no byte for its status that the device may write",
}


class CoreData:
    """`aiokvm.virtio.blk.BlkData` of a `Raw` that is open; closes it.

    ``on_failed(type, offset, length, errno)`` is told of requests that the host has failed, and
    ``on_missed(count)`` of how many more did at the same time. Raises AiokvmError if the thread cannot be
    had, or io_uring was forced and is refused.
    """

    def __init__(
        self,
        loop: Loop,
        raw: Raw,
        name: str,
        *,
        serial: str,
        pause: bool,
        limit: Limit | None,
        on_failed: Callable[[int, int, int, int], None],
        on_missed: Callable[[int], None],
    ) -> None:
        self._raw = raw
        self._loop = loop
        self._on_failed = on_failed
        self._on_missed = on_missed
        self._limit = limit  # lives as long as the thread
        self._host: VirtioHost | None = None
        # They keep guest RAM mapped until the kernel is done with it.
        self._queues: tuple[Virtqueue, ...] = ()
        self._resets = 0
        self._stopping = anyio.Lock()
        self._changed = anyio.Event()
        self._closed = anyio.Event()
        error = ffi.new("int *")
        # A thread's name has 15 bytes: keep what tells disks apart.
        thread = name if len(name.encode()) <= 15 else name.encode()[-15:].decode(errors="ignore")
        names = ffi.new("char[]", thread.encode()), ffi.new("char[]", serial.encode())
        config = ffi.new(
            "struct aiokvm_blk_config *",
            {
                "fd": raw.fd,
                "engine": _ENGINES[raw.engine],
                "threads": raw.threads,
                "readonly": raw.readonly,
                "discard": raw.discards,
                "pause": pause,
                "align": raw.align,
                "capacity_sectors": raw.size_bytes // SECTOR_BYTES,
                "limit": limit.core if limit else ffi.NULL,
                "name": names[0],
                "id": names[1],
            },
        )
        core = lib.aiokvm_blk_new(config, error)
        if not core:
            raise AiokvmError(f"no I/O thread for {raw.path} ({raw.engine}): {os.strerror(error[0])}")
        self._core: Pointer | None = core
        self._event = ffi.new("struct aiokvm_blk_event *")
        self._stats = ffi.new("struct aiokvm_blk_stats *")
        self._watch: Handle | None = loop.watch(lib.aiokvm_blk_fd(core), self._on_news)
        refused = ffi.new("int *")
        is_uring = lib.aiokvm_blk_engine(core, refused) == lib.AIOKVM_BLK_IO_URING
        self.engine = "io_uring" if is_uring else "threads"
        self.refused = os.strerror(refused[0]) if refused[0] else ""
        """Why io_uring is not used though it was tried."""

    def stats(self) -> dict[str, int]:
        """The fields of ``struct aiokvm_blk_stats``, as they are or last were."""
        if self._core:
            lib.aiokvm_blk_stats(self._core, self._stats)
        return {name: getattr(self._stats, name) for name, _ in ffi.typeof(self._stats[0]).fields}

    def retry(self) -> None:
        """Submit again what has failed and waits."""
        if self._core:
            lib.aiokvm_blk_retry(self._core)

    # `aiokvm.virtio.blk.BlkData`.

    def activate(self, host: VirtioHost, features: int, queues: Sequence[Virtqueue]) -> None:
        core = self._core
        if not core:
            return
        self._host = host
        self._queues = tuple(queues)
        self._check(lib.aiokvm_blk_set_features(core, features))
        for index, queue in enumerate(queues):
            if queue.ready:
                kick = host.take_queue(index)
                self._check(lib.aiokvm_blk_set_queue(core, index, queue.core, kick))
        self._check(lib.aiokvm_blk_run(core, host.notifier))

    def notified(self, queue: int) -> None:
        """The thread has looked by itself."""

    def reset(self) -> Awaitable[None] | None:
        if not self._core or not self._host:
            return None
        self._resets += 1
        lib.aiokvm_blk_stop(self._core, -1)
        return self._stopped()

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        return self._without(queue) if self._core and self._host else None

    def set_writeback(self, writeback: bool) -> None:
        if self._core:
            lib.aiokvm_blk_set_writeback(self._core, writeback)

    def set_capacity(self, sectors: int) -> None:
        if self._core:
            lib.aiokvm_blk_set_capacity(self._core, sectors)

    def close(self) -> Awaitable[None] | None:
        if self._core:
            lib.aiokvm_blk_exit(self._core)
        return self._closed.wait()

    async def _idle(self) -> Pointer | None:
        """Returns when the thread is; None if it has ended."""
        while self._core:
            if lib.aiokvm_blk_state(self._core) == lib.AIOKVM_BLK_IDLE:
                return self._core
            await self._changed.wait()
        return None

    async def _stopped(self) -> None:
        core = await self._idle()
        if core:
            for index in range(len(self._queues)):
                lib.aiokvm_blk_set_queue(core, index, ffi.NULL, -1)
            self._queues = ()
            self._host = None

    async def _without(self, queue: int) -> None:
        resets = self._resets
        async with self._stopping:
            if not self._core or resets != self._resets:
                return
            lib.aiokvm_blk_stop(self._core, queue)
            core = await self._idle()
            if core and self._host and resets == self._resets:
                lib.aiokvm_blk_set_queue(core, queue, ffi.NULL, -1)
                self._check(lib.aiokvm_blk_run(core, self._host.notifier))

    def _check(self, code: int) -> None:
        if code:
            raise AiokvmError(f"the I/O thread of {self._raw.path}: {os.strerror(-code)}")

    def _on_news(self) -> None:
        core = self._core
        assert core is not None
        # What came between the reading and this look rings again.
        os.eventfd_read(lib.aiokvm_blk_fd(core))
        event = self._event
        deadline_ns = self._loop.now_ns() + SLICE_NS
        while lib.aiokvm_blk_take(core, event):
            if event.kind == lib.AIOKVM_BLK_FAILED:
                self._on_failed(event.type, event.offset, event.length, event.error)
            elif event.kind == lib.AIOKVM_BLK_MISSED:
                self._on_missed(event.missed)
            elif self._host:
                error = event.error
                words = _BROKEN.get(error) or ffi.string(lib.aiokvm_vring_strerror(error)).decode()
                self._host.needs_reset(f"queue {event.queue}: {words}")
            if self._loop.now_ns() >= deadline_ns:
                os.eventfd_write(lib.aiokvm_blk_fd(core), 1)  # the rest when others have had their turn
                return
        if lib.aiokvm_blk_state(core) == lib.AIOKVM_BLK_EXITED:
            self._on_exited(core)
        self._changed.set()
        self._changed = anyio.Event()

    def _on_exited(self, core: Pointer) -> None:
        """Also when nobody waits any more: until here RAM, file and limit were in use."""
        lib.aiokvm_blk_stats(core, self._stats)
        if self._watch:
            self._watch.cancel()
            self._watch = None
        lib.aiokvm_blk_join(core)
        lib.aiokvm_blk_free(core)
        self._core = None
        self._queues = ()
        self._host = None
        self._loop.spawn(self._close_file, f"{self._raw.path}: close")

    async def _close_file(self) -> None:
        try:
            await self._raw.close()
        finally:
            self._closed.set()
