"""What a disk is connected to: the interface that every backend implements, aiokvm's own and a program's."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeAlias

from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from aiokvm.aio import Loop

Data: TypeAlias = bytes | bytearray | memoryview

ZEROES_BYTES = 1 << 20
"""What the default `BlockBackend.write_zeroes` writes at a time."""
SIZE_LIMIT = 1 << 63
"""What offsets in files are below."""


@owned
class BlockBackend(ABC):
    """A disk's contents: ``size_bytes`` bytes, read and written by coroutines on the event loop.

    A machine opens its backends before it starts and closes them after its last request. `size_bytes`,
    `block_size`, `readonly` and `discard_granularity_bytes` are right once `open` has returned, and do not
    change until `close`. A backend belongs to one machine, or to one `Overlay`, at a time.

    Requests. 0 <= offset, 0 < length, offset + length <= size_bytes, and both are multiples of block_size:
    who calls has checked that, and a backend may rely on it. No request is longer than 4 MiB, apart from
    discard and write_zeroes. A backend that is readonly gets no write, discard or write_zeroes.

    Concurrency. Any number of requests run at once, each in a task of its own; a disk's queue holds a few
    hundred. A backend orders them as it likes. What overlaps while it is in flight may take effect in either
    order, and a read sees either, block by block. A request that begins after another has returned sees all
    that the other did.

    Durability. When `flush` returns, all writes, discards and write_zeroes that had returned before it was
    called survive a crash of the process and of the host. Nothing else does, in any order. A flush that fails
    may have lost those writes: if so, every later flush has to fail as well, for a guest that tries again
    would believe them safe.

    Errors are OSError with an errno. The guest's request ends with an I/O error, whatever the errno, or its
    machine is paused if the disk is configured so. EOPNOTSUPP means that there is no such request here. Any
    other exception is a bug of the backend: it is logged with its traceback, and counts as EIO. After a
    failed write each of its blocks holds the old or the new data.

    Cancellation. A request that is cancelled may take effect or not, wholly or in part; it raises the
    cancellation only when it does not touch the caller's memory any more. No request waits without a bound.
    """

    size_bytes: int = 0
    """A multiple of block_size."""
    block_size: int = 512
    """Requests are multiples of it: a power of two from 512 to 64 KiB."""
    readonly: bool = False
    """Whether nothing can be written."""
    discard_granularity_bytes: int = 0
    """What a discard gives back at a time, in bytes; 0 if it does nothing here, and is not offered."""

    _owner: Loop | None = None

    @abstractmethod
    async def open(self) -> None:
        """Makes it ready, before anything else is asked of it. OSError or an `AiokvmError` if it cannot be.

        One that has raised left nothing behind, and needs no `close`.
        """

    @abstractmethod
    async def close(self) -> None:
        """Waits for the requests that are running, and gives everything back. It does not flush.

        A backend that is closed can be opened again. Cancelling the call does not keep it from giving
        everything back.
        """

    @abstractmethod
    async def read(self, offset: int, length: int) -> Data:
        """The ``length`` bytes at ``offset``: all of them, or OSError.

        What is given back is the caller's: it is not changed any more.
        """

    @abstractmethod
    async def write(self, offset: int, data: memoryview) -> None:
        """Writes all of ``data``, which is of format "B", or raises OSError.

        The data is guest memory: it is there until the request has ended, not longer, and the guest may
        change it meanwhile. A backend that looks at it twice copies it first.
        """

    @abstractmethod
    async def flush(self) -> None:
        """Makes what has been written so far durable (see above), or raises OSError."""

    async def discard(self, offset: int, length: int) -> None:  # noqa: ARG002
        """Nobody needs the range any more: it reads as zeroes or as what was there, each block.

        The default raises OSError with EOPNOTSUPP.
        """
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    async def write_zeroes(self, offset: int, length: int, unmap: bool = False) -> None:  # noqa: ARG002
        """The range reads as zeroes; with ``unmap`` its storage may be given back, without it is kept.

        The default writes zeroes, at most 1 MiB at a time.
        """
        zeroes = memoryview(bytes(min(length, ZEROES_BYTES)))
        end = offset + length
        while offset < end:
            piece = zeroes[: end - offset]
            await self.write(offset, piece)
            offset += len(piece)
            if offset < end:
                await current_loop().turn()  # a write may do without ever waiting

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def check(self, offset: int, length: int, *, writes: bool = False) -> None:
        """For backends: OSError if a request breaks the rules above; EPERM if it writes what is readonly."""
        if writes and self.readonly:
            raise OSError(errno.EPERM, "the disk is read-only")
        if (
            length <= 0
            or not 0 <= offset <= self.size_bytes - length
            or offset % self.block_size
            or length % self.block_size
        ):
            raise OSError(
                errno.EINVAL,
                f"{length} bytes at {offset} are not whole blocks of {self.block_size} bytes "
                f"inside a disk of {self.size_bytes} bytes",
            )
