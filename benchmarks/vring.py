"""Chains a second through vring.c: split and packed, with and without indirect descriptors and event index.

A driver in C makes a batch of chains available, each of three descriptors: 16 bytes to read, 4096 and 1 to
write. What is timed is the device's side: take them, complete them, publish, and ask to be notified. That
includes two readings of the clock a batch. No KVM, one thread, a warm cache.

The variants take turns, round after round; a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from cffi import FFI
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
BATCHES = (1, 16, 64)
LAYOUTS = {"split": 0, "packed": 1 << 34}
OPTIONS = {
    "plain": 0,
    "event index": 1 << 29,
    "indirect": 1 << 28,
    "indirect, event index": 3 << 28,
    "indirect, event index, in order": 3 << 28 | 1 << 35,
}


def library(folder: Path) -> Any:
    """vring.c of this benchmark, the tests' driver and the core's vring, compiled."""
    ffi = FFI()
    ffi.cdef("uint64_t run_vring(uint64_t features, uint32_t count, uint32_t batch);")
    core, tests = ROOT / "aiokvm/_core", ROOT / "tests/core"
    sources = [HERE / "vring.c", tests / "vring_driver.c", *sorted(core.glob("vring*.c"))]
    built = folder / "vring.so"
    flags = ["-std=gnu17", "-O3", "-DNDEBUG", "-shared", "-fPIC", f"-I{core}", f"-I{tests}"]
    subprocess.run(["cc", *flags, "-o", str(built), *map(str, sources)], check=True)
    return ffi.dlopen(str(built))


def main(rounds: int, count: int) -> None:
    found: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lib = library(Path(folder))
        for _ in track(range(rounds), "rounds"):
            for layout, option, batch in product(LAYOUTS, OPTIONS, BATCHES):
                chains = max(count // batch, 1) * batch
                spent_ns = lib.run_vring(LAYOUTS[layout] | OPTIONS[option], chains, batch)
                if not spent_ns:
                    raise RuntimeError(f"the {layout} queue, {option}, lost chains or interrupts")
                found.setdefault((layout, option, batch), []).append(chains / spent_ns * 1e9)
    table = Table("layout", "features", *(f"batches of {batch}" for batch in BATCHES))
    rows = []
    for layout, option in product(LAYOUTS, OPTIONS):
        rates = [statistics.median(found[layout, option, batch]) for batch in BATCHES]
        table.add_row(layout, option, *(f"{rate / 1e6:.1f} M/s" for rate in rates))
        rows += [
            {"layout": layout, "features": option, "batch": batch, "chains_per_s": rate}
            for batch, rate in zip(BATCHES, rates, strict=True)
        ]
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "vring.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1_000_000, help="chains a round")
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.count)
