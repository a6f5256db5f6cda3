"""A file that coroutines read and write at positions: on worker threads, or at once if it is in memory."""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import to_thread

from aiokvm._core import lib
from aiokvm.aio import current_loop
from aiokvm.block.backend import ZEROES_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.block.backend import Data

T = TypeVar("T")

THREADS_MAX = 8
"""Worker threads that one file keeps busy."""


async def in_thread(work: Callable[[], T], limiter: anyio.CapacityLimiter | None = None) -> T:
    """Run a function that blocks; it is waited for whatever cancels the caller."""
    return await current_loop().uncancelled(partial(to_thread.run_sync, work, limiter=limiter))


class File:
    """Owns a descriptor. What has begun is never abandoned, so that memory and order are the caller's.

    Each method raises OSError. ``memory_bytes``: the descriptor is a memfd that may take so much memory.
    """

    def __init__(self, fd: int, memory_bytes: int | None = None) -> None:
        self._fd = fd
        self._memory_bytes = memory_bytes
        self._limiter = anyio.CapacityLimiter(THREADS_MAX)

    async def _run(self, work: Callable[[], T]) -> T:
        return await in_thread(work, self._limiter) if self._memory_bytes is None else work()

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """All of it, or EIO where the file ends before."""
        return await self._run(partial(read_at, self._fd, offset, length))

    async def write(self, offset: int, data: Data) -> None:
        """Writes all of it, or ENOSPC if there is no room, in memory before anything is written."""
        if self._memory_bytes is not None:
            used = os.fstat(self._fd).st_blocks * 512
            if used + len(data) > self._memory_bytes:
                raise OSError(
                    errno.ENOSPC, f"{used} of {self._memory_bytes} bytes of memory are used: memory_bytes"
                )
        await self._run(partial(write_at, self._fd, offset, data))

    async def free(self, offset: int, length: int) -> None:
        """Gives a range back, where the file system can: it holds anything then."""
        result = await self._run(partial(lib.aiokvm_punch_hole, self._fd, offset, length))
        if result < 0 and result != -errno.EOPNOTSUPP:
            raise OSError(-result, os.strerror(-result))

    async def zero(self, offset: int, length: int) -> None:
        """Makes a range zeroes: a hole, where the file system can."""
        result = await self._run(partial(lib.aiokvm_punch_hole, self._fd, offset, length))
        if result == -errno.EOPNOTSUPP:
            for at in range(offset, offset + length, ZEROES_BYTES):
                await self.write(at, bytes(min(ZEROES_BYTES, offset + length - at)))
        elif result < 0:
            raise OSError(-result, os.strerror(-result))

    async def sync(self) -> None:
        """What has been written survives a crash of the host; in memory nothing does."""
        if self._memory_bytes is None:
            await self._run(partial(os.fdatasync, self._fd))

    async def close(self) -> None:
        """Closes the descriptor."""
        await self._run(partial(os.close, self._fd))


def read_at(fd: int, offset: int, length: int) -> bytes | bytearray:
    """All of a range of a file; EIO where it ends before. Blocks."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = bytearray(data)
    while len(parts) < length:
        data = os.pread(fd, length - len(parts), offset + len(parts))
        if not data:
            raise OSError(errno.EIO, f"the file ends at {offset + len(parts)}, not behind {offset + length}")
        parts += data
    return parts


def write_at(fd: int, offset: int, data: Data) -> None:
    """Writes all of the data. Blocks."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count
