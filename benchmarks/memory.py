"""Resident memory of the process beyond guest RAM: with one machine, and for each further one.

Each value is taken in a process of its own. All that is resident beside guest RAM counts, the interpreter
and what it imports included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aiokvm import VM, boot
from bench.resident import resident_kib

RESULTS = Path(__file__).with_name("results")
# sti; 1: hlt; jmp 1b: an idle guest.
PAYLOAD = bytes.fromhex("fb f4 ebfd")


async def inner(machines: int) -> None:
    """Print the resident memory without a machine, and with that many running."""
    before = resident_kib()
    async with AsyncExitStack() as stack:
        for i in range(machines):
            vm = await stack.enter_async_context(
                await VM.create(boot=boot.Flat(PAYLOAD), memory="16M", name=f"m{i}")
            )
            await vm.start()
        print(json.dumps([before, resident_kib()]))


def measure(machines: int) -> tuple[int, int]:
    argv = [sys.executable, __file__, "--inner", str(machines)]
    before, after = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    return before, after


def main(rounds: int, more: int) -> None:
    ones = [measure(1) for _ in range(rounds)]
    many = [measure(1 + more) for _ in range(rounds)]
    imports = statistics.median(before for before, _ in ones)
    one = statistics.median(after for _, after in ones)
    further = (statistics.median(after for _, after in many) - one) / more
    table = Table("resident beyond guest RAM", "KiB")
    table.add_row("Python and aiokvm, no machine", f"{imports:.0f}")
    table.add_row("with one machine", f"{one:.0f}")
    table.add_row(f"each further machine (of {more})", f"{further:.0f}")
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    figures = {"imports_kib": imports, "one_kib": one, "further_kib": further}
    (RESULTS / "memory.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--more", type=int, default=50)
    parser.add_argument("--inner", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inner:
        asyncio.run(inner(arguments.inner))
    else:
        main(arguments.rounds, arguments.more)
