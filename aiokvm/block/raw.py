"""A disk whose blocks lie in a file or on a block device, one after the other."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import to_thread

from aiokvm._core import lib
from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.block.backend import SIZE_LIMIT, BlockBackend
from aiokvm.block.file import in_thread, open_file, opening
from aiokvm.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.block.backend import Data
    from aiokvm.ratelimit import Limit

T = TypeVar("T")

ENGINES = ("auto", "io_uring", "threads")
MAX_THREADS = 64

_SECTOR = 512
_FLOCK = struct.Struct("hhqqi4x")
# QEMU's protocol (block/file-posix.c): a read lock of a byte from 100 on says what one does with a file, from
# 200 on what one does not let others do. Bit 0 is to read what nobody changes, bit 1 to write.
_READER_HOLDS = (100, 201)
_READER_REFUSES = (200, 101)
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10


@owned
class Raw(BlockBackend):
    """The bytes of ``path``, a regular file or a block device, as they are: no format is looked for.

    Given straight to a machine its data moves in C. ``engine`` is "io_uring", "threads" (a pool of at most
    ``threads``), or "auto": io_uring where it is allowed. ``direct`` bypasses the host's page cache.
    ``discard`` lets the guest's discards punch holes.

    While it is open the file is locked: two cannot write it, and none reads what another writes; any number
    may read. The lock is an OFD lock, which QEMU's tools see, too, and theirs are respected. A program that
    takes no lock is not noticed: what it changes under a disk that is read is read by the guest as it comes.
    ``lock=False`` is for file systems that have none.

    `open` raises ImageError if the file is not there or may not be opened, is locked, is of the wrong kind or
    size, or takes no direct I/O. A write past the end of a file that somebody has made shorter is EIO, and so
    is every flush after one that has failed.
    """

    @checked
    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        readonly: bool = False,
        direct: bool = False,
        discard: bool = True,
        engine: str = "auto",
        threads: int = 8,
        lock: bool = True,
        limit: Limit | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise ConfigError(f"engine {engine!r} is none of {', '.join(ENGINES)}")
        if not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"{threads} threads: a disk has 1 to {MAX_THREADS}")
        self.path = os.fspath(path)
        self.readonly = readonly
        self.direct = direct
        self.discards = discard and not readonly
        self.engine = engine
        self.threads = threads
        self.limit = limit
        self.fd = -1
        """While it is open."""
        self.align = 0
        """What direct I/O wants offsets, lengths and memory to be multiples of, in bytes; 0 without it."""
        self.physical_block_size = 4096
        self._lock = lock
        self._is_file = True
        self._flush_failed = False
        self._running = 0
        self._quiet = anyio.Event()
        self._limiter: anyio.CapacityLimiter | None = None

    def __repr__(self) -> str:
        return f"<Raw {self.path!r}{' read-only' if self.readonly else ''}>"

    async def open(self) -> None:
        if self.fd >= 0:
            raise ImageError(f"{self.path} is open already: a disk belongs to one machine at a time")
        with opening(self.path):
            try:
                await in_thread(self._open)
            except BaseException:
                # It had been opened when this was cancelled.
                await self.close()
                raise
        self._limiter = anyio.CapacityLimiter(self.threads)
        self._owner = current_loop()

    async def close(self) -> None:
        await current_loop().uncancelled(self._finish)

    async def _finish(self) -> None:
        while self._running:
            self._quiet = anyio.Event()
            await self._quiet.wait()
        fd, self.fd = self.fd, -1
        self._owner = None
        if fd >= 0:
            await to_thread.run_sync(self._close, fd)

    async def read(self, offset: int, length: int) -> Data:
        self.check(offset, length)
        return await self._call(lambda: self._read(offset, length))

    async def write(self, offset: int, data: memoryview) -> None:
        self.check(offset, len(data), writes=True)
        await self._call(lambda: self._write(offset, data))

    async def flush(self) -> None:
        await self._call(self._flush)

    async def discard(self, offset: int, length: int) -> None:
        self.check(offset, length, writes=True)
        if self.discards:
            await self._call(lambda: self._allocate(_FALLOC_FL_PUNCH_HOLE, offset, length))

    async def write_zeroes(self, offset: int, length: int, unmap: bool = False) -> None:
        self.check(offset, length, writes=True)
        mode = _FALLOC_FL_PUNCH_HOLE if unmap and self.discards else _FALLOC_FL_ZERO_RANGE
        try:
            await self._call(lambda: self._allocate(mode, offset, length))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            await super().write_zeroes(offset, length, unmap)

    @checked
    async def resize(self, size_bytes: int) -> None:
        """Makes the file longer or shorter; of a block device, takes note of a size that it has got.

        Raises ConfigError if it is no whole number of blocks or the device has less, EPERM if the disk is
        readonly and has another.
        """
        if not 0 < size_bytes < SIZE_LIMIT or size_bytes % self.block_size:
            raise ConfigError(f"{size_bytes} bytes are not a whole number of blocks of {self.block_size}")
        if self.readonly and size_bytes != await self._call(self._size):
            raise OSError(errno.EPERM, "the disk is read-only", self.path)
        if self._is_file and not self.readonly:
            await self._call(lambda: os.ftruncate(self.fd, size_bytes))
        elif size_bytes > await self._call(self._size):
            raise ConfigError(f"{self.path} has less than {size_bytes} bytes: make it longer first")
        self.size_bytes = size_bytes

    async def _call(self, work: Callable[[], T]) -> T:
        if self.fd < 0:
            raise OSError(errno.EBADF, "the disk is not open", self.path)
        self._running += 1
        try:
            # A thread that has begun is waited for whatever cancels: it touches the caller's memory.
            return await in_thread(work, self._limiter)
        finally:
            self._running -= 1
            if not self._running:
                self._quiet.set()

    # In a worker thread.

    def _open(self) -> None:
        flags = os.O_RDONLY if self.readonly else os.O_RDWR
        if self.direct:
            flags |= os.O_DIRECT
        try:
            fd = open_file(self.path, flags)
        except OSError as error:
            if self.direct and error.errno == errno.EINVAL:
                raise ImageError("its file system takes no direct I/O") from error
            raise
        try:
            self._look(fd)
            if self._lock:
                self._take_lock(fd)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        self._flush_failed = False

    def _close(self, fd: int) -> None:
        if self._lock:
            # By closing alone it would last as long as anything has the file: a child of fork, a ring's end.
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK))
        os.close(fd)

    def _look(self, fd: int) -> None:
        info = os.fstat(fd)
        if not (stat.S_ISREG(info.st_mode) or stat.S_ISBLK(info.st_mode)):
            raise ImageError("neither a file nor a block device")
        self._is_file = stat.S_ISREG(info.st_mode)
        block_size, physical = _SECTOR, info.st_blksize
        if not self._is_file:
            block_size, physical = _int_ioctl(fd, _BLKSSZGET), _int_ioctl(fd, _BLKPBSZGET)
        self.align = self._probe(fd) if self.direct else 0
        self.block_size = max(block_size, self.align)
        if physical & (physical - 1):
            physical = 4096
        self.physical_block_size = min(max(physical, self.block_size), 65536)
        self.discard_granularity_bytes = self.physical_block_size if self.discards else 0
        size = os.lseek(fd, 0, os.SEEK_END)
        if size % self.block_size or not size:
            raise ImageError(
                f"it has {size} bytes: a disk is a whole number of blocks of {self.block_size}, one at least"
            )
        self.size_bytes = size

    def _probe(self, fd: int) -> int:
        """The alignment of direct I/O: nothing that is as old as the kernels we run on tells it."""
        with mmap.mmap(-1, 2 * 4096) as buffer:
            for align in (512, 4096):
                with memoryview(buffer) as whole, whole[align : 2 * align] as piece:
                    try:
                        os.preadv(fd, [piece], align)
                    except OSError as error:
                        if error.errno != errno.EINVAL:
                            raise
                        continue
                return align
        raise ImageError("its file system takes no direct I/O of 512 or 4096 bytes")

    def _take_lock(self, fd: int) -> None:
        try:
            if not self.readonly:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK))
                return
            for byte in _READER_HOLDS:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
            locked = any(_is_locked(fd, byte) for byte in _READER_REFUSES)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise ImageError(f"it cannot be locked: {error.strerror}; lock=False goes without") from error
            locked = True
        if locked:
            how = "writes" if self.readonly else "uses"
            raise ImageError(
                f"it is locked: another machine or program {how} it; a disk may have one writer "
                "or many readers (readonly=True)"
            )

    def _size(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)

    def _check_size(self) -> None:
        # A write would make a file long again that somebody has cut: what is lost would read as zeroes.
        if self._is_file and os.fstat(self.fd).st_size < self.size_bytes:
            raise OSError(errno.EIO, "the image has been truncated", self.path)

    def _read(self, offset: int, length: int) -> Data:
        # Anonymous memory is aligned to pages.
        buffer = memoryview(mmap.mmap(-1, length)) if self.align else memoryview(bytearray(length))
        done = 0
        while done < length:
            n = os.preadv(self.fd, [buffer[done:]], offset + done)
            if not n:
                raise OSError(errno.EIO, "the image has been truncated", self.path)
            done += n
        return buffer

    def _write(self, offset: int, data: memoryview) -> None:
        self._check_size()
        if self.align:
            aligned = memoryview(mmap.mmap(-1, len(data)))
            aligned[:] = data
            data = aligned
        done = 0
        while done < len(data):
            done += os.pwritev(self.fd, [data[done:]], offset + done)

    def _flush(self) -> None:
        # The kernel tells of a failure once, and may have dropped the data.
        if self._flush_failed:
            raise OSError(errno.EIO, "an earlier flush has failed", self.path)
        try:
            os.fdatasync(self.fd)
        except OSError:
            self._flush_failed = True
            raise

    def _allocate(self, mode: int, offset: int, length: int) -> None:
        self._check_size()
        code = lib.aiokvm_fallocate(self.fd, mode | _FALLOC_FL_KEEP_SIZE, offset, length)
        if code:
            raise OSError(-code, os.strerror(-code), self.path)


def _flock(kind: int, byte: int | None = None) -> bytes:
    """A struct flock, for one byte or the whole file."""
    return _FLOCK.pack(kind, os.SEEK_SET, byte or 0, byte is not None, 0)


def _is_locked(fd: int, byte: int) -> bool:
    """Whether another has any lock there."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _int_ioctl(fd: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little")
