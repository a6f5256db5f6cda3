"""Programs of Debian's packages, which end with the call that started them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import asynccontextmanager
from typing import IO, TYPE_CHECKING

from aiokvm import process
from aiokvm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

    from aiokvm.process import Process

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
    """Run a program as `aiokvm.process.start` does; it has ended when the block is left.

    Its language is C, so that messages can be read. Raises ``ImageError`` if the program is missing.
    """
    try:
        started = await process.start(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env={"LC_ALL": "C", **(env or {})},
            grace_s=grace_s,
        )
    except FileNotFoundError:
        package = PACKAGES.get(argv[0], argv[0])
        raise ImageError(f"the program {argv[0]} is missing: install the Debian package {package}") from None
    try:
        yield started
    finally:
        await process.end(started)


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
        ) as started:
            output, seen = bytearray(), 0
            if started.stdout is not None:
                async for chunk in started.stdout:
                    output += chunk
                    while line and (end := output.find(b"\n", seen)) >= 0:
                        line(bytes(output[seen:end]))
                        seen = end + 1
            status = await started.wait()
        if status:
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _STDERR_BYTES))
            raise failed(argv[0], status, stderr.read())
    return bytes(output)
