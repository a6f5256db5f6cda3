"""Network adapters against QEMU's: iperf3 and ping in the same Debian guest.

The peer is QEMU's microvm with virtio-net over virtio-mmio: with a TAP device and vhost off, and with its
user-mode NAT. The other end of all traffic is iperf3 on the host. A guest of each monitor is up, and each job
is done by them in turns: bench/pairs.py. Where ring 0 has no hardware all runs in the lab.

aiokvm moves the frames on its loop, and in another guest on a thread of the adapter's own. While traffic
flows a timer of its loop rings every 10 ms; how late it rings is the loop's lag. While it is
QEMU's turn the loop has nothing to do: what it lags is the machine's doing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import VM, block, boot, images, net
from bench import pairs
from bench.guest import CMDLINE, MEMORY_MIB, Shell, has_hardware, in_the_lab, lags, qemu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from bench.pairs import Measure, Measured

RESULTS = Path(__file__).with_name("results")
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
RECEIVED = "of which iperf3 got"
ROUND_TRIP = "round trip"
PING = (f"{ROUND_TRIP} p50", f"{ROUND_TRIP} p99")
LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}
MONITORS = ("loop", "thread", "QEMU")
BACKENDS = ("tap", "user")


async def run_here(*argv: str) -> None:
    await anyio.run_process(argv, stdout=subprocess.DEVNULL)


def tap_of(monitor: str) -> str:
    return f"aiokvm-{monitor.lower()}"


def network_of(monitor: str) -> str:
    """The first three bytes of it: the host is 1, the guest 2."""
    return f"10.9.{MONITORS.index(monitor)}"


@asynccontextmanager
async def host_side(backend: str) -> AsyncIterator[None]:
    """A TAP device with an address for each monitor, and iperf3's server."""
    taps = MONITORS if backend == "tap" else ()
    for monitor in taps:
        await run_here("ip", "tuntap", "add", tap_of(monitor), "mode", "tap", "vnet_hdr")
        await run_here("ip", "address", "add", f"{network_of(monitor)}.1/24", "dev", tap_of(monitor))
        await run_here("ip", "link", "set", tap_of(monitor), "up")
    try:
        async with await anyio.open_process(["iperf3", "-s"], stdout=subprocess.DEVNULL) as server:
            yield
            server.kill()
    finally:
        with anyio.CancelScope(shield=True):
            for monitor in taps:
                await run_here("ip", "tuntap", "del", tap_of(monitor), "mode", "tap")


@asynccontextmanager
async def aiokvm_guest(debian: images.DebianDisk, backend: str, monitor: Any) -> AsyncIterator[Shell]:
    root = block.Overlay(block.Raw(debian.disk, readonly=True))
    linux = boot.Linux(debian.kernel, debian.initrd, CMDLINE + " aiokvm.nodhcp")
    leads = net.Tap(tap_of(monitor)) if backend == "tap" else net.User(allow_host_loopback=True)
    nic = net.Nic(leads, dataplane=monitor)
    async with await VM.create(boot=linux, memory=f"{MEMORY_MIB}M", disks=[root], nets=[nic]) as vm:
        await vm.start()
        yield Shell(vm.serial.read, vm.serial.send)


@asynccontextmanager
async def qemu_guest(debian: images.DebianDisk, backend: str) -> AsyncIterator[Shell]:
    tap = f"tap,id=n,ifname={tap_of('QEMU')},script=no,downscript=no,vhost=off"
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


async def set_up(shell: Shell, backend: str, monitor: str) -> str:
    """Give the guest its address; the host's."""
    network = network_of(monitor)
    address, host = ("10.0.2.15", NAT_HOST) if backend == "user" else (f"{network}.2", f"{network}.1")
    ip = "busybox ip"
    await shell.run(f"{ip} link set eth0 up; {ip} addr add {address}/24 dev eth0", 60)
    await shell.run(f"until ping -c 1 -W 1 {host}; do :; done", 60)
    return host


async def iperf(shell: Shell, host: str, options: str, seconds: float) -> tuple[float, float | None]:
    """Mbit/s, or packets a second, that arrived.

    Of a flood to the guest, which its sockets have no room for, at its adapter, and what iperf3 has received.
    """
    count = "cat /sys/class/net/eth0/statistics/rx_packets"
    output = await shell.run(
        f"{count}; iperf3 -c {host} -t {seconds:g} -f k {options} | grep -E 'receiver|error'; {count}",
        60 + 20 * seconds,
    )
    before, *lines, after = output.split("\n")[:-1]
    line = lines[-1] if lines else ""
    if "-u" in options:
        found = re.search(r"(\d+)/(\d+) \(.*receiver", line)
        if not found:
            raise SystemExit(f"iperf3 says {output!r}")
        received = (int(found[2]) - int(found[1])) / seconds
        return ((int(after) - int(before)) / seconds, received) if "-R" in options else (received, None)
    found = re.search(r"([\d.]+) Kbits/sec.*receiver", line)
    if not found:
        raise SystemExit(f"iperf3 says {output!r}")
    return float(found[1]) / 1000, None


