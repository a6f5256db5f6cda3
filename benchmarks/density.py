"""Many machines in one process on one loop: what each costs to create, hold and close, what the loop feels.

Each machine runs a guest that sleeps until its local APIC timer interrupts it, ten times a second, and then
reads a device of the program's own: a plain Python function. Every round is a process of its own. The loop's
lag is how late a task wakes up that sleeps for 5 ms again and again while all machines run. Then the device
tells the guests to stop their timers, and the CPU time is taken that is left. Of the mappings left in the end
a few are the allocators'.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import VM, ConfigError, Device, boot, check_limits, net
from bench.resident import resident_kib

RESULTS = Path(__file__).with_name("results")
PORT = 0x500
HZ = 10
PROBE_SECONDS = 0.005
IDLE_SECONDS = 2
MORE = 20
WARM_UP = 100
# The loop's worker threads, of anyio's default limiter.
WORKERS = 40
# Real mode, at 0x1000. The local APIC in x2APIC mode, so that it is reached by MSRs.
PAYLOAD = bytes.fromhex(
    "31c0 8ed8"  # xor ax, ax; mov ds, ax
    "c7068000 5410 a38200"  # interrupt 0x20 leads to 0x1054
    "66b91b000000 0f32 80cc0c 0f30"  # IA32_APIC_BASE: enabled, x2APIC
    "6631d2"  # xor edx, edx
    "b90f08 66b8ff010000 0f30"  # spurious vector 0xff, software enabled
    "b93e08 66b80b000000 0f30"  # divide by 1: the timer counts nanoseconds
    "b93208 66b820000200 0f30"  # timer: periodic, vector 0x20
    "b93808 66b800e1f505 0f30"  # initial count: 100 ms
    "ba0005 b90b08"  # the device's port, the EOI register
    "90 fb f4 ebfc"  # nop; 1: sti; hlt; jmp 1b
    # 0x1054
    "ec 84c0 740e"  # in al, dx; test al, al; jz 2f
    "b93808 6631c0 6631d2 0f30 b90b08"  # initial count 0: the timer stops
    "6631c0 6631d2 0f30 ba0005 cf"  # 2: EOI; iret
)
TARGETS = {
    "create_ms": 5.0,
    "resident_kib": 1024.0,
    "lag_p99_ms": 10.0,
    "close_s": 10.0,
}


class Sensor(Device):
    """What the guests read: 0 to go on, 1 to stop."""

    reads = 0
    value = 0

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return self.value


def taken() -> dict[str, int]:
    """Descriptors, threads and mappings of this process, without Python's threads: workers come and go."""
    python = Path("/proc/self/comm").read_text()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": sum(comm.read_text() != python for comm in Path("/proc/self/task").glob("*/comm")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def lags(seconds: float) -> list[float]:
    """How late, in ms, a sleeper woke up, each time."""
    found = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        await anyio.sleep(PROBE_SECONDS)
        found.append(1e3 * (time.perf_counter() - begin - PROBE_SECONDS))
    return found


async def create(sensor: Sensor, name: str, nets: str = "none") -> VM:
    dataplane: Any = nets
    return await VM.create(
        boot=boot.Flat(PAYLOAD),
        memory="2M",
        name=name,
        devices=[sensor.at(pio=PORT, size=1)],
        nets=[] if nets == "none" else [net.Nic(net.User(), dataplane=dataplane)],
    )


async def close(machines: list[VM]) -> None:
    async with anyio.create_task_group() as group:
        for vm in machines:
            group.start_soon(vm.aclose)


async def warm_up(nets: str) -> None:
    """What the first machines bring into being stays: imports, worker threads, what the allocators keep."""
    machines = []

    async def live(name: str) -> None:
        machines.append(await create(Sensor(), name, nets))
        await machines[-1].start()

    async with anyio.create_task_group() as group:
        for i in range(WARM_UP):
            group.start_soon(live, f"w{i}")
    await close(machines)
    machines.clear()
    async with anyio.create_task_group() as group:
        for _ in range(WORKERS):
            group.start_soon(anyio.to_thread.run_sync, time.sleep, 0.1)
    await settle()


async def settle() -> None:
    """Threads that the kernel ran for a machine take a moment to end after it is closed."""
    gc.collect()
    await anyio.sleep(0.5)


