"""Network adapters against QEMU's: iperf3 and ping in the same Debian guest.

The peer is QEMU's microvm with virtio-net over virtio-mmio: with the same TAP device and vhost off, and with
its user-mode NAT. The other end of all traffic is iperf3 on the host. A figure is the median of the rounds,
in each of which every monitor boots its guest anew. Where ring 0 has no hardware all runs in the lab.

aiokvm moves the frames on its loop, and again on a thread of the adapter's own. While traffic flows a task of
its loop sleeps for 5 ms again and again; how late it wakes up is the loop's lag. Beside QEMU the same is done
by a loop that has nothing to do: what it lags is the machine's doing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import VM, block, boot, images, net
from bench.guest import CMDLINE, MEMORY_MIB, Shell, has_hardware, in_the_lab, lags, qemu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RESULTS = Path(__file__).with_name("results")
TAP = "aiokvm-bench"
HOST, GUEST = "10.9.0.1", "10.9.0.2"
NAT_HOST = "10.0.2.2"  # where either NAT has the host's loopback
PINGS = 300

# Name, iperf3's options, what counts, and what is to be reached of QEMU's figure. A guest's client sends, or
# receives with -R.
JOBS: dict[str, tuple[str, str, float]] = {
    "TCP to the host, 1 stream": ("-P 1", "Mbit/s", 1.0),
    "TCP to the host, 4 streams": ("-P 4", "Mbit/s", 1.0),
    "TCP to the guest, 1 stream": ("-P 1 -R", "Mbit/s", 1.0),
    "TCP to the guest, 4 streams": ("-P 4 -R", "Mbit/s", 1.0),
    "UDP to the host, 64 bytes": ("-u -b 0 -l 64", "packets/s", 1.2),
    "UDP to the host, 1,400 bytes": ("-u -b 0 -l 1400", "packets/s", 1.2),
    "UDP to the guest, 64 bytes": ("-u -b 0 -l 64 -R", "packets/s", 1.2),
    "UDP to the guest, 1,400 bytes": ("-u -b 0 -l 1400 -R", "packets/s", 1.2),
}
PING = ("round trip p50", "round trip p99")
MONITORS = ("loop", "thread", "QEMU")
BACKENDS = ("tap", "user")


async def run_here(*argv: str) -> None:
    await anyio.run_process(argv, stdout=subprocess.DEVNULL)


@asynccontextmanager
async def host_side(backend: str) -> AsyncIterator[None]:
    """A TAP device with an address, and iperf3's server."""
    if backend == "tap":
        await run_here("ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
        await run_here("ip", "address", "add", f"{HOST}/24", "dev", TAP)
        await run_here("ip", "link", "set", TAP, "up")
    try:
        async with await anyio.open_process(["iperf3", "-s"], stdout=subprocess.DEVNULL) as server:
            yield
            server.kill()
    finally:
        if backend == "tap":
            with anyio.CancelScope(shield=True):
                await run_here("ip", "tuntap", "del", TAP, "mode", "tap")


@asynccontextmanager
async def aiokvm_guest(debian: images.DebianDisk, backend: str, dataplane: Any) -> AsyncIterator[Shell]:
    root = block.Overlay(block.Raw(debian.disk, readonly=True))
    linux = boot.Linux(debian.kernel, debian.initrd, CMDLINE + " aiokvm.nodhcp")
    leads = net.Tap(TAP) if backend == "tap" else net.User(allow_host_loopback=True)
    nic = net.Nic(leads, dataplane=dataplane)
    async with await VM.create(boot=linux, memory=f"{MEMORY_MIB}M", disks=[root], nets=[nic]) as vm:
        await vm.start()
        yield Shell(vm.serial.read, vm.serial.send)


@asynccontextmanager
async def qemu_guest(debian: images.DebianDisk, backend: str) -> AsyncIterator[Shell]:
    tap = f"tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off"
    argv = [
        *("-drive", f"id=root,if=none,format=raw,snapshot=on,file={debian.disk}"),
        *("-device", "virtio-blk-device,drive=root"),
        *("-netdev", tap if backend == "tap" else "user,id=n"),
        *("-device", "virtio-net-device,netdev=n"),
        *("-kernel", str(debian.kernel), "-initrd", str(debian.initrd)),
        *("-append", CMDLINE + " aiokvm.nodhcp"),
    ]
    async with qemu(argv) as shell:
        yield shell


async def set_up(shell: Shell, backend: str) -> str:
    """Give the guest its address; the host's."""
    address = f"{GUEST}/24" if backend == "tap" else "10.0.2.15/24"
    host = HOST if backend == "tap" else NAT_HOST
    ip = "busybox ip"
    await shell.run(f"{ip} link set eth0 up; {ip} addr add {address} dev eth0", 60)
    await shell.run(f"until ping -c 1 -W 1 {host}; do :; done", 60)
    return host


async def iperf(shell: Shell, host: str, options: str, seconds: float) -> float:
    """Mbit/s, or packets a second, that arrived."""
    count = "cat /sys/class/net/eth0/statistics/rx_packets"
    output = await shell.run(
        f"{count}; iperf3 -c {host} -t {seconds:g} -f k {options} | grep -E 'receiver|error'; {count}",
        60 + 20 * seconds,
    )
    before, *lines, after = output.split("\n")[:-1]
    if "-u" in options and "-R" in options:
        # What the adapter has given to the guest: its socket has no room for most of a flood.
        return (int(after) - int(before)) / seconds
    line = lines[-1] if lines else ""
    if "-u" in options:
        found = re.search(r"(\d+)/(\d+) \(.*receiver", line)
        if not found:
            raise SystemExit(f"iperf3 says {output!r}")
        return (int(found[2]) - int(found[1])) / seconds
    found = re.search(r"([\d.]+) Kbits/sec.*receiver", line)
    if not found:
        raise SystemExit(f"iperf3 says {output!r}")
    return float(found[1]) / 1000


async def ping(shell: Shell, host: str) -> tuple[float, float]:
    """The median and the 99th percentile of the round trip, in ms."""
    output = await shell.run(
        f"ping -n -c {PINGS} -i 0.005 {host} | sed -n 's/.*time=\\([0-9.]*\\) ms/\\1/p' | sort -n | "
        f"""awk '{{t[NR]=$1}} END {{print t[int(NR*0.5)], t[int(NR*0.99)]}}'""",
        120,
    )
    half, most = output.split()
    return float(half), float(most)


async def run(monitor: str, debian: images.DebianDisk, backend: str, seconds: float) -> dict[str, float]:
    """One guest, all jobs."""
    figures: dict[str, float] = {}
    async with host_side(backend):
        made = qemu_guest(debian, backend) if monitor == "QEMU" else aiokvm_guest(debian, backend, monitor)
        async with made as shell:
            await shell.login()
            host = await set_up(shell, backend)
            for name, (options, unit, _) in JOBS.items():
                late: list[float] = []
                async with anyio.create_task_group() as group:
                    group.start_soon(lags, late)
                    figures[name] = await iperf(shell, host, options, seconds)
                    group.cancel_scope.cancel()
                figures[f"{name}, lag p99"] = sorted(late)[int(0.99 * len(late))]
                print(f"{monitor}, {backend}: {name}: {figures[name]:.1f} {unit}", flush=True)
            figures.update(zip(PING, await ping(shell, host), strict=True))
            print(f"{monitor}, {backend}: round trip: {[figures[name] for name in PING]} ms", flush=True)
    return figures


def show(figures: dict[str, dict[str, list[float]]], backends: list[str], rounds: int) -> None:
    table = Table("back end", "job", "unit", *MONITORS, "ratios", "aim", "lag p99 ms")

    def median(monitor: str, backend: str, name: str) -> float:
        return statistics.median(figures[f"{monitor}, {backend}"][name])

    def row(backend: str, name: str, unit: str, aim: float, digits: int, lag: str = "") -> None:
        *ours, theirs = (median(monitor, backend, name) for monitor in MONITORS)
        ratios = (theirs / one if unit == "ms" else one / theirs for one in ours)
        values = (f"{value:.{digits}f}" for value in (*ours, theirs))
        table.add_row(
            backend, name, unit, *values, " ".join(f"{ratio:.2f}" for ratio in ratios), f"{aim}", lag
        )

    for backend in backends:
        for name, (_, unit, aim) in JOBS.items():
            late = (median(monitor, backend, f"{name}, lag p99") for monitor in MONITORS)
            row(backend, name, unit, aim, 0, " ".join(f"{lag:.1f}" for lag in late))
        for name in PING:
            row(backend, name, "ms", 1.0, 2)
    Console(width=130).print(table, f"medians of {rounds}; a ratio above 1 is in aiokvm's favour")


async def main(arguments: Any) -> int:
    if arguments.disk:
        debian = images.DebianDisk.beside(arguments.disk)
    else:
        debian = await images.build_debian(packages=("iperf3", "iputils-ping"))
    if not arguments.here and not has_hardware():
        Console().print("ring 0 has no hardware here: measuring in the lab")
        options = ["--disk", str(debian.disk), "--rounds", str(arguments.rounds)]
        options += ["--seconds", str(arguments.seconds)]
        for backend in arguments.backend:
            options += ["--backend", backend]
        return await in_the_lab(__file__, arguments.results, options)
    figures: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.rounds):
        for backend in arguments.backend:
            for monitor in MONITORS:
                values = figures.setdefault(f"{monitor}, {backend}", {})
                found = await run(monitor, debian, backend, arguments.seconds)
                for name, value in found.items():
                    values.setdefault(name, []).append(value)
    show(figures, arguments.backend, arguments.rounds)
    (arguments.results / "net.json").write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="how long each job runs")
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--disk", type=Path, help="a disk of `aiokvm images build debian` with the packages")
    parser.add_argument("--here", action="store_true", help="not in the lab")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.backend = parsed.backend or list(BACKENDS)
    parsed.results = parsed.results.absolute()
    parsed.results.mkdir(exist_ok=True)
    sys.exit(anyio.run(main, parsed))
