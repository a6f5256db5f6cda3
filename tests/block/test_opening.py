"""What disks are made of and cannot be opened: every backend says so in the same way."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from aiokvm import ImageError
from aiokvm.aio import current_loop
from aiokvm.block import BlockBackend, Image, Overlay, Raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Make = Callable[[str], BlockBackend]

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["raw", "read-only", "direct", "image", "overlay"])
def make(request: pytest.FixtureRequest, memory_disk: Any) -> Make:
    makes: dict[str, Make] = {
        "raw": Raw,
        "read-only": lambda path: Raw(path, readonly=True),
        "direct": lambda path: Raw(path, direct=True),
        "image": Image,
        "overlay": lambda path: Overlay(memory_disk(bytes(1 << 16)), path),
    }
    return makes[request.param]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(bytes(4096))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        yield tmp_path


@pytest.mark.parametrize(
    "name",
    [
        *("no/such", "file/below", "folder", "fifo", "loop", "dangling", "socket"),
        *("n" * 300, "p/" * 3000, "a\0zero", "no \ud800 name"),
    ],
    ids=ascii,
)
async def test_what_no_disk_can_be_made_of_is_an_image_error(make: Make, place: Path, name: str) -> None:
    path = f"{place}/{name}"
    with anyio.fail_after(10), pytest.raises(ImageError) as caught:
        await make(path).open()
    assert str(caught.value).count(str(place)) == 1


@pytest.mark.parametrize("name", ["/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "/", ""])
async def test_what_is_there_and_is_no_disk(make: Make, name: str) -> None:
    with anyio.fail_after(10), pytest.raises(ImageError):
        await make(name).open()


async def test_an_errno_stays_to_be_seen(make: Make, place: Path) -> None:
    with pytest.raises(ImageError, match="No such file or directory") as caught:
        await make(f"{place}/no/such").open()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOENT


async def test_a_file_that_may_not_be_opened(
    make: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777, **how: Any) -> int:
        if os.fspath(path) == f"{place}/file":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really(path, flags, mode, **how)

    monkeypatch.setattr(os, "open", refuse)  # root may open everything
    with pytest.raises(ImageError, match="Permission denied"):
        await make(f"{place}/file").open()


async def test_a_disk_that_cannot_be_read(make: Make, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.fstat

    def fail(fd: int) -> os.stat_result:
        info = really(fd)
        if stat.S_ISREG(info.st_mode) and os.readlink(f"/proc/self/fd/{fd}") == f"{place}/file":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return info

    monkeypatch.setattr(os, "fstat", fail)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError, match="Input/output error"):
        await make(f"{place}/file").open()
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_backing_files_are_named(place: Path) -> None:
    image = place / "top.qcow2"
    header = bytearray(104)
    header[:8] = b"QFI\xfb\0\0\0\3"
    header[8:20] = (104).to_bytes(8, "big") + (8).to_bytes(4, "big")
    header[100:104] = (104).to_bytes(4, "big")
    raw = b"\xe2\x79\x2a\xca\0\0\0\3raw\0\0\0\0\0" + bytes(8)
    header[8:16] = (104 + len(raw)).to_bytes(8, "big")
    image.write_bytes((bytes(header) + raw + b"gone.img").ljust(4096, b"\0"))
    with pytest.raises(ImageError, match=r"top\.qcow2: backing file 'gone\.img': No such file"):
        await Image(image, backing=True).open()


@pytest.mark.parametrize("what", ["raw", "overlay", "overlay in memory"])
async def test_a_disk_whose_opening_is_cancelled_is_not_open(
    what: str, memory_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    (tmp_path / "raw").write_bytes(bytes(1 << 16))
    disk: Any = Raw(tmp_path / "raw")
    work = "_open"
    if what != "raw":
        base = memory_disk(bytes(1 << 16))
        disk = Overlay(base, tmp_path / "overlay" if what == "overlay" else None)
        work = "_open_file"
    function = getattr(disk, work)

    def slow() -> Any:
        began.set()
        go_on.wait()
        return function()

    async def use() -> None:
        async with disk:
            await anyio.lowlevel.checkpoint()

    await use()
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(disk, work, slow)
        using = current_loop().spawn(use, "using")
        await anyio.to_thread.run_sync(began.wait)
        using.cancel()
        await current_loop().turn()
        go_on.set()
        await using.wait()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    async with disk:
        assert await disk.read(0, 512) == bytes(512)
