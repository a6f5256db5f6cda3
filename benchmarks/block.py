"""Disks against QEMU's: fio in the same Debian guest, on the same kind of disk, with the same file behind it.

The peer is QEMU's microvm with virtio-mmio, once with aio=threads and once with aio=io_uring; the ratio is to
the one that is faster at the job. All use the host's page cache (cache=writeback). The three guests run at
once, and do each job in turns while the others are idle (bench/pairs.py). Where ring 0 has no hardware
all of it runs in the lab.

While the guest keeps the disk busy a timer of aiokvm's loop rings every 10 ms; how late it rings is the
loop's lag.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import VM, Disk, block, boot, images
from bench import pairs
from bench.guest import CMDLINE, MEMORY_MIB, Shell, has_hardware, in_the_lab, lags, qemu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from bench.pairs import Measure, Measured

RESULTS = Path(__file__).with_name("results")
DATA_BYTES = 128 << 20
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
        *("-smp", str(queues)),
        *("-drive", f"id=root,if=none,format=raw,snapshot=on,file={debian.disk}"),
        *("-drive", f"id=data,if=none,format=raw,cache=writeback,aio={aio},file={data}"),
        *("-device", "virtio-blk-device,drive=root"),
        *("-device", f"virtio-blk-device,drive=data,num-queues={queues}"),
        *("-kernel", str(debian.kernel), "-initrd", str(debian.initrd), "-append", CMDLINE),
    ]
    async with qemu(argv) as shell:
        yield shell


async def find_disk(shell: Shell) -> str:
    """Monitors number their disks as they like."""
    test = f'[ "$(blockdev --getsize64 $d)" = {DATA_BYTES} ]'
    return (await shell.run(f"for d in /dev/vd?; do {test} && echo $d; done", 60)).strip()


async def fio(shell: Shell, disk: str, options: str, field: int, seconds: float, jobs: int) -> float:
    """Operations a second."""
    output = await shell.run(
        f"fio --minimal --name=x --filename={disk} --direct=1 --ioengine=libaio --time_based "
        f"--runtime={seconds:g} --ramp_time=1 --norandommap --numjobs={jobs} --group_reporting {options} "
        f"2>/dev/null | cut -d';' -f{field}",
        300 + 20 * seconds,
    )
    return float(output)


def job(
    monitor: str, shell: Shell, disk: str, options: str, field: int, seconds: float, jobs: int
) -> Measure:
    async def measure() -> dict[str, float]:
        with lags() as late:
            speed = await fio(shell, disk, options, field, seconds, jobs)
        print(f"{monitor}: {options} with {jobs} jobs: {speed:.0f}/s", flush=True)
        return {"speed": speed, "lag p99": sorted(late)[int(0.99 * len(late))]}

    return measure


async def measure(
    debian: images.DebianDisk, count: int, seconds: float, numbers: Sequence[int], names: Sequence[str]
) -> dict[str, Measured]:
    """What was measured, as "QUEUES, JOB": by monitor and figure, a value a pair."""
    figures: dict[str, Measured] = {}
    for queues in numbers:
        with tempfile.TemporaryDirectory() as folder:
            async with AsyncExitStack() as guests:
                shells: dict[str, tuple[Shell, str]] = {}
                for monitor in MONITORS:
                    data = Path(folder, monitor.replace(" ", "-"))
                    # Written, so that no monitor reads a hole.
                    await anyio.Path(data).write_bytes(b"\x5a" * DATA_BYTES)
                    if monitor == "aiokvm":
                        made = aiokvm_guest(debian, data, queues)
                    else:
                        made = qemu_guest(debian, data, queues, monitor.split()[1])
                    shell = await guests.enter_async_context(made)
                    await shell.login()
                    shells[monitor] = (shell, await find_disk(shell))
                for name in names:
                    options, field, _ = JOBS[name]
                    contenders = {
                        monitor: job(monitor, shell, disk, options, field, seconds, queues)
                        for monitor, (shell, disk) in shells.items()
                    }
                    figures[f"{queues}, {name}"] = await pairs.alternate(contenders, count)
    return figures


def show(figures: dict[str, Measured], count: int) -> None:
    columns = (*("queues", "job", "aiokvm /s", "QEMU threads", "QEMU io_uring"), *("ratio", "aim", "drift"))
    table = Table(*columns, "lag p99 ms")
    for name, measured in figures.items():
        queues, what = name.split(", ", 1)
        speeds = {monitor: measured[monitor]["speed"] for monitor in MONITORS}
        medians = {monitor: statistics.median(values) for monitor, values in speeds.items()}
        peer = max(MONITORS[1:], key=medians.__getitem__)
        table.add_row(
            queues,
            what,
            *(f"{value:.0f}" for value in medians.values()),
            str(pairs.compare(speeds["aiokvm"], speeds[peer])),
            f"{JOBS[what][2]}",
            " ".join(f"{pairs.drift(speeds[monitor]):.2f}" for monitor in ("aiokvm", peer)),
            f"{statistics.median(measured['aiokvm']['lag p99']):.1f}",
        )
    Console(width=140).print(table, pairs.caption(count))


async def main(arguments: Any) -> int:
    results: Path = arguments.results
    if arguments.disk:
        debian = images.DebianDisk.beside(arguments.disk)
    else:
        debian = await images.build_debian(packages=("fio",))
    if not arguments.here and not has_hardware():
        Console().print("ring 0 has no hardware here: measuring in the lab")
        options = ["--disk", str(debian.disk), "--pairs", str(arguments.pairs)]
        options += ["--seconds", str(arguments.seconds), "--queues", *map(str, arguments.queues)]
        options += ["--jobs", *arguments.jobs]
        return await in_the_lab(__file__, results, options)
    figures = await measure(debian, arguments.pairs, arguments.seconds, arguments.queues, arguments.jobs)
    show(figures, arguments.pairs)
    (results / "block.json").write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=pairs.PAIRS)
    parser.add_argument("--seconds", type=float, default=3, help="how long each job runs")
    parser.add_argument("--queues", type=int, nargs="+", default=QUEUES, help="numbers of them")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS), metavar="JOB")
    parser.add_argument("--disk", type=Path, help="a disk of `aiokvm images build debian --packages fio`")
    parser.add_argument("--here", action="store_true", help="not in the lab")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.results = parsed.results.absolute()
    parsed.results.mkdir(exist_ok=True)
    sys.exit(anyio.run(main, parsed))
