"""The disks of one machine: a backend each, a virtio block device, and what moves the data between them."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from aiokvm.aio.owner import owned
from aiokvm.arguments import checked, checked_init
from aiokvm.block import BlockBackend, Raw
from aiokvm.block.backend import SIZE_LIMIT
from aiokvm.errors import ConfigError, StateError
from aiokvm.machine import events
from aiokvm.machine.disk_core import CoreData
from aiokvm.machine.disk_loop import LoopData
from aiokvm.virtio.blk import (
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
    BlkLayout,
    VirtioBlk,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from contextlib import AsyncExitStack

    from aiokvm.aio import Loop, Task
    from aiokvm.block import Limit
    from aiokvm.logs import SeldomLogger

_OPERATIONS = {
    VIRTIO_BLK_T_IN: "read",
    VIRTIO_BLK_T_OUT: "write",
    VIRTIO_BLK_T_FLUSH: "flush",
    VIRTIO_BLK_T_DISCARD: "discard",
    VIRTIO_BLK_T_WRITE_ZEROES: "write_zeroes",
}


class DiskErrorPolicy(enum.Enum):
    """What follows when the host fails a request; in any case `DiskFailed` is emitted."""

    REPORT = "report"
    """The guest's request ends with an I/O error."""
    PAUSE = "pause"
    """The machine is paused and the request waits; `VM.resume` tries it again. A flush is never tried again:
    the host may have dropped the data, so it ends with an I/O error as well."""


@checked_init
@dataclass(frozen=True, slots=True)
class Disk:
    """A backend and how a machine has it as a disk; what `VM.create` makes of a bare backend, too.

    ``serial`` is what the guest sees as its ID, up to 20 ASCII characters. There are ``queues`` (1 to 16) of
    ``queue_size`` descriptors. ``cache`` is "writeback", where the guest says when its writes have to be
    durable, or "writethrough", where they are before they complete; a guest may change it. ``limit`` holds it
    back, and defaults to the backend's own. Raises ConfigError for what cannot be.
    """

    backend: BlockBackend
    serial: str = ""
    queues: int = 1
    queue_size: int = 256
    cache: Literal["writeback", "writethrough"] = "writeback"
    on_error: DiskErrorPolicy | Literal["report", "pause"] = DiskErrorPolicy.REPORT
    limit: Limit | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "on_error", DiskErrorPolicy(self.on_error))
        BlkLayout(0, serial=self.serial, queues=self.queues, queue_size=self.queue_size)

    def layout(self) -> BlkLayout:
        """What its driver is told; the backend is open."""
        backend = self.backend
        physical = getattr(backend, "physical_block_size", 4096)
        return BlkLayout(
            backend.size_bytes,
            block_size=backend.block_size,
            physical_block_size=max(physical, backend.block_size),
            readonly=backend.readonly,
            discard_granularity=backend.discard_granularity_bytes,
            serial=self.serial,
            queues=self.queues,
            queue_size=self.queue_size,
            writeback=self.cache == "writeback",
        )


@dataclass(frozen=True, slots=True)
class DiskStats:
    """What a disk has done so far: requests that succeeded, bytes, and what did not.

    ``throttled`` had to wait for the rate limit. ``in_flight`` is what the backend has at the moment.
    """

    reads: int
    writes: int
    flushes: int
    discards: int
    read_bytes: int
    written_bytes: int
    errors: int
    throttled: int
    in_flight: int


@owned
class VmDisk:
    """A disk of a machine, in ``vm.disks``; ``engine`` is "io_uring", "threads", or "loop"."""

    _owner: Loop | None = None

    def __init__(self, name: str, config: Disk, data: CoreData | LoopData) -> None:
        self.name = name
        self.config = config
        self.backend = config.backend
        self.device = VirtioBlk(config.layout(), data)
        self.engine = data.engine
        self.failures = 0
        """Requests that the host has failed. Of very many at once the first are told as events."""
        self._data = data

    def __repr__(self) -> str:
        return f"<VmDisk {self.name} {self.backend!r} by {self.engine}>"

    def stats(self) -> DiskStats:
        """What it has done so far, in numbers."""
        stats = self._data.stats()
        return DiskStats(**{name: stats[name] for name in DiskStats.__slots__})

    @checked
    async def resize(self, size_bytes: int) -> None:
        """Give the disk another size while the guest runs, and tell it. Raises ConfigError and OSError."""
        backend = self.backend
        if size_bytes % backend.block_size or not 0 < size_bytes < SIZE_LIMIT:
            raise ConfigError(f"{size_bytes} bytes are not a whole number of blocks of {backend.block_size}")
        resize = getattr(backend, "resize", None)
        if resize is None:
            raise ConfigError(f"a {type(backend).__name__} has the size that it has")
        # The guest never sees what is not there.
        if size_bytes < backend.size_bytes:
            self.device.resize(size_bytes)
        try:
            await resize(size_bytes)
        except BaseException:
            self.device.resize(backend.size_bytes)
            raise
        self.device.resize(size_bytes)


