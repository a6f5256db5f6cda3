"""Frames a second between a guest's virtqueue, the program and a switch. No KVM and no guest.

Drivers in C (tests/core/vring_driver.c) play the guests: they make a queue of 256 frames available, and again
when these are done with, of 60 bytes each (64 with the check sequence, which is not there). What is timed is
everything else: the network adapter (vring.c, net_nic.c), the plane, the port or the switch, the event loop,
and a consumer in Python that looks at the EtherType of each frame. One thread does it all, with a warm cache;
the drivers' work is not counted.

The variants take turns, round after round; a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from cffi import FFI
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aiokvm._core import ffi, lib
from aiokvm.aio import current_loop
from aiokvm.net import Port, Switch
from aiokvm.net.plane import End, Plane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
BATCHES = (1, 16, 64)
SIZE = 256
RECEIVE, TRANSMIT = 0, 1
VIRTIO_NET_F_MRG_RXBUF, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1 = 1 << 15, 1 << 29, 1 << 32
FEATURES = VIRTIO_NET_F_MRG_RXBUF | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1
ETHERTYPE_IP = 0x0800
LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


def library(folder: Path) -> tuple[FFI, Any]:
    """ports.c of this benchmark and the tests' driver, compiled."""
    driver = FFI()
    driver.cdef(
        """
        void *guest_new(uint64_t features, uint32_t size);
        void guest_free(void *guest);
        uint8_t *guest_ram(void *guest, uint64_t *bytes);
        void guest_areas(void *guest, uint32_t queue, uint64_t *areas);
        int guest_send(void *guest, uint32_t count, uint32_t size, uint8_t to, uint8_t from);
        uint32_t guest_receive(void *guest);
        uint64_t guest_flood(uintptr_t serve, void *net, void *sender, void *receiver, int kick,
                             uint32_t count, uint32_t batch);
        """
    )
    built = folder / "ports.so"
    flags = [
        "-std=gnu17",
        "-O3",
        "-DNDEBUG",
        "-shared",
        "-fPIC",
        f"-I{ROOT / 'tests/core'}",
        f"-I{ROOT / 'aiokvm/_core'}",
    ]
    sources = [HERE / "ports.c", ROOT / "tests/core/vring_driver.c"]
    subprocess.run(["cc", *flags, "-o", str(built), *map(str, sources)], check=True)
    return driver, driver.dlopen(str(built))


class Guest:
    """RAM, a driver in C, and the adapter that aiokvm gives it."""

    def __init__(self, driver: FFI, code: Any, plane: Plane) -> None:
        self.code = code
        self.core = code.guest_new(FEATURES, SIZE)
        error = ffi.new("int *")
        self.end: End = plane.adopt(lib.aiokvm_net_nic_new(plane.core, error), error[0], lambda *_: None)
        lib.aiokvm_net_nic_set_features(self.end.core, FEATURES, 1500)
        size, areas = driver.new("uint64_t *"), driver.new("uint64_t[3]")
        host = int(driver.cast("uintptr_t", code.guest_ram(self.core, size)))
        ram = ffi.new("struct aiokvm_ram *", {"size": size[0], "host": ffi.cast("uint8_t *", host)})
        self.word = ffi.new("uint32_t *")
        self.irq = os.eventfd(0, os.EFD_NONBLOCK)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.vrings = [lib.aiokvm_vring_new(ram, 1, SIZE) for _ in range(2)]
        notifier = ffi.new("struct aiokvm_notifier *", {"irqfd": self.irq, "status": self.word})
        for queue, vring in enumerate(self.vrings):
            code.guest_areas(self.core, queue, areas)
            desc, avail, used = areas
            wrong = lib.aiokvm_vring_start(vring, SIZE, desc, avail, used, FEATURES)
            wrong = wrong or lib.aiokvm_net_nic_set_queue(
                self.end.core, queue, vring, SIZE, self.kicks[queue], notifier
            )
            if wrong:
                raise RuntimeError(f"queue {queue} cannot be used: {wrong}")
        self.receive()

    def send(self, count: int, to: int = 2, source: int = 1) -> None:
        wants = self.code.guest_send(self.core, count, 60, to, source)
        if wants < 0:
            raise RuntimeError("frames that were sent have not come back")
        if wants:
            os.eventfd_write(self.kicks[TRANSMIT], 1)

    def receive(self) -> int:
        count = int(self.code.guest_receive(self.core))
        os.eventfd_write(self.kicks[RECEIVE], 1)
        return count

    def close(self) -> None:
        self.end.close()
        for vring in self.vrings:
            lib.aiokvm_vring_free(vring)
        for fd in (self.irq, *self.kicks):
            os.close(fd)
        self.code.guest_free(self.core)


@asynccontextmanager
async def guest_and_port(driver: FFI, code: Any) -> AsyncIterator[tuple[Guest, Port]]:
    plane = Plane(current_loop())
    guest, port = Guest(driver, code, plane), Port()
    try:
        (await port.open(plane, print)).link(guest.end)
        yield guest, port
    finally:
        await port.close()
        guest.close()
        plane.close()


