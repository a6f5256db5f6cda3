"""From VM.start to the guest's init, and from process start to init, against QEMU's microvm.

Both boot the same kernel, initramfs and command line with the same RAM and one vCPU, in turns; init is the
guest's first process, seen by its line on the serial port. Where ring 0 has no hardware all of it runs in the
lab.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import images
from bench import pairs
from bench.guest import has_hardware, in_the_lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.pairs import Measure, Measured

RESULTS = Path(__file__).with_name("results")
MARK = b"aiokvm: init"
MEMORY_MIB = 512
CMDLINES = {"quiet": "console=ttyS0 panic=-1 quiet", "console": "console=ttyS0 panic=-1"}
TIMEOUT_SECONDS = 120
# Of QEMU's time, what is to be reached.
AIMS = {"start": 1.0, "process": 0.8}

# As a user writes it; the last line is the time from VM.start to init.
PROGRAM = """
import asyncio, sys, time
from aiokvm import VM, boot

async def main(kernel, initrd, cmdline):
    async with await VM.create(boot=boot.Linux(kernel, initrd, cmdline), memory="512M") as vm:
        begin = time.perf_counter()
        await vm.start()
        await vm.serial.expect(b"aiokvm: init")
        print(time.perf_counter() - begin, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""
# With SeaBIOS for microvm (QEMU's default), which was faster than qboot; without the PCIe host, which the
# guest would only probe.
QEMU = [
    *("qemu-system-x86_64", "-M", "microvm,accel=kvm,pcie=off", "-cpu", "host", "-m", str(MEMORY_MIB)),
    *("-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"),
]


def run_aiokvm(program: Path, kernel: Path, initrd: Path, cmdline: str) -> tuple[float, float]:
    """(start to init, process to init) in seconds."""
    begin = time.perf_counter()
    argv = [sys.executable, str(program), str(kernel), str(initrd), cmdline]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        whole = time.perf_counter() - begin
        process.wait(TIMEOUT_SECONDS)
    return float(line), whole


def read_until_init(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    output = b""
    while MARK not in output:
        chunk = process.stdout.read1(65536)  # type: ignore[attr-defined]
        if not chunk:
            raise SystemExit(f"QEMU ended before init: {output[-400:]!r}")
        output += chunk


def run_qemu(kernel: Path, initrd: Path, cmdline: str) -> float:
    """Process to init in seconds."""
    begin = time.perf_counter()
    argv = [*QEMU, "-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        read_until_init(process)
        whole = time.perf_counter() - begin
        process.kill()
    return whole


def run_qemu_stopped(kernel: Path, initrd: Path, cmdline: str) -> float:
    """From the first moment that its vCPU runs (QMP's cont) to init in seconds."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/qmp"
        listener.bind(path)
        listener.listen()
        argv = [*QEMU, "-S", "-qmp", f"unix:{path}", "-kernel", str(kernel), "-initrd", str(initrd)]
        with subprocess.Popen(
            [*argv, "-append", cmdline], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as monitor:
                monitor.readline()
                for command in ("qmp_capabilities", "cont"):
                    begin = time.perf_counter()
                    monitor.write(json.dumps({"execute": command}) + "\n")
                    monitor.flush()
                    if command != "cont":
                        monitor.readline()
                read_until_init(process)
                seconds = time.perf_counter() - begin
            process.kill()
    return seconds


def seconds(run: Callable[[], float]) -> Measure:
    async def measure() -> dict[str, float]:
        return {"seconds": run()}

    return measure


async def measure(count: int, kernel: Path, initrd: Path) -> dict[str, Measured]:
    """What was measured, as "quiet, process": by contender and "seconds", a value a pair."""
    figures: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(PROGRAM)

        def ours(which: int, cmdline: str) -> float:
            return run_aiokvm(program, kernel, initrd, cmdline)[which]

        for name, cmdline in CMDLINES.items():
            start = {
                "aiokvm": seconds(partial(ours, 0, cmdline)),
                "QEMU": seconds(partial(run_qemu_stopped, kernel, initrd, cmdline)),
            }
            process = {
                "aiokvm": seconds(partial(ours, 1, cmdline)),
                "QEMU": seconds(partial(run_qemu, kernel, initrd, cmdline)),
            }
            if not figures:
                await pairs.alternate(process, 1)  # fills the caches of both
            figures[f"{name}, start"] = await pairs.alternate(start, count)
            figures[f"{name}, process"] = await pairs.alternate(process, count)
    return figures


def show(figures: dict[str, Measured], count: int) -> None:
    table = Table("command line", "to init from", "aiokvm s", "QEMU s", "ratio", "aim", "drift")
    for name, measured in figures.items():
        cmdline, what = name.split(", ")
        ours, theirs = (measured[who]["seconds"] for who in ("aiokvm", "QEMU"))
        table.add_row(
            cmdline,
            {"start": "VM.start / cont", "process": "process start"}[what],
            *(f"{statistics.median(values):.2f}" for values in (ours, theirs)),
            str(pairs.compare(ours, theirs)),
            f"{AIMS[what]}",
            " ".join(f"{pairs.drift(values):.2f}" for values in (ours, theirs)),
        )
    Console(width=130).print(table, pairs.caption(count))


async def main(count: int, here: bool, results: Path) -> int:
    kernel, initrd = await images.pull("cloud"), await images.pull("initramfs")
    if not here and not has_hardware():
        Console().print("ring 0 has no hardware here: measuring in the lab")
        return await in_the_lab(__file__, results, ["--pairs", str(count)])
    figures = await measure(count, kernel, initrd)
    show(figures, count)
    (results / "boot.json").write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=pairs.PAIRS)
    parser.add_argument("--here", action="store_true", help="not in the lab")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.mkdir(exist_ok=True)
    sys.exit(anyio.run(main, arguments.pairs, arguments.here, arguments.results.absolute()))
