"""A guest that touches all of its RAM, against QEMU: what the first touch of a page costs, and the second.

Both run the same Multiboot kernel of a few instructions, which writes a word to each page of 4 KiB above 16
MiB, twice, and takes the time by its TSC. QEMU's firmware has written to some of the last 32 MiB already:
the pages below, which nobody has touched, are also compared by themselves. Where ring 0 has no hardware all
of it runs in the lab. The other ways to back a guest's RAM are compared, too, each by itself, as what one
leaves of the host's memory is what the next one finds.

What one monitor leaves of the host's memory the other finds. With --settled each runs twice in a row, and the
second time counts, for which it finds what it has left itself.

With --count the lab's TSC counts the instructions that its CPU has executed: the host's kernel's, the guest's
and those of whatever else ran. That is the same each time, however busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import VM, ConfigError, boot
from aiokvm.lab.qemu import program
from bench import pairs
from bench.guest import has_hardware, in_the_lab

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.pairs import Measure, Measured

RESULTS = Path(__file__).with_name("results")
MEMORY_MIB = 1024  # of the guest, by default
TIMEOUT_SECONDS = 600
# Of QEMU's time for the first touch.
AIM = 1.0
# The lab's QEMU, with a clock of instructions. It emulates all CPUs in one thread then.
COUNTING = """#!{python}
import os, sys
argv = [argument.replace("thread=multi", "thread=single") for argument in sys.argv[1:]]
os.execvp({qemu!r}, [{qemu!r}, *argv, "-icount", "shift=0,sleep=off,align=off"])
"""
LAB_BYTES = 4 << 30

FLAGS = 1 << 1 | 1 << 16  # wants to know how much memory there is; the header has addresses
HEADER = struct.pack(
    "<8I",
    *(0x1BAD_B002, FLAGS, -(0x1BAD_B002 + FLAGS) & 0xFFFF_FFFF),
    *(0x10_0000, 0x10_0000, 0, 0, 0x10_0020),
)
CODE = bytes.fromhex(
    "8b 7b 08"  # mov edi, [ebx + 8]: KiB above 1 MiB
    "c1 e7 0a"  # shl edi, 10
    "81 c7 00 00 10 00"  # add edi, 1 MiB
    "8d af 00 00 00 fe"  # lea ebp, [edi - 32 MiB]
    "be 00 00 00 01"  # mov esi, 16 MiB
    "89 e9 e8 18 00 00 00"  # mov ecx, ebp; call touch
    "89 f9 e8 11 00 00 00"  # mov ecx, edi; call touch
    "be 00 00 00 01 e8 07 00 00 00"  # mov esi, 16 MiB; call touch
    "31 c0 e6 f4"  # xor eax, eax; out 0xf4, al
    "f4 eb fd"  # hlt; jmp to it
    "0f 31 52 50"  # touch, from esi to ecx: rdtsc; push edx; push eax
    "89 36"  # again: mov [esi], esi
    "81 c6 00 10 00 00"  # add esi, 4096
    "39 ce 72 f4"  # cmp esi, ecx; jb again
    "0f 31"  # rdtsc
    "5b 29 d8 5b 19 da"  # pop ebx; sub eax, ebx; pop ebx; sbb edx, ebx
    "50 89 d3 e8 0e 00 00 00"  # push eax; mov ebx, edx; call hex
    "5b e8 08 00 00 00"  # pop ebx; call hex
    "b0 0a 66 ba f8 03 ee c3"  # mov al, 10; mov dx, 0x3f8; out dx, al; ret
    "51"  # hex: push ecx
    "b9 08 00 00 00"  # mov ecx, 8
    "66 ba f8 03"  # mov dx, 0x3f8
    "c1 c3 04"  # digit: rol ebx, 4
    "88 d8 24 0f"  # mov al, bl; and al, 15
    "3c 0a 1c 69 2f"  # cmp al, 10; sbb al, 0x69; das
    "ee"  # out dx, al
    "e2 f1"  # loop digit
    "59 c3"  # pop ecx; ret
)
# The ways of aiokvm: what VM.create takes.
WAYS: dict[str, dict[str, Any]] = {
    "aiokvm": {},
    "shared memory": {"shared_memory": True},
}
QEMU = [
    *("qemu-system-x86_64", "-M", "pc,accel=kvm", "-cpu", "host", "-nodefaults"),
    *("-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
    *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
]


def ticks(output: bytes) -> dict[str, float]:
    """The TSC's ticks of both passes, in millions, and of the first below the last 32 MiB."""
    lines = output.split()
    if len(lines) != 3:
        raise SystemExit(f"the guest printed {output!r}")
    untouched, top, second = (int(line, 16) / 1e6 for line in lines)
    return {"first": untouched + top, "untouched": untouched, "second": second}


