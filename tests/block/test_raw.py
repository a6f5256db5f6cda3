"""block/raw.py and limit.py."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

from aiokvm import ConfigError, ImageError
from aiokvm.aio import current_loop
from aiokvm.block import Limit, Raw

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    return path


async def test_what_is_written_is_read(image: Path) -> None:
    async with Raw(image) as disk:
        assert (disk.size_bytes, disk.block_size, disk.readonly) == (MIB, 512, False)
        await disk.write(512, memoryview(b"x" * 1024))
        assert bytes(await disk.read(0, 2048)) == bytes(512) + b"x" * 1024 + bytes(512)
        await disk.flush()
    assert image.read_bytes()[512:1536] == b"x" * 1024


async def test_a_format_is_never_guessed(image: Path) -> None:
    async with Raw(image) as disk:
        await disk.write(0, memoryview(b"QFI\xfb\0\0\0\x03".ljust(512, b"\0")))
    async with Raw(image) as disk:
        assert disk.size_bytes == MIB
        assert bytes(await disk.read(0, 512))[:4] == b"QFI\xfb"


async def test_requests_that_break_the_rules(image: Path) -> None:
    async with Raw(image, readonly=True) as disk:
        for offset, length in ((0, 0), (1, 512), (0, 513), (MIB, 512), (-512, 512)):
            with pytest.raises(OSError, match="not whole blocks"):
                await disk.read(offset, length)
        with pytest.raises(OSError, match="read-only") as caught:
            await disk.write(0, memoryview(bytes(512)))
        assert caught.value.errno == errno.EPERM


async def test_one_writer_or_many_readers(image: Path) -> None:
    async with Raw(image, readonly=True), Raw(image, readonly=True):
        with pytest.raises(ImageError, match="locked"):
            await Raw(image).open()
        async with Raw(image, lock=False):
            pass
    async with Raw(image):
        for readonly in (True, False):
            with pytest.raises(ImageError, match="locked"):
                await Raw(image, readonly=readonly).open()
    async with Raw(image):
        pass


async def test_a_disk_is_opened_once_and_again_after_its_close(image: Path) -> None:
    disk = Raw(image)
    await disk.open()
    with pytest.raises(ImageError, match="open already"):
        await disk.open()
    await disk.close()
    await disk.close()
    with pytest.raises(OSError, match="not open"):
        await disk.read(0, 512)
    async with disk:
        await disk.read(0, 512)


async def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="neither a file nor"):
        await Raw(tmp_path, readonly=True).open()
    with pytest.raises(ImageError, match="neither a file nor"):
        await Raw("/dev/full").open()
    for size in (0, 511, 513):
        path = tmp_path / "odd"
        path.write_bytes(bytes(size))
        with pytest.raises(ImageError, match="whole number of blocks"):
            await Raw(path).open()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with anyio.fail_after(10), pytest.raises(ImageError, match="neither a file nor"):
        await Raw(fifo).open()


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError):
        Raw("image", engine="dma")
    with pytest.raises(ConfigError):
        Raw("image", threads=0)
    with pytest.raises(ConfigError):
        Limit(bytes_per_second=-1)


async def test_direct(image: Path) -> None:
    disk = Raw(image, direct=True)
    try:
        await disk.open()
    except ImageError as error:
        pytest.skip(str(error))
    assert disk.block_size == disk.align in (512, 4096)
    data = bytes(range(256)) * 64
    await disk.write(4096, memoryview(b"odd" + data)[3:])
    assert bytes(await disk.read(4096, len(data))) == data
    await disk.close()


async def test_discard_and_write_zeroes(image: Path) -> None:
    image.write_bytes(b"x" * MIB)
    async with Raw(image) as disk:
        assert disk.discard_granularity_bytes >= 512
        before = image.stat().st_blocks
        await disk.discard(0, MIB // 2)
        assert image.stat().st_blocks < before
        await disk.write_zeroes(MIB // 2, 4096, unmap=False)
        await disk.write_zeroes(MIB - 4096, 4096, unmap=True)
        assert bytes(await disk.read(0, MIB // 2)) == bytes(MIB // 2)
        assert bytes(await disk.read(MIB // 2, 8192)) == bytes(4096) + b"x" * 4096
        assert bytes(await disk.read(MIB - 4096, 4096)) == bytes(4096)
    assert image.stat().st_size == MIB


async def test_discards_may_be_off(image: Path) -> None:
    image.write_bytes(b"x" * MIB)
    async with Raw(image, discard=False) as disk:
        assert disk.discard_granularity_bytes == 0
        await disk.discard(0, MIB)
        await disk.write_zeroes(0, 4096, unmap=True)
        assert bytes(await disk.read(0, 8192)) == bytes(4096) + b"x" * 4096


async def test_a_failed_fdatasync_is_sticky(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with Raw(image) as disk:
        await disk.flush()
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(OSError, match="error"):
            await disk.flush()
        monkeypatch.undo()
        for _ in range(3):
            with pytest.raises(OSError, match="earlier flush"):
                await disk.flush()
    assert len(calls) == 1


async def test_an_image_that_is_truncated_under_us(image: Path) -> None:
    async with Raw(image) as disk:
        os.truncate(image, MIB // 2)
        with pytest.raises(OSError, match="truncated"):
            await disk.read(MIB // 2 - 4096, 8192)
        with pytest.raises(OSError, match="truncated"):
            await disk.write(0, memoryview(bytes(512)))
        with pytest.raises(OSError, match="truncated"):
            await disk.write_zeroes(0, 512)
    assert image.stat().st_size == MIB // 2


async def test_resize(image: Path) -> None:
    async with Raw(image) as disk:
        await disk.resize(2 * MIB)
        assert disk.size_bytes == image.stat().st_size == 2 * MIB
        assert bytes(await disk.read(MIB, 512)) == bytes(512)
        await disk.resize(512)
        assert image.stat().st_size == 512
        for size in (0, 100, -512, 1 << 63, 10**30 * 512):
            with pytest.raises(ConfigError):
                await disk.resize(size)
    async with Raw(image, readonly=True) as disk:
        with pytest.raises(OSError, match="read-only"):
            await disk.resize(1024)


async def test_closing_waits_for_what_runs(image: Path) -> None:
    disk = Raw(image, threads=2)
    await disk.open()
    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(disk.read, 0, MIB)
        while disk._running < 8:
            await anyio.lowlevel.checkpoint()
        await disk.close()
        assert disk._running == 0


def test_a_limit_lets_a_burst_through() -> None:
    limit = Limit(operations_per_second=100, burst_operations=5)
    now = 10**9
    assert [limit.take(now, 0) for _ in range(6)] == [0] * 6
    assert limit.take(now, 0) == 10_000_000
    assert limit.take(now + 10_000_000, 0) == 0


async def test_a_request_that_is_cancelled_has_ended(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def slow(fd: int, *arguments: Any) -> int:
        began.set()
        go_on.wait()
        done.append(os.fstat(fd).st_ino)
        return pwritev(fd, *arguments)

    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", slow)
    disk = Raw(image)
    await disk.open()
    writing = current_loop().spawn(lambda: disk.write(0, memoryview(b"x" * 512)), "writing")
    await anyio.to_thread.run_sync(began.wait)
    writing.cancel()
    # Its descriptor and the caller's memory are still in use.
    closing = current_loop().spawn(disk.close, "closing")
    for _ in range(5):
        await current_loop().turn()
    closing.cancel()
    for _ in range(5):
        await current_loop().turn()
    assert disk.fd >= 0
    go_on.set()
    await writing.wait()
    assert done == [image.stat().st_ino]
    await closing.wait()
    assert disk.fd < 0
    assert image.read_bytes()[:512] == b"x" * 512
