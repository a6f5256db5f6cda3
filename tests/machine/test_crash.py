"""kill -9 of the program at any moment under a guest that writes: what a completed FLUSH covered is there.

The guest (tests/guests/blk_writer.c) fills sector after sector with numbered writes and tells, after each
FLUSH, below which number all are covered. The numbers come through a pipe, and when enough have come the
program is killed. ``AIOKVM_CRASHES`` says how often, for each kind of disk.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import anyio
import pytest

from aiokvm import block

pytestmark = pytest.mark.kvm

CRASHES = int(os.environ.get("AIOKVM_CRASHES", "5"))
GUESTS = Path(__file__).parents[1] / "guests"
SECTOR = 512
SECTORS = 251
BATCH = 4
STEP = 7
SIZE = 256 * SECTOR
MIX = 0x9E3779B97F4A7C15
# For a program to start, and for a killed one's server to let go of an image.
PATIENCE_S = 60.0

PROGRAM = """
import json, os, sys
import anyio
from aiokvm import VM, Device, block, boot

kind, image, path, first = json.loads(sys.argv[1])

def disk():
    if kind in ("io_uring", "threads"):
        return block.Raw(path, engine=kind)
    if kind == "overlay":
        return block.Overlay(block.Raw(path + ".base", readonly=True), path)
    return block.Image(path)

class Told(Device):
    def write(self, offset, size, value):
        os.write(1, value.to_bytes(4, "little"))

async def main():
    flat = boot.Flat(image, load=0x10000, entry=0x10000, mode="long")
    devices = [Told().at(pio=0x500, size=4)]
    async with await VM.create(boot=flat, memory="4M", disks=[disk()], devices=devices) as vm:
        vm.memory.write(0x8000, first.to_bytes(8, "little"))
        await vm.start()
        sys.exit(f"the guest ended: {await vm.wait()}")

anyio.run(main)
"""


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest, compiled."""
    image = tmp_path_factory.mktemp("guest") / "blk_writer"
    flags = [
        *(
            "-std=gnu17",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-ffreestanding",
            "-fno-pie",
            "-no-pie",
            "-static",
        ),
        *(
            "-nostdlib",
            "-mgeneral-regs-only",
            "-mno-red-zone",
            "-fno-stack-protector",
            "-fcf-protection=none",
        ),
        *("-fno-asynchronous-unwind-tables", "-Wl,--build-id=none,--oformat=binary"),
    ]
    source, script = GUESTS / "blk_writer.c", GUESTS / "flat.ld"
    subprocess.run(["cc", *flags, f"-Wl,-T,{script}", "-o", image, source], check=True)
    return image


def make(kind: str, path: Path) -> None:
    """An empty disk."""
    if kind == "qcow2":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
    elif kind == "overlay":
        Path(f"{path}.base").write_bytes(bytes(SIZE))
    else:
        path.write_bytes(bytes(SIZE))


def content(kind: str, path: Path) -> bytes:
    """What the disk holds."""
    if kind == "overlay":

        async def read() -> bytes:
            base = block.Raw(f"{path}.base", readonly=True)
            async with block.Overlay(base, path) as disk:
                return bytes(await disk.read(0, SIZE))

        return anyio.run(read)
    if kind == "qcow2":
        deadline = time.monotonic() + PATIENCE_S
        # The killed program's server holds its lock until it has seen that its client is gone.
        while subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, subprocess.run(
                ["qemu-img", "check", path], capture_output=True, check=False
            )
        raw = path.with_suffix(".raw")
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
        return raw.read_bytes()
    return path.read_bytes()


def check(data: bytes, covered: dict[int, int], below: int) -> None:
    """Each sector is whole, no older than what was covered, and no newer than what can have been written."""
    assert len(data) == SIZE
    for sector in range(SECTORS):
        words = struct.unpack(f"<{SECTOR // 8}Q", data[SECTOR * sector : SECTOR * (sector + 1)])
        number = words[0]
        assert number >= covered.get(sector, 0), f"sector {sector} has write {number}"
        assert number < below
        if number or any(words):
            assert number * STEP % SECTORS == sector
            assert words[1:] == tuple((number * MIX + i) % (1 << 64) for i in range(1, SECTOR // 8))


def numbers_until_killed(process: subprocess.Popen[bytes], flushes: int, delay_s: float) -> list[int]:
    """What the guest told until the program was killed, some moment after that many flushes."""
    assert process.stdout is not None
    pipe: IO[bytes] = process.stdout
    told = bytearray()
    while len(told) < 4 * flushes:
        part = os.read(pipe.fileno(), 4096)
        assert part, f"the program ended with status {process.wait()}"
        told += part
    # Not to wait for anything: the moment is to be any.
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while part := os.read(pipe.fileno(), 4096):
        told += part
    return list(struct.unpack(f"<{len(told) // 4}I", told[: len(told) // 4 * 4]))


@pytest.mark.parametrize("kind", ["io_uring", "threads", "overlay", "qcow2"])
def test_what_a_flush_covered_survives_a_kill(kind: str, writer: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make(kind, path)
    chance = random.Random(kind)
    first = SECTORS
    covered: dict[int, int] = {}
    for _ in range(CRASHES):
        argument = json.dumps([kind, str(writer), str(path), first])
        with subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, argument], stdout=subprocess.PIPE
        ) as process:
            try:
                told = numbers_until_killed(process, chance.randrange(1, 12), chance.random() / 50)
            finally:
                process.kill()
        assert told == list(range(first + BATCH, told[-1] + 1, BATCH))
        for number in range(first, told[-1]):
            covered[number * STEP % SECTORS] = number
        # The batch that was under way may be there, or a part of it.
        first = told[-1] + BATCH
        check(content(kind, path), covered, below=first)