def ours(kernel: Path, memory_mib: int, **way: Any) -> Measure:
    async def measure() -> dict[str, float]:
        output = b""
        with anyio.fail_after(TIMEOUT_SECONDS):
            async with await VM.create(boot=boot.Multiboot(kernel), memory=memory_mib << 20, **way) as vm:
                await vm.start()
                while chunk := await vm.serial.read():
                    output += chunk
        return ticks(output)

    return measure


def qemu(kernel: Path, memory_mib: int) -> Measure:
    async def measure() -> dict[str, float]:
        argv = [*QEMU, "-m", str(memory_mib), "-kernel", str(kernel)]
        done = await anyio.run_process(argv, check=False, stderr=subprocess.STDOUT)
        return ticks(done.stdout)

    return measure


def settled(measure: Measure) -> Measure:
    """The second of two times in a row."""

    async def second() -> Mapping[str, float]:
        await measure()
        return await measure()

    return second


def write(path: Path) -> Path:
    path.write_bytes(HEADER + CODE)
    return path


def write_counting(path: Path) -> Path:
    path.write_text(COUNTING.format(python=sys.executable, qemu=program()))
    path.chmod(0o755)
    return path


async def measure(count: int, memory_mib: int, settle: bool) -> dict[str, Measured]:
    """By way, what it and QEMU took, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        kernel = write(Path(folder, "kernel"))
        ways = {name: ours(kernel, memory_mib, **way) for name, way in WAYS.items()}
        try:
            async with await VM.create(boot=boot.Multiboot(kernel), memory=memory_mib << 20, hugepages="2M"):
                ways["reserved huge pages"] = ours(kernel, memory_mib, hugepages="2M")
        except ConfigError:
            pass  # the host has reserved none
        peer = qemu(kernel, memory_mib)
        if settle:
            ways = {name: settled(way) for name, way in ways.items()}
            peer = settled(peer)
        # A lab's own memory is not there before it is first used, and QEMU's files have to be read.
        await pairs.alternate({"aiokvm": ways["aiokvm"], "QEMU": peer}, 1)
        return {name: await pairs.alternate({name: way, "QEMU": peer}, count) for name, way in ways.items()}


def show(measured: dict[str, Measured], count: int, memory_mib: int) -> None:
    columns = ("first touch, Mticks", "QEMU", "second", "QEMU", "first, to QEMU's", "without the top")
    table = Table("RAM", *columns, "aim", "drift")
    for name, figures in measured.items():
        one, other = figures[name], figures["QEMU"]
        table.add_row(
            name,
            *(
                f"{statistics.median(side[which]):.0f}"
                for which in ("first", "second")
                for side in (one, other)
            ),
            *(f"{pairs.compare(one[which], other[which]):.3f}" for which in ("first", "untouched")),
            f"{AIM}" if name == "aiokvm" else "",
            f"{pairs.drift(one['first']):.2f}",
        )
    console = Console(width=120)
    for file in ("enabled", "shmem_enabled"):
        path = Path("/sys/kernel/mm/transparent_hugepage", file)
        console.print(f"{path}: {path.read_text().strip() if path.exists() else 'none'}", markup=False)
    console.print(table, f"{memory_mib} MiB; {pairs.caption(count)}")


async def main(arguments: argparse.Namespace) -> int:
    results: Path = arguments.results
    if not arguments.here and (arguments.count or not has_hardware()):
        what = "counting instructions" if arguments.count else "ring 0 has no hardware here: measuring"
        Console().print(f"{what} in the lab")
        with tempfile.TemporaryDirectory() as folder:
            if arguments.count:
                os.environ["AIOKVM_QEMU"] = str(write_counting(Path(folder, "qemu")))
            options = ["--pairs", str(arguments.pairs), "--memory", str(arguments.memory)]
            if arguments.settled:
                options.append("--settled")
            return await in_the_lab(__file__, results, options, LAB_BYTES)
    measured = await measure(arguments.pairs, arguments.memory, arguments.settled)
    show(measured, arguments.pairs, arguments.memory)
    (results / "faults.json").write_text(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=pairs.PAIRS)
    parser.add_argument("--memory", type=int, default=MEMORY_MIB, help="the guest's RAM in MiB, from 64 on")
    parser.add_argument("--settled", action="store_true", help="each twice in a row, the second time counts")
    parser.add_argument("--here", action="store_true", help="not in the lab")
    parser.add_argument("--count", action="store_true", help="instructions, in the lab, instead of time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.results = parsed.results.absolute()
    parsed.results.mkdir(exist_ok=True)
    sys.exit(anyio.run(main, parsed))
