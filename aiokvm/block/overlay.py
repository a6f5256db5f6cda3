"""Copy on write: a disk that reads as another, and keeps what is written to it elsewhere."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.block.backend import BlockBackend, Data
from aiokvm.block.file import File, in_thread, open_file, opening, read_at, write_at
from aiokvm.errors import ConfigError, ImageError
from aiokvm.proto import overlay as proto
from aiokvm.proto.overlay import Bitmap, Layout

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

COMMIT_BYTES = 1 << 20
"""What `Overlay.commit` moves while requests wait."""
FLUSH_PAGES = 256
"""Of the bitmap, written at a time."""


class _Gate:
    """Requests go in together; who has to be alone waits until they have left, and holds new ones back."""

    def __init__(self) -> None:
        self._inside = 0
        self._left = anyio.Event()
        self._alone = anyio.Lock()
        self._opened: anyio.Event | None = None

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        while self._opened is not None:
            await self._opened.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._left.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._alone:
            opened = self._opened = anyio.Event()
            try:
                while self._inside:
                    self._left = anyio.Event()
                    await self._left.wait()
                yield
            finally:
                self._opened = None
                opened.set()


@dataclass(slots=True, eq=False)
class _Claim:
    """Clusters from start to end are being put into the overlay; others who want to wait for it."""

    start: int
    end: int
    ended: anyio.Event = field(default_factory=anyio.Event)


@owned
class Overlay(BlockBackend):
    """A disk that reads as ``base`` and leaves it alone: what is written is kept in a file, or in memory.

    The file at ``path`` is made if it is not there or empty, and is sparse; docs/storage.md describes its
    format. It belongs to this base: that the base still is what it was is not checked, apart from its size.
    It is locked while it is open. Without a path at most ``memory_bytes`` of memory hold the changes, until
    `close`; a write beyond it fails with ENOSPC.

    ``cluster_bytes``, a power of two from 4 KiB to 2 MiB, is what is copied from the base when a part of it
    is first written; a file that is there keeps its own. An overlay opens and closes its base; it needs to be
    able to write it only for `commit`.

    `open` raises what the base raises, and ImageError if the file cannot be opened or made, another has it
    open, or it is no overlay, damaged, or one of a base of another size. ConfigError if the arguments make no
    sense.
    """

    @checked
    def __init__(
        self,
        base: BlockBackend,
        path: str | os.PathLike[str] | None = None,
        *,
        cluster_bytes: int = 1 << 16,
        memory_bytes: int = 1 << 30,
    ) -> None:
        low, high = proto.CLUSTER_BYTES
        if not low <= cluster_bytes <= high or cluster_bytes & (cluster_bytes - 1):
            raise ConfigError(
                f"clusters of {cluster_bytes} bytes: a power of two from 4 KiB to 2 MiB is meant"
            )
        if memory_bytes < cluster_bytes:
            raise ConfigError(f"{memory_bytes} bytes of memory do not hold one cluster of {cluster_bytes}")
        self.base = base
        self.path = None if path is None else Path(path)
        self.memory_bytes = memory_bytes
        self._cluster_bytes = cluster_bytes
        self._file: File | None = None

    async def open(self) -> None:
        if self._file is not None:
            raise OSError(errno.EBUSY, "the overlay is open")
        await self.base.open()
        made: list[tuple[int, Layout, Bitmap]] = []
        try:
            if self.base.block_size > self._cluster_bytes:
                raise ImageError(
                    f"clusters are smaller than the base's blocks of {self.base.block_size} bytes"
                )
            with opening(self.path or "an overlay in memory"):
                await in_thread(lambda: made.append(self._open_file()))
        except BaseException:
            for fd, _, _ in made:
                os.close(fd)
            await current_loop().uncancelled(self.base.close)
            raise
        fd, self._layout, self._bitmap = made[0]
        self.size_bytes = self.base.size_bytes
        self.block_size = self.base.block_size
        self.discard_granularity_bytes = self._layout.cluster_bytes
        self._gate = _Gate()
        self._claims: list[_Claim] = []
        self._flush_lock, self._commit_lock = anyio.Lock(), anyio.Lock()
        self._failed: OSError | None = None  # a sync has, and what it was to make safe may be lost
        self._base_written = False  # since it was flushed
        self._file = File(fd, self.memory_bytes if self.path is None else None)
        self._owner = current_loop()

    async def close(self) -> None:
        if self._file is not None:
            await current_loop().uncancelled(self._close)

    async def read(self, offset: int, length: int) -> Data:
        self.check(offset, length)
        async with self._gate.together():
            file = self._opened()
            start, end = self._clusters(offset, length)
            parts: list[Data] = []
            for first, last, here in list(self._bitmap.runs(start, end)):
                low = max(offset, first * self._layout.cluster_bytes)
                high = min(offset + length, last * self._layout.cluster_bytes)
                if here:
                    parts.append(await file.read(self._place(low), high - low))
                else:
                    parts.append(await self.base.read(low, high - low))
            return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(self, offset: int, data: memoryview) -> None:
        self.check(offset, len(data), writes=True)
        async with self._gate.together():
            file = self._opened()
            start, end = self._clusters(offset, len(data))
            claim = await self._claim(start, end)
            if claim is None:
                await file.write(self._place(offset), data)
                return
            try:
                low, high = self._span(start, end)
                head: Data = b""
                tail: Data = b""
                if low < offset and not self._bitmap[start]:
                    head = await self.base.read(low, offset - low)
                finish = offset + len(data)
                if finish < high and not self._bitmap[end - 1]:
                    tail = await self.base.read(finish, high - finish)
                await file.write(self._place(offset - len(head)), head, data, tail)
                self._bitmap.set(start, end)
            finally:
                self._release(claim)

    async def flush(self) -> None:
        """Data, then the bitmap: what it says is here always is."""
        self._opened()
        async with self._gate.together():
            file = self._opened()
            if self._failed is not None:
                raise OSError(self._failed.errno, f"an earlier flush failed: {self._failed.strerror}")
            async with self._flush_lock:
                await self._flush(file)

    async def discard(self, offset: int, length: int) -> None:
        self.check(offset, length, writes=True)
        async with self._gate.together():
            await self._zero(*self._whole_clusters(offset, length))

    async def write_zeroes(self, offset: int, length: int, unmap: bool = False) -> None:
        self.check(offset, length, writes=True)
        start, end = self._whole_clusters(offset, length)
        if not unmap or start >= end:
            await super().write_zeroes(offset, length, unmap)
            return
        low, high = self._span(start, end)
        if offset < low:
            await super().write_zeroes(offset, low - offset)
        if high < offset + length:
            await super().write_zeroes(high, offset + length - high)
        async with self._gate.together():
            await self._zero(start, end)

    async def commit(self) -> None:
        """Writes all changes into the base, flushes it, and drops them here. OSError with EROFS if it cannot.

        Requests go on meanwhile, a MiB at a time in turn with it; what is written behind it stays a change.
        If it fails or is cancelled, what has been moved is in the base, and the disk reads as before.
        """
        self._opened()
        if self.base.readonly:
            raise OSError(errno.EROFS, "the base is read-only: changes cannot be committed to it")
        async with self._commit_lock:
            moved: list[tuple[int, int]] = []
            at = 0
            while (run := await self._commit_next(at)) is not None:
                moved.append(run)
                at = run[1]
            await self.flush()
            for start, end in moved:
                async with self._gate.alone():
                    file = self._opened()
                    for first, last, here in list(self._bitmap.runs(start, end)):
                        if not here:
                            await file.free(
                                self._place(self._span(first, last)[0]), self._length(first, last)
                            )

    async def discard_changes(self) -> None:
        """Drops all changes, at once: the disk reads as its base, also after a crash in the middle."""
        self._opened()
        async with self._commit_lock, self._gate.alone():
            # From the file's new head on it has to happen here, too.
            await current_loop().uncancelled(partial(self._discard_changes, self._opened()))

    async def _discard_changes(self, file: File) -> None:
        layout = replace(self._layout, bitmap=1 - self._layout.bitmap)
        bitmap = await in_thread(partial(Bitmap, layout))
        if self.path is not None:
            await file.zero(layout.bitmap_offset(layout.bitmap), layout.bitmap_bytes)
            await file.sync()
            await file.write(0, layout.pack())
            await file.sync()
        self._layout, self._bitmap = layout, bitmap
        await file.free(layout.data_offset, layout.size_bytes)

    # Clusters.

    def _opened(self) -> File:
        if self._file is None:
            raise OSError(errno.EBADF, "the overlay is not open")
        return self._file

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        size = self._layout.cluster_bytes
        return offset // size, -(-(offset + length) // size)

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Those that lie in the range wholly; the disk's last one may be shorter than the others."""
        size, end = self._layout.cluster_bytes, offset + length
        return -(-offset // size), self._layout.clusters if end == self.size_bytes else end // size

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """Where clusters begin and end on the disk."""
        size = self._layout.cluster_bytes
        return start * size, min(end * size, self.size_bytes)

    def _length(self, start: int, end: int) -> int:
        low, high = self._span(start, end)
        return high - low

    def _place(self, offset: int) -> int:
        """Where it is in the file."""
        return self._layout.data_offset + offset

    async def _claim(self, start: int, end: int) -> _Claim | None:
        """The right to put clusters into the overlay; None if all are here already."""
        while next(self._bitmap.runs(start, end)) != (start, end, True):
            for other in self._claims:
                if other.start < end and start < other.end:
                    await other.ended.wait()
                    break
            else:
                claim = _Claim(start, end)
                self._claims.append(claim)
                return claim
        return None

    def _release(self, claim: _Claim) -> None:
        self._claims.remove(claim)
        claim.ended.set()

    async def _zero(self, start: int, end: int) -> None:
        """Whole clusters become holes that the overlay has: what the base has there stays hidden."""
        file = self._opened()
        if start >= end:
            return
        claim = await self._claim(start, end)
        try:
            await file.zero(self._place(self._span(start, end)[0]), self._length(start, end))
            self._bitmap.set(start, end)
        finally:
            if claim is not None:
                self._release(claim)

    async def _commit_next(self, at: int) -> tuple[int, int] | None:
        """Moves some of the next changes to the base. It has them before they are no longer here."""
        async with self._gate.alone():
            file = self._opened()
            start = self._bitmap.next(at)
            if start is None:
                return None
            most = max(COMMIT_BYTES // self._layout.cluster_bytes, 1)
            _, end, _ = next(self._bitmap.runs(start, min(start + most, self._layout.clusters)))
            offset, length = self._span(start, end)[0], self._length(start, end)
            data = await file.read(self._place(offset), length)
            self._base_written = True
            if data == bytes(length):
                await self.base.write_zeroes(offset, length, unmap=True)
            else:
                await self.base.write(offset, memoryview(data))
            # The file goes on saying that they are here until the base is flushed, and has them until then.
            self._bitmap.set(start, end, False)
            return start, end

    # The file.

    def _open_file(self) -> tuple[int, Layout, Bitmap]:
        wanted = Layout(self.base.size_bytes, self._cluster_bytes)
        if self.path is None:
            fd = os.memfd_create("aiokvm-overlay", os.MFD_CLOEXEC)
        else:
            fd = open_file(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if self.path is None:
                os.ftruncate(fd, wanted.file_bytes)
                return fd, wanted, Bitmap(wanted)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ImageError("no regular file, which an overlay is kept in")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ImageError("it is locked: another has the overlay open") from error
            return fd, *self._load(fd, wanted, self.path)
        except BaseException:
            os.close(fd)
            raise

    def _load(self, fd: int, wanted: Layout, path: Path) -> tuple[Layout, Bitmap]:
        length = os.fstat(fd).st_size
        if not length:
            write_at(fd, 0, wanted.pack())
            length = proto.PAGE_BYTES
        layout = proto.unpack(os.pread(fd, proto.PAGE_BYTES, 0))
        if layout.size_bytes != wanted.size_bytes:
            raise ImageError(
                f"it is the overlay of a disk of {layout.size_bytes} bytes, and its base has "
                f"{wanted.size_bytes}"
            )
        # Only a file that was being made when its maker was stopped is a header alone.
        if length == proto.PAGE_BYTES:
            os.ftruncate(fd, layout.file_bytes)
            os.fsync(fd)
            _sync_directory(path.parent)
        elif length != layout.file_bytes:
            raise ImageError(f"it has {length} bytes instead of {layout.file_bytes}")
        bits = read_at(fd, layout.bitmap_offset(layout.bitmap), layout.bitmap_bytes)
        return layout, Bitmap(layout, bits)

    async def _flush(self, file: File) -> None:
        bitmap = self._bitmap
        runs = bitmap.take_dirty(FLUSH_PAGES) if self.path is not None else []
        copies: list[bytes] = []
        try:
            # Clusters that come meanwhile may be in the copies: they are synced before these are written.
            for run in runs:
                copies.append(bitmap.pages(run))
                await current_loop().turn()
            if self._base_written:
                await self.base.flush()
                self._base_written = False
            if self.path is None:
                return
            await self._sync(file)
            for run, copy in zip(runs, copies, strict=True):
                at = self._layout.bitmap_offset(self._layout.bitmap) + run.start * proto.PAGE_BYTES
                await file.write(at, copy)
            if runs:
                await self._sync(file)
        except BaseException:
            bitmap.dirty.update(*runs)
            raise

    async def _sync(self, file: File) -> None:
        async def sync() -> None:
            try:
                await file.sync()
            except OSError as error:
                self._failed = error
                raise

        # The kernel reports a failure once: a cancellation must not hide it.
        await current_loop().uncancelled(sync)

    async def _close(self) -> None:
        async with self._gate.alone():
            file, self._file = self._file, None
            self._owner = None
            if file is not None:
                try:
                    await file.close()
                finally:
                    await self.base.close()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
