"""What an exit costs, beyond what the hardware asks for it.

One payload reads its time stamp counter, stores it and accesses a port, again and again. The differences of
the stored counters are what an access costs the guest, whoever serves it:

- bare: a C loop around KVM_RUN (exits.c), and an ioeventfd that a C thread reads;
- aiokvm: a plain handler, one that is a coroutine, one that suspends once, posted writes, a doorbell, on
  each event loop; and a plain handler while the loop has other work, 200 us again and again, and while
  another machine on the loop exits as fast as it can;
- a Python thread around KVM_RUN that asks the loop by run_coroutine_threadsafe(...).result().

The variants take turns, round after round, each right after what it is measured against: a figure is the
median of what such pairs differ by.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.lowlevel
from cffi import FFI
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aiokvm import VM, Device, boot
from aiokvm._core import ffi as core_ffi
from aiokvm.boot.plan import GuestInfo
from aiokvm.machine.config import Config
from aiokvm.machine.hardware import Hardware
from aiokvm.memory import ram_ranges

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Measure = Callable[[bytes, int], list[float]]

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PORT, END_PORT = 0x300, 0xF4
SAMPLES = 0x10_0000
STOP = 1 << 30  # of exits.c
LOOPS = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
# Microseconds that a variant may add to the bare exit, on each loop.
TARGETS = {
    "plain": {"p50": 2, "p99": 15},
    "coroutine": {"p50": 8},
    "suspends once": {"p50": 30},
    "posted": {"p50": 1},
}
# The median and the 99th percentile, in microseconds.
Quantiles = tuple[float, float]


def payload(count: int, write: bool) -> bytes:
    """Protected mode: count times rdtsc, store, access."""
    return bytes.fromhex(
        "bf 00 00 10 00"  # mov edi, 0x100000
        f"b9 {count.to_bytes(4, 'little').hex()}"  # mov ecx, count
        "bb 00 00 00 00"  # mov ebx, 0
        "66 ba 00 03"  # mov dx, 0x300
        "52"  # again: push edx
        "0f 31"  # rdtsc
        "ab"  # stosd
        "5a"  # pop edx
        f"{'ee' if write else 'ec'}"  # out dx, al; in al, dx
        "49"  # dec ecx
        "75 f7"  # jnz again
        "b0 01 e6 f4 f4"  # mov al, 1; out 0xf4, al; hlt
    )


class Plain(Device):
    def read(self, offset: int, size: int) -> int:
        return 1

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class Coroutine(Device):
    async def read(self, offset: int, size: int) -> int:
        return 1


class Suspends(Device):
    async def read(self, offset: int, size: int) -> int:
        await anyio.lowlevel.checkpoint()
        return 1


@dataclass(frozen=True)
class Variant:
    name: str
    loop: str
    write: bool
    measure: Measure


def differences(memory: Any, count: int, tsc_khz: int) -> list[float]:
    """Microseconds from one stored counter to the next, without those of the first tenth: it warms up."""
    raw = memory.read(SAMPLES, 4 * count)
    stamps = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
    steps = [(after - before) % (1 << 32) / tsc_khz * 1000 for before, after in itertools.pairwise(stamps)]
    return steps[count // 10 :]


class Bare:
    """A machine with no aiokvm around it but the ioctls that build it."""

    def __init__(self, code: bytes, stack: ExitStack) -> None:
        image = boot.Flat(code, mode="protected")
        config = Config(boot=image, memory_bytes=4 << 20)
        self.hardware = Hardware(config)
        stack.callback(self.hardware.close)
        plan = image.plan({}, GuestInfo(ram=ram_ranges(config.memory_bytes)))
        for segment in plan.segments:
            self.hardware.memory.write(segment.gpa, segment.data)
        self.hardware.set_cpu_state(plan.cpu)
        self.vcpu = self.hardware.vcpus[0]

    def differences(self, count: int) -> list[float]:
        return differences(self.hardware.memory, count, self.vcpu.get_tsc_khz())


def bare_library(folder: Path) -> tuple[FFI, Any]:
    """exits.c, compiled."""
    ffi = FFI()
    ffi.cdef("int run_bare(int fd, void *run, unsigned end_port); uint64_t listen_bare(int fd);")
    library = folder / "exits.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "exits.c")], check=True)
    return ffi, ffi.dlopen(str(library))


def bare(library: tuple[FFI, Any], doorbell: bool, code: bytes, count: int) -> list[float]:
    ffi, lib = library
    with ExitStack() as stack:
        machine = Bare(code, stack)
        if doorbell:
            fd = os.eventfd(0)
            stack.callback(os.close, fd)
            listener = threading.Thread(target=lib.listen_bare, args=(fd,))
            listener.start()
            stack.callback(listener.join)
            stack.callback(os.eventfd_write, fd, STOP)
            machine.hardware.vm.ioeventfd(PORT, fd, 1, pio=True)
        vcpu = machine.vcpu
        run = int(core_ffi.cast("uintptr_t", vcpu.run_pointer))
        result = lib.run_bare(vcpu.fd, ffi.cast("void *", run), END_PORT)
        if result:
            raise RuntimeError(f"the bare loop ended with {result}")
        return machine.differences(count)


async def aiokvm(
    device: Device, mode: Literal["exit", "posted"], busy: bool, code: bytes, count: int
) -> list[float]:
    image = boot.Flat(code, mode="protected")
    places = [device.at(pio=PORT, mode=mode)]
    async with await VM.create(boot=image, memory="4M", devices=places) as vm:
        tsc_khz = vm.vcpus[0].kvm_vcpu.get_tsc_khz()
        async with anyio.create_task_group() as tasks:
            if busy:
                tasks.start_soon(other_work)
            await vm.start()
            await vm.wait()
            tasks.cancel_scope.cancel()
        return differences(vm.memory, count, tsc_khz)


async def beside(code: bytes, count: int) -> list[float]:
    """A plain handler, while another machine on the same loop exits as fast as it can."""
    again = bytes.fromhex("66 ba 00 03 ec eb fd")  # mov dx, 0x300; 1: in al, dx; jmp 1b
    hot = boot.Flat(again, mode="protected")
    async with await VM.create(boot=hot, memory="2M", devices=[Plain().at(pio=PORT)]) as other:
        await other.start()
        return await aiokvm(Plain(), "exit", False, code, count)


async def other_work() -> None:
    while True:
        end = time.perf_counter() + 200e-6
        while time.perf_counter() < end:
            pass
        await anyio.lowlevel.checkpoint()


async def threadsafe(code: bytes, count: int) -> list[float]:
    """As people write it today."""
    loop = asyncio.get_running_loop()

    async def handler(offset: int, size: int) -> int:
        return 1

    with ExitStack() as stack:
        machine = Bare(code, stack)
        vcpu = machine.vcpu
        run = vcpu.run_state

        def thread() -> None:
            while True:
                vcpu.run()
                io = run.io
                if io.port == END_PORT:
                    return
                value = asyncio.run_coroutine_threadsafe(handler(io.port - PORT, io.size), loop).result()
                run.reply_io(bytes([value]))

        await asyncio.to_thread(thread)
        return machine.differences(count)


def on(loop: str, work: Callable[..., Awaitable[list[float]]], *args: Any) -> Measure:
    backend, options = LOOPS[loop]

    def measure(code: bytes, count: int) -> list[float]:
        return anyio.run(partial(work, *args, code, count), backend=backend, backend_options=options)

    return measure


def variants(library: tuple[FFI, Any]) -> list[Variant]:
    found = [
        Variant("bare KVM_RUN", "C", False, lambda code, count: bare(library, False, code, count)),
        Variant("bare KVM_RUN, write", "C", True, lambda code, count: bare(library, False, code, count)),
        Variant("bare ioeventfd", "C", True, lambda code, count: bare(library, True, code, count)),
    ]
    for loop in LOOPS:
        found += [
            Variant("plain", loop, False, on(loop, aiokvm, Plain(), "exit", False)),
            Variant("coroutine", loop, False, on(loop, aiokvm, Coroutine(), "exit", False)),
            Variant("suspends once", loop, False, on(loop, aiokvm, Suspends(), "exit", False)),
            Variant("posted", loop, True, on(loop, aiokvm, Plain(), "posted", False)),
            Variant("doorbell", loop, True, on(loop, aiokvm, Plain(), "doorbell", False)),
            Variant("plain, busy loop", loop, False, on(loop, aiokvm, Plain(), "exit", True)),
            Variant("plain, beside a flood", loop, False, on(loop, beside)),
        ]
    found.append(Variant("run_coroutine_threadsafe", "asyncio", False, on("asyncio", threadsafe)))
    return found


def quantiles(steps: list[float]) -> Quantiles:
    ordered = sorted(steps)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


def base_of(variant: Variant) -> str:
    """What a variant is measured against."""
    if variant.name == "doorbell":
        return "bare ioeventfd"
    return "bare KVM_RUN, write" if variant.write else "bare KVM_RUN"


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:+.1f} ({low:+.1f} to {high:+.1f})"


def report(
    found: dict[tuple[str, str], list[tuple[Quantiles, Quantiles]]], all_of_them: list[Variant]
) -> list[dict[str, Any]]:
    """What each variant adds, by pairs: itself, and right before it what it is measured against."""
    rows = []
    table = Table("variant", "loop", "p50 us", "p99 us", "adds at p50", "at p99", "aim")
    for variant in all_of_them:
        pairs = found[variant.name, variant.loop]
        adds = [[own[at] - base[at] for base, own in pairs] for at in range(2)]
        p50, p99 = (statistics.median(own[at] for _, own in pairs) for at in range(2))
        aims = TARGETS.get(variant.name, {})
        row = {
            "variant": variant.name,
            "loop": variant.loop,
            "p50_us": p50,
            "p99_us": p99,
            "adds_p50_us": statistics.median(adds[0]),
            "adds_p99_us": statistics.median(adds[1]),
            "pairs": adds,
            "aim_us": aims,
        }
        rows.append(row)
        shown = ["", ""] if variant.loop == "C" else [spread(values) for values in adds]
        aim = ", ".join(f"{name} {value}" for name, value in aims.items())
        table.add_row(variant.name, variant.loop, f"{p50:.1f}", f"{p99:.1f}", *shown, aim)
    Console(width=120).print(table)
    print("medians of pairs, in turns; in brackets the quartiles of what the pairs differ by")
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar for each variant: what it adds at the median, and at p99 as a line. Needs matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    mpl.use("svg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row["loop"] != "C"]
    names = [f"{row['variant']}, {row['loop']}" for row in shown]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(shown) + 1), layout="constrained")
    places = range(len(shown))
    axes.barh(places, [max(row["adds_p50_us"], 0.1) for row in shown], color="#4878a8", label="p50")
    axes.plot([max(row["adds_p99_us"], 0.1) for row in shown], places, "|", color="black", label="p99")
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("microseconds added to the bare exit")
    axes.legend()
    figure.savefig(path)


def main(rounds: int, count: int, picture: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        all_of_them = variants(bare_library(Path(folder)))
        by_name = {(variant.name, variant.loop): variant for variant in all_of_them}
        found: dict[tuple[str, str], list[tuple[Quantiles, Quantiles]]] = {}
        for _ in track(range(rounds), "rounds"):
            for variant in all_of_them:
                code = payload(count, variant.write)
                base = by_name[base_of(variant), "C"]
                before = quantiles(base.measure(code, count))
                own = before if base is variant else quantiles(variant.measure(code, count))
                found.setdefault((variant.name, variant.loop), []).append((before, own))
    rows = report(found, all_of_them)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "exits.json").write_text(json.dumps(rows, indent=1))
    plot(rows, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000, help="accesses a round")
    parser.add_argument("--plot", type=Path, default=RESULTS / "exits.svg")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    main(arguments.rounds, arguments.count, arguments.plot)
