"""A file that coroutines read and write at positions: on worker threads, or at once if that is soon done."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import to_thread

from aiokvm._core import lib
from aiokvm.aio import current_loop
from aiokvm.block.backend import ZEROES_BYTES
from aiokvm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiokvm.block.backend import Data

T = TypeVar("T")

THREADS_MAX = 8
"""Worker threads that one file keeps busy."""
AT_ONCE_BYTES = 1 << 16
"""Up to here a file in memory is read and written by the loop: a thread would take longer than that lasts."""


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
        self._writing = 0  # bytes that threads are about to take of the memory
        self._limiter = anyio.CapacityLimiter(THREADS_MAX)

    async def _run(self, work: Callable[[], T], length: int) -> T:
        if self._memory_bytes is not None and length <= AT_ONCE_BYTES:
            return work()
        return await in_thread(work, self._limiter)

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """All of it, or EIO where the file ends before."""
        return await self._run(partial(read_at, self._fd, offset, length), length)

    async def write(self, offset: int, *parts: Data) -> None:
        """Writes them one behind the other, or ENOSPC if there is no room, in memory before anything is."""
        length = sum(map(len, parts))
        if self._memory_bytes is not None:
            used = os.fstat(self._fd).st_blocks * 512 + self._writing
            if used + length > self._memory_bytes:
                raise OSError(
                    errno.ENOSPC, f"{used} of {self._memory_bytes} bytes of memory are used: memory_bytes"
                )
        self._writing += length
        try:
            await self._run(partial(write_at, self._fd, offset, *parts), length)
        finally:
            self._writing -= length

    async def free(self, offset: int, length: int) -> None:
        """Gives a range back, where the file system can: it holds anything then."""
        result = await self._run(partial(lib.aiokvm_punch_hole, self._fd, offset, length), length)
        if result < 0 and result != -errno.EOPNOTSUPP:
            raise OSError(-result, os.strerror(-result))

    async def zero(self, offset: int, length: int) -> None:
        """Makes a range zeroes: a hole, where the file system can."""
        result = await self._run(partial(lib.aiokvm_punch_hole, self._fd, offset, length), length)
        if result == -errno.EOPNOTSUPP:
            for at in range(offset, offset + length, ZEROES_BYTES):
                await self.write(at, bytes(min(ZEROES_BYTES, offset + length - at)))
        elif result < 0:
            raise OSError(-result, os.strerror(-result))

    async def sync(self) -> None:
        """What has been written survives a crash of the host; in memory nothing does."""
        if self._memory_bytes is None:
            await in_thread(partial(os.fdatasync, self._fd), self._limiter)

    async def close(self) -> None:
        """Closes the descriptor."""
        await in_thread(partial(os.close, self._fd), self._limiter)


@contextmanager
def opening(what: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong is an ImageError that names the file; the errno is that of the OSError behind it."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{os.fspath(what)}: {error.args[0]}") from error.__cause__
    except OSError as error:
        raise ImageError(f"{os.fspath(what)}: {error.strerror or error}") from error


def open_file(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
    """A descriptor of what a disk is made of; OSError, or ImageError for what no file is named. Blocks."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except ValueError as error:  # a zero byte, or characters that names have none of here
        raise ImageError(f"no file has such a name: {error}") from error


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


def write_at(fd: int, offset: int, *parts: Data) -> None:
    """Writes all of the data, one part behind the other. Blocks."""
    for data in parts:
        view = memoryview(data)
        while view:
            count = os.pwrite(fd, view, offset)
            view = view[count:]
            offset += count