async def ping(shell: Shell, host: str) -> tuple[float, float]:
    """The median and the 99th percentile of the round trip, in ms."""
    output = await shell.run(
        f"ping -n -c {PINGS} -i 0.005 {host} | sed -n 's/.*time=\\([0-9.]*\\) ms/\\1/p' | sort -n | "
        f"""awk '{{t[NR]=$1}} END {{print t[int(NR*0.5)], t[int(NR*0.99)]}}'""",
        120,
    )
    half, most = output.split()
    return float(half), float(most)


def traffic(monitor: str, shell: Shell, host: str, name: str, seconds: float) -> Measure:
    options, unit, _ = JOBS[name]

    async def measure() -> dict[str, float]:
        with lags() as late:
            speed, received = await iperf(shell, host, options, seconds)
        lag = sorted(late)[int(0.99 * len(late))]
        print(f"{monitor}: {name}: {speed:.1f} {unit}, lag p99 {lag:.1f} ms", flush=True)
        if received is None:
            return {name: speed, "lag p99": lag}
        print(f"{monitor}: {name}, received: {received:.1f} {unit}", flush=True)
        return {name: speed, RECEIVED: received, "lag p99": lag}

    return measure


def pings(monitor: str, shell: Shell, host: str) -> Measure:
    async def measure() -> dict[str, float]:
        figures = dict(zip(PING, await ping(shell, host), strict=True))
        print(f"{monitor}: round trip: {list(figures.values())} ms", flush=True)
        return figures

    return measure


async def measure(
    debian: images.DebianDisk, backend: str, jobs: Sequence[str], count: int, seconds: float
) -> dict[str, Measured]:
    """What was measured, by job: by monitor and figure, a value a pair."""
    figures: dict[str, Measured] = {}
    async with host_side(backend), AsyncExitStack() as guests:
        shells: dict[str, tuple[Shell, str]] = {}
        for monitor in MONITORS:
            if monitor == "QEMU":
                made = qemu_guest(debian, backend)
            else:
                made = aiokvm_guest(debian, backend, monitor)
            shell = await guests.enter_async_context(made)
            await shell.login()
            shells[monitor] = (shell, await set_up(shell, backend, monitor))
        for name in jobs:
            measures = {
                monitor: traffic(monitor, *to, name, seconds) if name in JOBS else pings(monitor, *to)
                for monitor, to in shells.items()
            }
            figures[name] = await pairs.alternate(measures, count)
    return figures


def show(figures: dict[str, dict[str, Measured]], count: int) -> None:
    table = Table("back end", "job", "unit", *MONITORS, "loop / QEMU", "thread / QEMU", "aim", "lag p99 ms")

    def row(backend: str, measured: Measured, name: str, unit: str, aim: float) -> None:
        values = {monitor: measured[monitor][name] for monitor in MONITORS}
        # Of a time the smaller one is the better.
        ratios = [
            pairs.compare(values["QEMU"], values[ours])
            if unit == "ms"
            else pairs.compare(values[ours], values["QEMU"])
            for ours in MONITORS[:2]
        ]
        late = [measured[monitor].get("lag p99") for monitor in MONITORS]
        digits = 2 if unit == "ms" else 0
        table.add_row(
            backend,
            name,
            unit,
            *(f"{statistics.median(each):.{digits}f}" for each in values.values()),
            *map(str, ratios),
            f"{aim}",
            " ".join(f"{statistics.median(each):.1f}" for each in late if each),
        )

    for backend, jobs in figures.items():
        for job, measured in jobs.items():
            if job in JOBS:
                row(backend, measured, job, *JOBS[job][1:])
                if RECEIVED in measured["QEMU"]:
                    row(backend, measured, RECEIVED, *JOBS[job][1:])
            else:
                for name in PING:
                    row(backend, measured, name, "ms", 1.0)
    Console(width=150).print(table, pairs.caption(count))


async def main(arguments: Any) -> int:
    if arguments.disk:
        debian = images.DebianDisk.beside(arguments.disk)
    else:
        debian = await images.build_debian(packages=("iperf3", "iputils-ping"))
    if not arguments.here and not has_hardware():
        Console().print("ring 0 has no hardware here: measuring in the lab")
        options = ["--disk", str(debian.disk), "--pairs", str(arguments.pairs)]
        options += ["--seconds", str(arguments.seconds), "--loop", arguments.loop]
        options += [option for backend in arguments.backend for option in ("--backend", backend)]
        options += [option for job in arguments.job for option in ("--job", job)]
        return await in_the_lab(__file__, arguments.results, options)
    figures = {
        backend: await measure(debian, backend, arguments.job, arguments.pairs, arguments.seconds)
        for backend in arguments.backend
    }
    show(figures, arguments.pairs)
    (arguments.results / "net.json").write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=pairs.PAIRS)
    parser.add_argument("--seconds", type=float, default=3, help="how long each job runs")
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--job", choices=[*JOBS, ROUND_TRIP], action="append", help="else all")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--disk", type=Path, help="a disk of `aiokvm images build debian` with the packages")
    parser.add_argument("--here", action="store_true", help="not in the lab")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.backend = parsed.backend or list(BACKENDS)
    parsed.job = parsed.job or [*JOBS, ROUND_TRIP]
    parsed.results = parsed.results.absolute()
    parsed.results.mkdir(exist_ok=True)
    sys.exit(anyio.run(main, parsed, **LOOPS[parsed.loop]))
