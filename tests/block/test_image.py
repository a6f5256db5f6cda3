from __future__ import annotations

import errno
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from aiokvm import ConfigError, ImageError
from aiokvm.aio import current_loop
from aiokvm.block import Image, Raw
from aiokvm.block import image as module
from aiokvm.process import Folder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio

MIB = 1 << 20


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary directories are made, and are gone after each test."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert list(directory.iterdir()) == []


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, stdout=subprocess.DEVNULL)


def contents(path: Path, image_format: str) -> bytes:
    """What an image holds, as qemu-img reads it."""
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-f", image_format, "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vhdx"])
async def test_an_image_is_known_and_holds_what_is_written(image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "an image, named strangely:x"
    qemu_img("create", "-q", "-f", image_format, path, "8M")
    model = bytearray(8 * MIB)
    chance = random.Random(3)
    async with Image(path) as disk:
        assert disk.size_bytes == 8 * MIB

        async def write(at: int, data: bytes) -> None:
            model[at : at + len(data)] = data
            await disk.write(at, memoryview(data))

        async with anyio.create_task_group() as tasks:
            for at in range(0, 8 * MIB, 128 << 10):
                tasks.start_soon(write, at + 512, chance.randbytes(chance.randrange(512, 65536, 512)))
        model[MIB : 2 * MIB] = bytes(MIB)
        await disk.write_zeroes(MIB, MIB, unmap=True)
        await disk.flush()
        assert bytes(await disk.read(0, 8 * MIB)) == model
    if image_format != "vmdk":  # which qemu-img check knows as well, but not for every grain
        qemu_img("check", "-f", image_format, path)
    assert contents(path, image_format) == model


async def test_discarded_clusters_of_a_qcow2_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    async with Image(path) as disk:
        await disk.write(0, memoryview(b"x" * 4 * MIB))
        await disk.flush()
        used = path.stat().st_blocks
        await disk.discard(0, 4 * MIB)
        await disk.flush()
    assert path.stat().st_blocks < used - 4000
    qemu_img("check", "-f", "qcow2", path)


def server_of(disk: Image) -> int:
    """The process that answers, not its keeper: when that is killed, it answers for a moment more."""
    assert disk._process is not None
    keeper = disk._process.pid
    (server,) = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    return int(server)


async def test_a_server_that_is_killed_is_started_again_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    model = bytearray(8 * MIB)
    async with Image(path) as disk:
        for round_number in range(4):

            async def write(at: int, value: int = round_number + 1) -> None:
                model[at : at + 4096] = bytes([value]) * 4096
                await disk.write(at, memoryview(bytes([value]) * 4096))

            async with anyio.create_task_group() as tasks:
                for at in range(round_number * 4096, 8 * MIB, 256 << 10):
                    tasks.start_soon(write, at)
                await anyio.lowlevel.checkpoint()
                os.kill(server_of(disk), signal.SIGKILL)
            assert bytes(await disk.read(0, 8 * MIB)) == model
        await disk.flush()
    qemu_img("check", "-f", "qcow2", "-r", "leaks", path)
    assert contents(path, "qcow2") == model


async def test_a_read_only_image(tmp_path: Path, raises_errno: Any) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    path.chmod(0o400)
    async with Image(path, readonly=True) as disk:
        assert disk.readonly
        with raises_errno(errno.EPERM):
            await disk.write(0, memoryview(bytes(512)))


async def test_one_image_is_written_by_one(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    async with Image(path):
        with pytest.raises(ImageError, match="lock"):
            await Image(path).open()


async def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    with pytest.raises(ImageError, match=r"block\.Raw"):
        await Image(path).open()
    with pytest.raises(ImageError, match="neither a file"):
        await Image(tmp_path).open()
    path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(MIB, b"\0"))
    with pytest.raises(ImageError, match=r"disk\.img"):  # qemu-nbd's own words
        await Image(path).open()
    with pytest.raises(ImageError, match="not vdi"):
        await Image(path, format="vdi").open()
    with pytest.raises(ConfigError, match="raw"):
        Image(path, format="raw")


async def test_a_missing_program_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ImageError, match="qemu-utils"):
        await Image(tmp_path / "x.qcow2").open()


