"""From VM.start to the guest's init, and from process start to init, against QEMU's microvm.

Both boot the same kernel, initramfs and command line with the same RAM and one vCPU, in turns in the same
run; init is the guest's first process, seen by its line on the serial port. Where ring 0 has no hardware all
of it runs in the lab.
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
from pathlib import Path

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import AiokvmError, images, kvm, lab
from aiokvm.kvm.probe import HARDWARE_RING0, ring0_speed

RESULTS = Path(__file__).with_name("results")
MARK = b"aiokvm: init"
MEMORY_MIB = 512
CMDLINES = {"quiet": "console=ttyS0 panic=-1 quiet", "console": "console=ttyS0 panic=-1"}
TIMEOUT_SECONDS = 120

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


async def measure(rounds: int, kernel: Path, initrd: Path) -> dict[str, dict[str, list[float]]]:
    """All figures: by command line, by what was measured, a value a round."""
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(PROGRAM)

        def one(cmdline: str) -> dict[str, float]:
            start, whole = run_aiokvm(program, kernel, initrd, cmdline)
            return {
                "aiokvm start": start,
                "aiokvm process": whole,
                "qemu process": run_qemu(kernel, initrd, cmdline),
                "qemu start": run_qemu_stopped(kernel, initrd, cmdline),
            }

        one(CMDLINES["quiet"])  # fills the caches of both
        for name, cmdline in CMDLINES.items():
            figures[name] = {}
            for _ in range(rounds):
                for what, seconds in one(cmdline).items():
                    figures[name].setdefault(what, []).append(seconds)
    return figures


def show(figures: dict[str, dict[str, list[float]]]) -> None:
    table = Table("command line", "to init from", "aiokvm s", "QEMU s", "ratio", "rounds")
    for name, values in figures.items():
        for what, text in (("start", "VM.start / cont"), ("process", "process start")):
            ours, theirs = (statistics.median(values[f"{who} {what}"]) for who in ("aiokvm", "qemu"))
            count = len(values[f"aiokvm {what}"])
            table.add_row(name, text, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}", str(count))
    Console().print(table)


def has_hardware() -> bool:
    try:
        with kvm.System() as system:
            return ring0_speed(system) >= HARDWARE_RING0
    except AiokvmError:
        return False


async def main(rounds: int, here: bool, results: Path) -> int:
    kernel, initrd = await images.pull("cloud"), await images.pull("initramfs")
    if not here and not has_hardware():
        Console().print("ring 0 has no hardware here: measuring in the lab")

        def output(data: bytes) -> None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

        argv = [sys.executable, __file__, "--here", "--rounds", str(rounds), "--results", str(results)]
        return await lab.run(argv, lab.LabConfig(writable=(results,)), output=output)
    figures = await measure(rounds, kernel, initrd)
    show(figures)
    (results / "boot.json").write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="not in the lab")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.results.mkdir(exist_ok=True)
    sys.exit(anyio.run(main, arguments.rounds, arguments.here, arguments.results.absolute()))