class Disks:
    """All of one machine; ``pause`` pauses it."""

    def __init__(
        self,
        loop: Loop,
        machine: str,
        hub: events.EventHub,
        logger: SeldomLogger,
        pause: Callable[[], Awaitable[None]],
    ) -> None:
        self._loop = loop
        self._machine = machine
        self._hub = hub
        self._logger = logger
        self._failures = logger.kind()
        self._pausing: Task | None = None
        self._pause_machine = pause
        self.all: tuple[VmDisk, ...] = ()

    async def open(self, disks: Iterable[Disk | BlockBackend], undo: AsyncExitStack) -> None:
        """Open the backends; ``undo`` closes them. Raises what they raise, and ConfigError."""
        for index, item in enumerate(disks):
            config = item if isinstance(item, Disk) else Disk(item)
            if any(config.backend is other.backend for other in self.all):
                raise ConfigError(f"{config.backend!r} is given twice")
            # So that what was opened is known here, whatever cancels meanwhile.
            await self._loop.uncancelled(lambda i=index, c=config: self._open(i, c, undo))  # type: ignore[misc]

    async def _open(self, index: int, config: Disk, undo: AsyncExitStack) -> None:
        backend = config.backend
        await backend.open()
        try:
            disk = self._make(f"{self._machine}/disk{index}", config)
        except BaseException:
            await backend.close()
            raise
        undo.push_async_callback(self._close, disk)
        self.all += (disk,)
        how = f": {disk._data.refused}, so not by io_uring" if disk._data.refused else ""
        self._logger.always.info("%s: %r by %s%s", disk.name, backend, disk.engine, how)

    def _make(self, name: str, config: Disk) -> VmDisk:
        backend = config.backend
        limit = config.limit or getattr(backend, "limit", None)
        pause = config.on_error is DiskErrorPolicy.PAUSE
        config.layout()  # refused before there is a thread
        disk: VmDisk

        def on_failed(type_: int, offset: int, length: int, error: int) -> None:
            self._on_failed(disk, type_, offset, length, error)

        def on_missed(count: int) -> None:
            disk.failures += count
            self._failures.error("%s: %d more requests failed", disk.name, count)

        def on_bug(error: Exception) -> None:
            self._failures.error("%s: %r raised", disk.name, backend, exc_info=error)

        data: CoreData | LoopData
        if type(backend) is Raw:
            data = CoreData(
                self._loop,
                backend,
                name,
                serial=config.serial,
                pause=pause,
                limit=limit,
                on_failed=on_failed,
                on_missed=on_missed,
            )
        else:
            data = LoopData(
                self._loop,
                backend,
                serial=config.serial,
                pause=pause,
                limit=limit,
                on_failed=on_failed,
                on_bug=on_bug,
            )
        disk = VmDisk(name, config, data)
        disk._owner = self._loop
        return disk

    async def _close(self, disk: VmDisk) -> None:
        """Of a machine that was never made: there is nothing to drain."""

        async def close() -> None:
            closed = disk.device.close()
            if closed is not None:
                await closed

        await self._loop.uncancelled(close)

    def retry(self) -> None:
        """The machine runs again: so does what has failed and waits."""
        for disk in self.all:
            disk._data.retry()

    def stop(self) -> None:
        """The machine has ended: it is not paused any more."""
        for disk in self.all:
            disk._owner = None
        if self._pausing:
            self._pausing.cancel()

    def _on_failed(self, disk: VmDisk, type_: int, offset: int, length: int, error: int) -> None:
        disk.failures += 1
        operation = _OPERATIONS.get(type_, str(type_))
        paused = disk.config.on_error is DiskErrorPolicy.PAUSE
        failure = OSError(error, os.strerror(error))
        self._failures.error("%s: %s of %d bytes at %d: %s", disk.name, operation, length, offset, failure)
        self._hub.emit(
            events.DiskFailed(self._machine, disk.name, operation, offset, length, failure, paused)
        )
        if paused and not self._pausing:
            self._pausing = self._loop.spawn(self._pause, f"{disk.name}: pause")

    async def _pause(self) -> None:
        try:
            await self._pause_machine()
        except StateError:
            pass  # it has ended
        finally:
            self._pausing = None
