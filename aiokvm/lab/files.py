"""The files of the host that the Intel lab has: a squashfs image of some directories, made for each run."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from aiokvm.errors import ConfigError, ImageError, LabError
from aiokvm.images.process import run

if TYPE_CHECKING:
    from collections.abc import Iterable

# Where programs and what they load are, on a Debian. What else is in /usr/lib can be very large.
_SYSTEM = (
    "/bin",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/sbin",
    "/usr/bin",
    "/usr/lib/python3",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/sbin",
)
# What nothing that runs needs, or has a kernel of its own.
_LEFT_OUT = ("... *.a", "... .git", "... .mypy_cache", "... .ruff_cache", "usr/lib/modules")


def intel_files(workdir: Path, include: Iterable[Path] = ()) -> list[Path]:
    """Return the paths that the Intel lab has of the host's, none inside another.

    These are the programs and libraries of the system, this Python with what is installed for it, the working
    directory and ``include``. Raises ``ConfigError`` for one that is not there, and for the root directory.
    """
    named = [workdir, *include]
    for path in named:
        if path.resolve() == Path("/"):
            raise ConfigError("the Intel lab cannot have all of the host's files: name directories")
        if not path.exists():
            raise ConfigError(f"{path} is not there, for the Intel lab to have a copy of it")
    python = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sys.executable]
    python += [str(path) for path in Path(sys.base_prefix, "lib").glob("libpython*.so*")]
    python.append(str(Path(sys.base_prefix, "bin")))
    if sys.prefix != sys.base_prefix:
        python.append(sys.prefix)
    wanted = [*map(Path, (*_SYSTEM, *python)), *named]
    paths = {path.absolute() for path in wanted if os.path.lexists(path)}
    return sorted(path for path in paths if not paths.intersection(path.parents))


async def write_squashfs(image: Path, paths: Iterable[Path]) -> None:
    """Write an image of the paths, each where it is on the host. Raises ``LabError``."""
    names = [str(path).removeprefix("/") for path in paths]
    # Compressed it would take longer to write and to read.
    options = [
        "-no-strip",
        "-noI",
        "-noD",
        "-noF",
        "-noX",
        "-no-xattrs",
        "-no-progress",
        "-quiet",
        "-noappend",
    ]
    left_out = list(_LEFT_OUT)
    if sys.prefix != sys.base_prefix:
        # This Python does not look there.
        left_out.append(f"{sysconfig.get_path('stdlib')}/site-packages".removeprefix("/"))
    try:
        await run(["mksquashfs", *names, str(image), *options, "-wildcards", "-e", *left_out], cwd=Path("/"))
    except ImageError as error:
        raise LabError(f"cannot copy the host's files for the Intel lab: {error}") from error
