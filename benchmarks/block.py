"""Disks against QEMU's: fio in the same Debian guest, on the same kind of disk, with the same file behind it.

The peer is QEMU's microvm with virtio-mmio, once with aio=threads and once with aio=io_uring; the ratio is to
the better of the two. All use the host's page cache (cache=writeback). A figure is the median of the rounds,
in each of which every monitor boots its guest anew. Where ring 0 has no hardware all of it runs in the lab.

While the guest keeps the disk busy a task of aiokvm's loop sleeps for 5 ms again and again; how late it wakes
up is the loop's lag.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import VM, AiokvmError, Disk, block, boot, images, kvm, lab
from aiokvm.kvm.probe import HARDWARE_RING0, ring0_speed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

RESULTS = Path(__file__).with_name("results")
MEMORY_MIB = 512
DATA_BYTES = 128 << 20
CMDLINE = "console=ttyS0 quiet loglevel=3 panic=-1 root=/dev/vda rw aiokvm.autologin"
PROMPT = b"# "
BOOT_SECONDS = 300
LAG_PROBE_SECONDS = 0.005
# Name, fio's options, which of fio's terse fields counts, and what is to be reached of the better QEMU.
JOBS = {
    "4 KiB random read, depth 1": ("--rw=randread --bs=4k --iodepth=1", 8, 1.0),
    "4 KiB random write, depth 1": ("--rw=randwrite --bs=4k --iodepth=1", 49, 1.0),
    "4 KiB random read, depth 32": ("--rw=randread --bs=4k --iodepth=32", 8, 1.3),
    "4 KiB random write, depth 32": ("--rw=randwrite --bs=4k --iodepth=32", 49, 1.3),
    "1 MiB read": ("--rw=read --bs=1M --iodepth=4", 8, 1.0),
    "1 MiB write": ("--rw=write --bs=1M --iodepth=4", 49, 1.0),
}
MONITORS = ("aiokvm", "QEMU threads", "QEMU io_uring")
QUEUES = (1, 2)


class Shell:
    """A guest's console with a shell at its end."""

    def __init__(
        self, read: Callable[[], Awaitable[bytes]], write: Callable[[bytes], Awaitable[object]]
    ) -> None:
        self._read = read
        self._write = write
        self._seen = b""

    async def expect(self, pattern: bytes, seconds: float) -> re.Match[bytes]:
        with anyio.move_on_after(seconds):
            while not (found := re.search(pattern, self._seen)):
                chunk = await self._read()
                if not chunk:
                    raise SystemExit(f"the machine ended: {self._seen[-1500:]!r}")
                self._seen += chunk
        if not found:
            raise SystemExit(f"no {pattern!r} in {seconds:g} s, but {self._seen[-1500:]!r}")
        self._seen = self._seen[found.end() :]
        return found

    async def login(self) -> None:
        await self.expect(rb"root@\w+:~# ", BOOT_SECONDS)
        await self._write(b"stty -echo; PS1=; echo ready$((1))\n")
        await self.expect(rb"ready1\r?\n", BOOT_SECONDS)
        # Monitors number their disks as they like.
        find = f'for d in /dev/vd?; do [ "$(blockdev --getsize64 $d)" = {DATA_BYTES} ] && data=$d; done'
        await self._write(f"{find}; echo found $data\n".encode())
        await self.expect(rb"found /dev/vd\w\r?\n", BOOT_SECONDS)

    async def fio(self, options: str, field: int, seconds: float, jobs: int) -> float:
        """Operations a second."""
        command = (
            f"fio --minimal --name=x --filename=$data --direct=1 --ioengine=libaio --time_based "
            f"--runtime={seconds:g} --ramp_time=1 --norandommap --numjobs={jobs} --group_reporting {options} "
            f"2>/dev/null | cut -d';' -f{field} | sed 's/^/iops /'\n"
        )
        await self._write(command.encode())
        found = await self.expect(rb"iops (\d+)\r?\n", 60 + 20 * seconds)
        return float(found[1])


@asynccontextmanager
async def aiokvm_guest(debian: images.DebianDisk, data: Path, queues: int) -> AsyncIterator[Shell]:
    root = block.Overlay(block.Raw(debian.disk, readonly=True))
    disks: list[block.BlockBackend | Disk] = [root, Disk(block.Raw(data), queues=queues)]
    linux = boot.Linux(debian.kernel, debian.initrd, CMDLINE)
    async with await VM.create(boot=linux, cpus=queues, memory=f"{MEMORY_MIB}M", disks=disks) as vm:
        await vm.start()
        yield Shell(vm.serial.read, vm.serial.send)


