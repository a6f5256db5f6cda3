"""Temporary folders that a killed process does not leave behind for ever."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import to_thread

from aiokvm.aio import current_loop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType
    from typing import Self

_PREFIX = ".aiokvm-"


class Folder:
    """A temporary folder, gone when it is closed or the block is left.

    It lies in ``parent``, else where temporary files do, and is locked while its process lives: a process
    that makes its first one somewhere also removes those there whose processes have been killed. ``path`` is
    where it is, and `socket_path` a short name of what is in it.
    """

    def __init__(self, parent: Path | None = None) -> None:
        where = str(parent or tempfile.gettempdir())
        _sweep(where, os.getpid())
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=where))
            try:
                self._fd = _lock(self.path)
            except (BlockingIOError, FileNotFoundError):
                continue  # another process has swept it between the two
            except BaseException:
                self.path.rmdir()
                raise
            break

    def socket_path(self, name: str) -> str:
        """Return a path of a file in it that is short enough for a Unix socket, for this process alone.

        These have 107 bytes, which are fewer than a folder's path may have.
        """
        return f"/proc/self/fd/{self._fd}/{name}"

    def close(self) -> None:
        """Remove it and what is in it."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@asynccontextmanager
async def temporary_folder(parent: Path | None = None) -> AsyncIterator[Folder]:
    """Have a `Folder` while the block runs, made and removed by a worker thread, whatever is cancelled."""
    loop = current_loop()
    made: list[Folder] = []

    async def make() -> None:
        made.append(await to_thread.run_sync(Folder, parent))

    async def remove() -> None:
        for folder in made:
            await to_thread.run_sync(folder.close)

    try:
        await loop.uncancelled(make)
        yield made[0]
    finally:
        await loop.uncancelled(remove)


def _lock(path: Path) -> int:
    """Return a descriptor that locks the folder. Raises OSError if another process has it, or it is gone."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


@cache  # once a process and place, however many folders it makes there
def _sweep(where: str, _pid: int) -> None:
    """Remove the folders of this user's processes that are no more."""
    if os.environ.get("LAB") == "1":
        # What the host lends the lab may be in use there: locks of the host's are not seen in the lab.
        return
    found: list[str] = []
    # A place may be for making folders, and not for looking at others'.
    with suppress(PermissionError), os.scandir(where) as entries:
        found = [entry.path for entry in entries if entry.name.startswith(_PREFIX)]
    for path in found:
        with suppress(OSError):
            if os.lstat(path).st_uid == os.geteuid():
                fd = _lock(Path(path))
                try:
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(fd)