async def taking(driver: FFI, code: Any, count: int, most: int) -> float:
    """Frames a second that Python takes and looks at."""
    async with guest_and_port(driver, code) as (guest, port):
        left, spent_ns, known = SIZE, 0, 0
        guest.send(SIZE)
        begin_ns = time.perf_counter_ns()
        async for batch in port.batches(most):
            for frame in batch:
                if frame[12] << 8 | frame[13] == ETHERTYPE_IP:
                    known += 1
            left -= len(batch)
            if left == 0:
                spent_ns += time.perf_counter_ns() - begin_ns
                if known >= count:
                    return known / spent_ns * 1e9
                left = SIZE
                guest.send(SIZE)
                begin_ns = time.perf_counter_ns()
    raise RuntimeError("the port was closed")


async def sending(driver: FFI, code: Any, count: int, most: int) -> float:
    """Frames a second that Python sends."""
    async with guest_and_port(driver, code) as (guest, port):
        sent, spent_ns = 0, 0
        frames = [bytes.fromhex("020000000001 020000000002 0800") + bytes(46)] * most
        while sent < count:
            begin_ns = time.perf_counter_ns()
            for _ in range(SIZE // most):
                await port.send(frames)
            spent_ns += time.perf_counter_ns() - begin_ns
            if guest.receive() != SIZE // most * most:
                raise RuntimeError("frames were lost")
            sent += SIZE // most * most
            await anyio.lowlevel.checkpoint()
    return sent / spent_ns * 1e9


async def lag_of(driver: FFI, code: Any, count: int, from_guest: bool) -> float:
    """How late a timer of the loop is at most, in 99 of 100 cases, under a flood: in seconds."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + 0.001
            await anyio.sleep(0.001)
            late.append(time.perf_counter() - due)

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        await (taking if from_guest else sending)(driver, code, count, 64)
        group.cancel_scope.cancel()
    return statistics.quantiles(late, n=100)[-1]


async def switching(driver: FFI, code: Any, count: int, most: int, to_guest: bool) -> float:
    """Frames a second that C forwards: to another guest, or to a port that has no room and drops them."""
    async with Switch() as switch:
        ports = switch.port(), switch.port()
        plane = ports[0].plane
        guests = [Guest(driver, code, plane) for _ in ports]
        sink = Port(depth=1, on_full="drop")
        await switch.connect(sink)
        try:
            for guest, port in zip(guests, ports, strict=True):
                (await port.open(plane, print)).link(guest.end)
            # Station 2 makes itself heard.
            if to_guest:
                guests[1].send(1, to=1, source=2)
            else:
                await sink.send(b"\xff" * 6 + b"\2\0\0\0\0\2" + b"\x08\x00" + bytes(46))
            while lib.aiokvm_net_serve(plane.core, 1000000) == 1:
                pass
            for guest in guests:
                guest.receive()
            serve = int(ffi.cast("uintptr_t", ffi.addressof(lib, "aiokvm_net_serve")))
            net = driver.cast("void *", int(ffi.cast("uintptr_t", plane.core)))
            receiver = guests[1].core if to_guest else driver.NULL
            kick = guests[0].kicks[TRANSMIT]
            spent_ns = code.guest_flood(serve, net, guests[0].core, receiver, kick, count, most)
            if not spent_ns or switch.stats().forwarded < count:
                raise RuntimeError(f"frames were lost: {switch.stats()}")
            return float(count / spent_ns * 1e9)
        finally:
            for guest, port in zip(guests, ports, strict=True):
                await port.close()
                guest.close()


def main(rounds: int, count: int) -> None:
    found: dict[tuple[str, int], list[float]] = {}
    late: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        driver, code = library(Path(folder))

        def run(
            what: str, most: int, options: Any, work: Callable[..., Awaitable[float]], *more: Any
        ) -> None:
            frames = count // SIZE * SIZE
            rate = anyio.run(work, driver, code, frames, most, *more, **options)
            found.setdefault((what, most), []).append(rate)

        for _ in track(range(rounds), "rounds"):
            for most in BATCHES:
                for loop, options in LOOPS.items():
                    run(f"guest to program, {loop}", most, options, taking)
                    run(f"program to guest, {loop}", most, options, sending)
                run("guest through the switch", most, LOOPS["asyncio"], switching, False)
                run("guest through the switch to a guest", most, LOOPS["asyncio"], switching, True)
            for loop, options in LOOPS.items():
                for way, from_guest in (("guest to program", True), ("program to guest", False)):
                    lag = anyio.run(lag_of, driver, code, 10 * count, from_guest, **options)
                    late.setdefault(f"{way}, {loop}", []).append(lag)
    table = Table("", *(f"batches of {batch}" for batch in BATCHES))
    rows: list[dict[str, object]] = []
    for what in dict.fromkeys(what for what, _ in found):
        rates = [statistics.median(found[what, batch]) for batch in BATCHES]
        table.add_row(what, *(f"{rate / 1e6:.2f} M/s" for rate in rates))
        rows += [
            {"what": what, "batch": batch, "frames_per_s": rate}
            for batch, rate in zip(BATCHES, rates, strict=True)
        ]
    lags = Table("flood", "a timer is late by (p99)")
    for what, seconds in late.items():
        lags.add_row(what, f"{statistics.median(seconds) * 1e3:.2f} ms")
        rows.append({"what": what, "lag_p99_s": statistics.median(seconds)})
    Console().print(table, lags)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ports.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=200_000, help="frames a round")
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.count)