@asynccontextmanager
async def qemu_guest(debian: images.DebianDisk, data: Path, queues: int, aio: str) -> AsyncIterator[Shell]:
    argv = [
        *("qemu-system-x86_64", "-M", "microvm,accel=kvm,pcie=off", "-cpu", "host", "-m", str(MEMORY_MIB)),
        *("-smp", str(queues), "-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"),
        *("-drive", f"id=root,if=none,format=raw,snapshot=on,file={debian.disk}"),
        *("-drive", f"id=data,if=none,format=raw,cache=writeback,aio={aio},file={data}"),
        *("-device", "virtio-blk-device,drive=root"),
        *("-device", f"virtio-blk-device,drive=data,num-queues={queues}"),
        *("-kernel", str(debian.kernel), "-initrd", str(debian.initrd), "-append", CMDLINE),
    ]
    async with await anyio.open_process(argv, stderr=subprocess.STDOUT) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            yield Shell(process.stdout.receive, process.stdin.send)
        finally:
            process.kill()


async def lags(found: list[float]) -> None:
    """How late, in ms, a sleeper wakes up, each time."""
    while True:
        begin = time.perf_counter()
        await anyio.sleep(LAG_PROBE_SECONDS)
        found.append(1e3 * (time.perf_counter() - begin - LAG_PROBE_SECONDS))


async def run(monitor: str, debian: images.DebianDisk, queues: int, seconds: float) -> dict[str, float]:
    """One guest, all jobs."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        # Written, so that neither monitor reads a hole.
        await anyio.Path(data).write_bytes(b"\x5a" * DATA_BYTES)
        if monitor == "aiokvm":
            made = aiokvm_guest(debian, data, queues)
        else:
            made = qemu_guest(debian, data, queues, monitor.split()[1])
        async with made as shell:
            await shell.login()
            for name, (options, field, _) in JOBS.items():
                late: list[float] = []
                async with anyio.create_task_group() as group:
                    group.start_soon(lags, late)
                    figures[name] = await shell.fio(options, field, seconds, queues)
                    group.cancel_scope.cancel()
                figures[f"{name}, lag p99"] = sorted(late)[int(0.99 * len(late))]
                print(f"{monitor}, {queues} queues: {name}: {figures[name]:.0f}/s", flush=True)
    return figures


async def measure(
    debian: images.DebianDisk, rounds: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """By queues and monitor, by job, a value a round."""
    figures: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for queues in QUEUES:
            for monitor in MONITORS:
                values = figures.setdefault(f"{monitor}, {queues}", {})
                for name, value in (await run(monitor, debian, queues, seconds)).items():
                    values.setdefault(name, []).append(value)
    return figures


def show(figures: dict[str, dict[str, list[float]]], rounds: int) -> None:
    table = Table("queues", "job", "aiokvm /s", "QEMU threads", "QEMU io_uring", "ratio", "aim", "lag p99 ms")
    for queues in QUEUES:
        for name, (_, _, aim) in JOBS.items():
            values = [statistics.median(figures[f"{monitor}, {queues}"][name]) for monitor in MONITORS]
            lag = statistics.median(figures[f"aiokvm, {queues}"][f"{name}, lag p99"])
            ratio = values[0] / max(values[1:])
            table.add_row(
                str(queues),
                name,
                *(f"{value:.0f}" for value in values),
                f"{ratio:.2f}",
                f"{aim}",
                f"{lag:.1f}",
            )
    Console(width=130).print(table, f"medians of {rounds}")


def has_hardware() -> bool:
    try:
        with kvm.System() as system:
            return ring0_speed(system) >= HARDWARE_RING0
    except AiokvmError:
        return False


async def main(arguments: Any) -> int:
    results: Path = arguments.results
    if arguments.disk:
        debian = images.DebianDisk.beside(arguments.disk)
    else:
        debian = await images.build_debian(packages=("fio",))
    if not arguments.here and not has_hardware():
        Console().print("ring 0 has no hardware here: measuring in the lab")

        def output(data: bytes) -> None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

        argv = [sys.executable, __file__, "--here", "--disk", str(debian.disk), "--results", str(results)]
        argv += ["--rounds", str(arguments.rounds), "--seconds", str(arguments.seconds)]
        return await lab.run(argv, lab.LabConfig(memory_bytes=4 << 30, writable=(results,)), output=output)
    figures = await measure(debian, arguments.rounds, arguments.seconds)
    show(figures, arguments.rounds)
    (results / "block.json").write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="how long each job runs")
    parser.add_argument("--disk", type=Path, help="a disk of `aiokvm images build debian --packages fio`")
    parser.add_argument("--here", action="store_true", help="not in the lab")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.results = parsed.results.absolute()
    parsed.results.mkdir(exist_ok=True)
    sys.exit(anyio.run(main, parsed))