async def test_backing_files_have_to_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"raw!" * (MIB // 4))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "middle.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    with pytest.raises(ImageError, match="backing=True"):
        await Image(tmp_path / "top.qcow2").open()
    async with Image(tmp_path / "top.qcow2", backing=True) as disk:
        assert await disk.read(0, 512) == b"raw!" * 128
        await disk.write(0, memoryview(bytes(512)))
        await disk.flush()
        # The base's first bytes do not make it anything but raw.
    assert (tmp_path / "base.raw").read_bytes() == b"raw!" * (MIB // 4)
    base = bytearray((tmp_path / "base.raw").read_bytes())
    base[:8] = b"QFI\xfb\0\0\0\3"
    (tmp_path / "base.raw").write_bytes(base)
    async with Image(tmp_path / "top.qcow2", backing=True) as disk:
        assert await disk.read(512, 512) == b"raw!" * 128


@pytest.mark.parametrize(
    ("backing", "backing_format", "message"),
    [
        ("nbd:localhost:1", "raw", "no file"),
        ('json:{"driver":"null-co"}', "raw", "no file"),
        ("base.raw", "", "not known"),
        ("none.raw", "raw", "No such file"),
        ("loop.qcow2", "qcow2", "more than"),
        ("base.raw", "qcow2", r"block\.Raw"),
    ],
)
async def test_what_a_chain_may_not_have(
    backing: str, backing_format: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    for name in ("disk.qcow2", "loop.qcow2"):
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / name, "1M")
        arguments = ["-F", backing_format or "raw", "-b", backing]
        qemu_img("rebase", "-u", "-f", "qcow2", *arguments, tmp_path / name)
    if not backing_format:
        data = bytearray((tmp_path / "disk.qcow2").read_bytes())
        at = data.index(bytes.fromhex("e2792aca"))
        data[at : at + 4] = b"none"
        (tmp_path / "disk.qcow2").write_bytes(data)
    with pytest.raises(ImageError, match=message):
        await Image(tmp_path / "disk.qcow2", backing=True).open()


def test_the_server_ends_with_a_process_that_is_killed(tmp_path: Path, temporary: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    program = (
        "import sys, anyio\n"
        "from aiokvm.block import Image\n"
        "async def main():\n"
        "    async with Image(sys.argv[1]) as disk:\n"
        "        print(disk._process.pid, disk._directory.path, flush=True)\n"
        "        await anyio.sleep_forever()\n"
        "anyio.run(main)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    ) as process:
        assert process.stdout is not None
        pid, directory = process.stdout.readline().split()
        server = os.pidfd_open(int(pid))
        process.kill()
    try:
        assert select.select([server], [], [], 30)[0], "qemu-nbd still runs"
    finally:
        os.close(server)
    # The next start removes what the killed one could not.
    assert Path(directory).exists()
    with Folder():
        assert not Path(directory).exists()


async def test_opening_that_is_cancelled_at_its_beginning_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    made: list[Folder] = []

    def slow() -> Folder:
        began.set()
        go_on.wait()
        made.append(Folder())
        return made[-1]

    monkeypatch.setattr(module, "Folder", slow)
    opening = current_loop().spawn(Image(tmp_path / "disk.qcow2").open, "opening")
    await anyio.to_thread.run_sync(began.wait)
    opening.cancel()
    go_on.set()
    await opening.wait()
    assert not made[0].path.exists()


async def test_a_place_for_temporary_files_with_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", "1M")
    place = tmp_path / ("x" * 150)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    async with Image(tmp_path / "disk.qcow2") as disk:
        assert disk.size_bytes == MIB


async def test_what_an_image_has_qemu_nbd_say_is_printable(tmp_path: Path) -> None:
    # A feature that qemu-nbd does not know, named by the image's own table.
    name = b"\x1b]0;owned\x07\x1b[2J\x1b[1;31mAll is well\x1b[0m\n"
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 16, MIB, 0, 1, 0x30000, 0x10000, 1, 0, 0)
    head = head[:72] + struct.pack(">QQQII", 1 << 60, 0, 0, 4, 104)
    table = struct.pack(">II", 0x6803F857, 48) + struct.pack(">BB46s", 0, 60, name) + bytes(8)
    path = tmp_path / "evil.qcow2"
    path.write_bytes((head + table).ljust(0x50000, b"\0"))
    with pytest.raises(ImageError, match=r"Unsupported qcow2 feature.*All is well") as caught:
        await Image(path).open()
    assert str(caught.value).isprintable()


async def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \x01"))
    os.mkdir(folder)
    (folder / "base.raw").write_bytes(b"raw!" * (MIB // 4))
    name = os.fsdecode(b"d\xefsk.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / name)
    for _ in range(2):
        async with Image(folder / name, backing=True) as disk:
            assert await disk.read(0, 512) == b"raw!" * 128
            assert disk._process is not None
            os.kill(disk._process.pid, signal.SIGKILL)
            await disk.write(512, memoryview(b"new!" * 128))
            assert await disk.read(512, 512) == b"new!" * 128
    with pytest.raises(ImageError, match="not vdi") as caught:
        await Image(folder / name, format="vdi").open()
    assert str(caught.value).isprintable()


async def test_a_raw_disk_is_not_read_while_qemu_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    os.truncate(path, MIB)  # whole blocks
    async with Image(path):
        for readonly in (True, False):
            with pytest.raises(ImageError, match="locked"):
                await Raw(path, readonly=readonly).open()
        async with Raw(path, readonly=True, lock=False):
            pass
    async with Raw(path, readonly=True), Raw(path, readonly=True):
        async with Image(path, readonly=True), Raw(path, readonly=True):
            pass
        with pytest.raises(ImageError, match="lock"):
            await Image(path).open()
