"""Reading what is to be booted, without blocking the loop and without trusting the files."""

from __future__ import annotations

import os
import stat
from functools import partial
from typing import TYPE_CHECKING

from aiokvm.errors import BootError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import BinaryIO

    from aiokvm.aio import Loop


async def read_files(loop: Loop, paths: Iterable[Path], limit_bytes: int) -> dict[Path, bytes]:
    """The content of each file.

    Raises BootError for one that is missing, unreadable, not a regular file, or larger than ``limit_bytes``,
    which is what the guest's RAM could hold.
    """
    return {path: await loop.in_thread(partial(_read_file, path, limit_bytes)) for path in paths}


def _opened(path: Path) -> BinaryIO:
    # Opening a FIFO would wait for a writer. What an opener opens is closed if it is no file: a directory.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def _read_file(path: Path, limit_bytes: int) -> bytes:
    try:
        with _opened(path) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BootError(f"cannot boot {path}: it is not a regular file")
            if status.st_size > limit_bytes:
                raise BootError(
                    f"{path} ({status.st_size} bytes) is too large for the guest's RAM "
                    f"({limit_bytes} bytes): give the machine more memory"
                )
            # Not beyond what was checked: the file may be growing.
            return file.read(status.st_size)
    except OSError as error:
        raise BootError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BootError(f"cannot read {str(path)!r}: no file has such a name ({error})") from None
