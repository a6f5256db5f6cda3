"""What this process starts and makes elsewhere, and what becomes of it when this process is killed.

Programs end with this process, even by SIGKILL: a small parent of theirs, ``keeper``, watches it. Temporary
folders cannot remove themselves; the next process that makes one does it (`Folder`).
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING

import anyio

from aiokvm.process.folder import Folder, temporary_folder
from aiokvm.process.program import Process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Folder", "Process", "end", "start", "temporary_folder"]

_KEEPER = Path(__file__).with_name("keeper")


async def start(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    grace_s: float = 0.0,
) -> Process:
    """Start a program that ends with this process; `end` ends it before.

    It and all that it starts get SIGTERM then and, ``grace_s`` later, SIGKILL; with 0 SIGKILL at once. It
    belongs to no terminal. ``env`` is added to the environment. What is returned is its keeper, which has its
    streams, takes SIGTERM for it, and ends as it does. Raises FileNotFoundError if there is no such program.
    """
    whole = {**os.environ, **(env or {})}
    if shutil.which(argv[0], path=whole.get("PATH")) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
    keeper = [str(_KEEPER), str(os.getpid()), str(round(grace_s * 1000))]
    return Process(
        [*keeper, *argv],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        env=whole,
        start_new_session=True,  # a terminal's Ctrl-C is not for it
    )


async def end(process: Process) -> int:
    """End what `start` has returned, if it still runs, whatever is cancelled; return its status."""
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            process.terminate()
        # Its streams are closed after it: what it still says shall not kill it.
        await process.wait()
        await process.aclose()
    assert process.returncode is not None
    return process.returncode
