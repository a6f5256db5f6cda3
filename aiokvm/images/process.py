"""Child processes that end with the call that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import asynccontextmanager
from typing import IO, TYPE_CHECKING

import anyio

from aiokvm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from anyio.abc import Process

PACKAGES = {
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "newuidmap": "uidmap",
}
"""Debian's package of a program where the two differ in name."""

_STDERR_BYTES = 1000  # what of a failed program's complaints an error message shows: the end of them


@asynccontextmanager
async def child(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    grace_s: float = 0.0,
) -> AsyncIterator[Process]:
    """Run a program; if it still runs when the block is left, kill it and all that it started.

    Its language is C, so that messages can be read; ``env`` is added to the environment. With ``grace_s`` it
    may first clean up, after SIGTERM, for so many seconds. Raises ``ImageError`` if the program is missing.
    """
    try:
        process = await anyio.open_process(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            start_new_session=True,
        )
    except FileNotFoundError:
        package = PACKAGES.get(argv[0], argv[0])
        raise ImageError(f"the program {argv[0]} is missing: install the Debian package {package}") from None
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None and grace_s:
                os.killpg(process.pid, signal.SIGTERM)
                with anyio.move_on_after(grace_s):
                    await process.wait()
            # Only before it is reaped is the process group certain to be the child's.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            await process.aclose()


def failed(program: str, status: int, words: bytes) -> ImageError:
    """Return the error of a program that has failed, with the ``words`` that it said at its end."""
    first, *rest = words.decode(errors="replace").strip().splitlines() or ["it gave no reason"]
    return ImageError(f"{program} failed with status {status}: {first}", *rest)


async def run(
    argv: Sequence[str],
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.PIPE,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    grace_s: float = 0.0,
    line: Callable[[bytes], None] | None = None,
) -> bytes:
    """Run a program to its end and return its standard output; ``line`` sees each line as it comes.

    Returns nothing if ``stdout`` is a file; ``env`` and ``grace_s`` are as in `child`. Raises ``ImageError``
    with the end of its standard error if it fails or is missing.
    """
    with tempfile.TemporaryFile() as stderr:
        async with child(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=env, grace_s=grace_s
        ) as process:
            output, seen = bytearray(), 0
            if process.stdout is not None:
                async for chunk in process.stdout:
                    output += chunk
                    while line and (end := output.find(b"\n", seen)) >= 0:
                        line(bytes(output[seen:end]))
                        seen = end + 1
            status = await process.wait()
        if status:
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _STDERR_BYTES))
            raise failed(argv[0], status, stderr.read())
    return bytes(output)
