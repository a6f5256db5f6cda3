"""How long a kick takes: from the call of pause until the vCPU stands still, at random moments.

A kick that gets lost is normally sent again 20 ms later. Here it is not: the pause would never come back, and
the run ends with an error that says so. A guest that waits for a coroutine stands still when that has
answered, so its times include the coroutine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from aiokvm import VM, Device, VcpuState, boot
from aiokvm.machine import vcpus

if TYPE_CHECKING:
    from collections.abc import Awaitable

RESULTS = Path(__file__).with_name("results")
MMIO = 0xD000_0000
# The longest moment between a resume and the next pause.
MOMENT_NS = 200_000
COROUTINE_S = 0.0002
LOST_S = 30.0

GUESTS = {
    "spins": "eb fe",  # jmp .
    "halts": "fa f4",  # cli; hlt
    "MMIO to a plain device": "a1 00 00 00 d0 eb f9",  # again: mov eax, [0xd0000000]; jmp again
    "waits for a coroutine": "a1 04 00 00 d0 eb f9",  # again: mov eax, [0xd0000004]; jmp again
}


class Answering(Device):
    """At once at offset 0, by a coroutine at others."""

    def read(self, offset: int, size: int) -> int | Awaitable[int]:
        return self.later() if offset else 0

    async def later(self) -> int:
        await asyncio.sleep(COROUTINE_S)
        return 0


async def kick(code: str, count: int, moments: random.Random) -> list[int]:
    """Nanoseconds of each pause."""
    taken = []
    async with await VM.create(boot=boot.Flat(bytes.fromhex(code), mode="protected"), memory="2M") as vm:
        vm.attach(Answering(), mmio=MMIO, size=8)
        await vm.start()
        for number in range(count):
            moment_ns = time.perf_counter_ns() + moments.randrange(MOMENT_NS)
            # A sleep would end when the loop's timers do, which is not at random.
            while time.perf_counter_ns() < moment_ns:  # noqa: ASYNC110
                await asyncio.sleep(0)
            start_ns = time.perf_counter_ns()
            try:
                async with asyncio.timeout(LOST_S):
                    await vm.pause()
            except TimeoutError:
                raise SystemExit(f"kick {number} is lost: no answer in {LOST_S:g} s") from None
            taken.append(time.perf_counter_ns() - start_ns)
            assert all(vcpu.state is VcpuState.PAUSED for vcpu in vm.vcpus)
            await vm.resume()
    return taken


def figures(taken: list[int]) -> dict[str, float]:
    """Of nanoseconds, in microseconds."""
    taken = sorted(taken)

    def at(share: float) -> float:
        return round(taken[min(len(taken) - 1, int(share * len(taken)))] / 1e3, 1)

    return {"p50_us": at(0.5), "p99_us": at(0.99), "p999_us": at(0.999), "max_us": round(taken[-1] / 1e3, 1)}


async def main(kicks: int, seed: int) -> None:
    vcpus.KICK_AGAIN_NS = 3600 * 10**9
    moments = random.Random(seed)
    results: dict[str, dict[str, float]] = {}
    table = Table("guest", "kicks", "lost", "p50 us", "p99 us", "p99.9 us", "max us")
    for name, code in GUESTS.items():
        count = kicks // len(GUESTS)
        results[name] = {"kicks": count, "lost": 0} | figures(await kick(code, count, moments))
        table.add_row(name, *(f"{value:g}" for value in results[name].values()))
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kicks.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kicks", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.kicks, arguments.seed))
