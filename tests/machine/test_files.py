"""Reading what is to be booted: nothing but regular files of a bearable size, and the loop is never held."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest

from aiokvm import BootError
from aiokvm.aio import current_loop
from aiokvm.machine.files import read_files

pytestmark = pytest.mark.anyio


async def test_files_come_by_their_paths(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"kernel")
    other.write_bytes(b"")
    assert await read_files(current_loop(), [one, other], 6) == {one: b"kernel", other: b""}
    assert await read_files(current_loop(), [], 0) == {}


async def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(101))
    os.mkfifo(tmp_path / "fifo")
    for name, message in {
        "missing": "cannot read .*missing: No such file or directory",
        "large": r"large \(101 bytes\) is too large for the guest's RAM \(100 bytes\): give the machine more",
        "fifo": "cannot boot .*fifo: it is not a regular file",
        ".": "not a regular file|Is a directory",
    }.items():
        with anyio.fail_after(10), pytest.raises(BootError, match=message):
            await read_files(current_loop(), [tmp_path / name], 100)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
async def test_a_name_that_no_file_has_is_refused(name: str) -> None:
    with pytest.raises(BootError, match="no file has such a name"):
        await read_files(current_loop(), [Path(name)], 100)


async def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    with anyio.fail_after(10), pytest.raises(BootError, match="not a regular file"):
        await read_files(current_loop(), [tmp_path / "zero"], 1 << 30)


@pytest.mark.parametrize("name", ["fifo", "."])
async def test_no_descriptor_stays_open(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    await read_files(current_loop(), [], 0)
    with pytest.raises(BootError):
        await read_files(current_loop(), [tmp_path / name], 100)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(BootError):
            await read_files(current_loop(), [tmp_path / name], 100)
    assert len(os.listdir("/proc/self/fd")) == before