async def inner(count: int, seconds: float, nets: str) -> None:
    """One round; prints its figures as JSON."""
    await warm_up(nets)
    before, before_kib = taken(), resident_kib()

    sensors = [Sensor() for _ in range(count)]
    machines, creates, starts = [], [], []
    for i, sensor in enumerate(sensors):
        begin = time.perf_counter()
        machines.append(await create(sensor, f"m{i}", nets))
        creates.append(1e3 * (time.perf_counter() - begin))
    for vm in machines:
        begin = time.perf_counter()
        await vm.start()
        starts.append(1e3 * (time.perf_counter() - begin))
    during, each_kib = taken(), (resident_kib() - before_kib) / count

    reads, cpu, begin = sum(sensor.reads for sensor in sensors), cpu_seconds(), time.perf_counter()
    late = sorted(await lags(seconds))
    elapsed = time.perf_counter() - begin
    busy = (cpu_seconds() - cpu) / elapsed
    reads = sum(sensor.reads for sensor in sensors) - reads
    slowest = min(sensor.reads for sensor in sensors)
    begin = time.perf_counter()
    more = [await create(Sensor(), f"more{i}", nets) for i in range(MORE)]
    busy_create = 1e3 * (time.perf_counter() - begin) / MORE
    await close(more)

    for sensor in sensors:
        sensor.value = 1
    await anyio.sleep(3 / HZ)
    cpu = cpu_seconds()
    await anyio.sleep(IDLE_SECONDS)
    idle = (cpu_seconds() - cpu) / IDLE_SECONDS

    if not slowest or any(vm.exit for vm in machines):
        raise SystemExit(f"a machine did not run: {[vm.exit for vm in machines if vm.exit][:1]}")
    begin = time.perf_counter()
    await close(machines)
    close_s = time.perf_counter() - begin
    del machines, more, vm
    await settle()
    after = taken()
    figures = {
        "create_ms": statistics.mean(creates),
        "create_p99_ms": sorted(creates)[int(0.99 * count)],
        "busy_create_ms": busy_create,
        "start_ms": statistics.mean(starts),
        "resident_kib": each_kib,
        "reads_per_second": reads / elapsed,
        "lag_p50_ms": late[len(late) // 2],
        "lag_p99_ms": late[int(0.99 * len(late))],
        "lag_max_ms": late[-1],
        "cpu": busy,
        "idle_cpu": idle,
        "close_s": close_s,
        **{f"{name}_each": (during[name] - before[name]) / count for name in before},
        **{f"{name}_left": after[name] - before[name] for name in before},
    }
    print(json.dumps(figures))


def measure(count: int, seconds: float, loop: str, nets: str) -> dict[str, float]:
    argv = [sys.executable, __file__, "--inner", "--loop", loop, "--nets", nets]
    argv += ["--machines", str(count), "--seconds", str(seconds)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


ROWS = [
    ("create, ms each", "create_ms", ".2f"),
    ("create, p99 ms", "create_p99_ms", ".2f"),
    ("create while all run, ms each", "busy_create_ms", ".2f"),
    ("start, ms each", "start_ms", ".2f"),
    ("resident beyond guest RAM, KiB each", "resident_kib", ".0f"),
    ("descriptors each", "descriptors_each", ".2f"),
    ("threads each", "threads_each", ".2f"),
    ("mappings each", "mappings_each", ".2f"),
    ("device reads a second, all", "reads_per_second", ".0f"),
    ("loop lag, p50 ms", "lag_p50_ms", ".2f"),
    ("loop lag, p99 ms", "lag_p99_ms", ".2f"),
    ("loop lag, max ms", "lag_max_ms", ".2f"),
    ("CPUs used while all run", "cpu", ".2f"),
    ("CPUs used while all sleep", "idle_cpu", ".3f"),
    ("close all, s", "close_s", ".2f"),
    ("descriptors left", "descriptors_left", ".0f"),
    ("threads left", "threads_left", ".0f"),
    ("mappings left", "mappings_left", ".0f"),
]


def main(count: int, seconds: float, loop: str, rounds: int, nets: str) -> None:
    try:
        check_limits(count)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    all_figures = [measure(count, seconds, loop, nets) for _ in range(rounds)]
    figures = {name: statistics.median(f[name] for f in all_figures) for name in all_figures[0]}
    table = Table(f"{count} machines, {loop}, adapters: {nets}, median of {rounds}", "measured", "target")
    for text, name, form in ROWS:
        target = f"< {TARGETS[name]:g}" if name in TARGETS else "0" if name.endswith("_left") else ""
        table.add_row(text, format(figures[name], form), target)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    result = {"machines": count, "loop": loop, "seconds": seconds, "rounds": rounds, **figures}
    (RESULTS / f"density-{loop}{'' if nets == 'none' else '-' + nets}.json").write_text(
        json.dumps(result, indent=1)
    )


def backend(loop: str) -> dict[str, Any]:
    if loop == "trio":
        return {"backend": "trio"}
    return {"backend": "asyncio", "backend_options": {"use_uvloop": loop == "uvloop"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5, help="how long the loop's lag is measured")
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "trio"], default="asyncio")
    parser.add_argument("--rounds", type=int, default=3)
    nets_help = "give each machine an adapter with a NAT, its frames moved so"
    parser.add_argument("--nets", choices=["none", "loop", "thread"], default="none", help=nets_help)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # The soft limit is for programs that use select(); the hard one is what this process may have.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if arguments.inner:
        anyio.run(inner, arguments.machines, arguments.seconds, arguments.nets, **backend(arguments.loop))
    else:
        main(arguments.machines, arguments.seconds, arguments.loop, arguments.rounds, arguments.nets)
