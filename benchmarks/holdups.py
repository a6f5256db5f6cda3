"""What holds the loop longest, case by case: the tests that are hostile, and all others on a loop.

Every test on a loop runs under a measure of the CPU time that each step of the loop takes (tests/holdups.py),
and those of the core under one of each call (tests/core/holdups.h). This runs them and shows the worst step
of each, on each event loop: 5 ms are wanted, 50 ms fail.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CORE = "tests/core"
LOOPS = ("asyncio", "uvloop", "trio")
# On one line each: what stays below is not shown.
SHOWN_MS = 1.0


def measure(arguments: list[str], file: Path) -> int:
    """Run the tests; their exit code."""
    # -P: what is installed is measured, not the source tree that this stands in.
    argv = ["-P", "-m", "pytest", "-q", "--holdups", str(file), "-m", "not linux and not lab", *arguments]
    return subprocess.run([sys.executable, *argv], cwd=HERE.parent, check=False).returncode


def measure_core(file: Path) -> int:
    """The same for the core, as it is installed: without sanitizers."""
    tree, build = HERE.parent, HERE.parent / "build/core-none"
    meson, options = Path(sys.executable).with_name("meson"), ["-Dtests=true", "-Dbuildtype=release"]
    environment = {**os.environ, "PATH": f"{meson.parent}:{os.environ['PATH']}"}
    if not build.is_dir():
        subprocess.run([meson, "setup", *options, build], cwd=tree, env=environment, check=True)
    code = subprocess.run([meson, "test", "-C", build], env=environment, check=False).returncode
    log = (build / "meson-logs/testlog.txt").read_text(errors="replace")
    with file.open("a") as lines:
        for ms, call, test in re.findall(r"^# held up: ([\d.]+) ms in (.*), (\w+)$", log, re.M):
            row = {"test": f"{CORE}::{test}", "seconds": float(ms) / 1e3, "where": call}
            lines.write(json.dumps(row) + "\n")
    return code


@dataclass
class Case:
    """Milliseconds by loop, of all parameters; ``where`` the worst was half way, if it was long."""

    ms: dict[str, float] = field(default_factory=dict)
    where: str = ""

    @property
    def worst(self) -> float:
        return max(self.ms.values())

    def add(self, loop: str, ms: float, where: str) -> None:
        if not self.ms or ms > self.worst:
            self.where = where
        self.ms[loop] = max(self.ms.get(loop, 0.0), ms)


def cases(file: Path) -> dict[str, Case]:
    """The worst first."""
    found: dict[str, Case] = defaultdict(Case)
    for line in file.read_text().splitlines():
        row = json.loads(line)
        name, _, parameters = row["test"].partition("[")
        loop = next((name for name in LOOPS if name in parameters.rstrip("]").split("-")), "none")
        found[name].add(loop, 1e3 * row["seconds"], row["where"])
    return dict(sorted(found.items(), key=lambda item: -item[1].worst))


def report(found: dict[str, Case], shown_ms: float) -> None:
    table = Table("case", *LOOPS, "no loop", "half way", title="CPU time of the worst step, ms")
    for name, case in found.items():
        if case.worst >= shown_ms:
            by_loop = (f"{case.ms[loop]:.1f}" if loop in case.ms else "" for loop in (*LOOPS, "none"))
            table.add_row(name, *by_loop, case.where)
    Console(width=200).print(table)
    print(f"{len(found)} cases; those below {shown_ms:g} ms on every loop are not shown")


def main(arguments: list[str], shown_ms: float) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "holdups.jsonl"
        file.touch()
        in_python = [argument for argument in arguments if argument.rstrip("/") != CORE]
        code = measure(in_python, file) if in_python else 0
        if "tests" in arguments or in_python != arguments:
            code = measure_core(file) or code
        found = cases(file)
    report(found, shown_ms)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "holdups.json").write_text(
        json.dumps({name: asdict(case) for name, case in found.items()}, indent=1)
    )
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tests", nargs="*", help=f"of pytest, or {CORE}; else all", default=["tests"])
    parser.add_argument("--at-least", type=float, default=SHOWN_MS, metavar="MS", help="what is shown")
    parsed = parser.parse_args()
    sys.exit(main(parsed.tests, parsed.at_least))
