"""No test holds the loop: each runs under a measure of the CPU time of every step of its loop.

A test on a loop fails when a callback, or a task between two awaits, takes `LIMIT_S` of its thread's CPU
time: on the three loops, the test's own steps included. What takes a test itself long is done before, or in
a thread (`anyio.to_thread.run_sync`), or the test is marked ``computes`` and is not measured. A hostile test
with no loop, of a model, takes the fixture ``step`` and makes the calls that are the loop's in a callback
under it: ``with step(): device.notified(0)``.

The collection of garbage counts, of what the test has made: what was there before, pytest's own and other
tests' objects, are out of its reach for as long as the test runs.

``--holdups FILE`` writes what the worst step of each test took, and where a long one was half way:
benchmarks/holdups.py makes a table of it.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from aiokvm.aio.asyncio_loop import measure_steps
from aiokvm.aio.steps import StepMeter

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    Step = Callable[[], AbstractContextManager[None]]

# With eager tasks, which run before `create_task` returns, asyncio is another loop: Python 3.12 and later.
LOOPS = ["asyncio", "uvloop", "trio", *(["asyncio-eager"] if sys.version_info >= (3, 12) else [])]

WANTED_S = 0.005
# In no callback this much.
LIMIT_S = 0.05


def where(stack: str) -> str:
    """The innermost place of ours in a traceback: in aiokvm, or in a test. Empty if there is none."""
    frames = re.findall(r'File ".*/((?:aiokvm|tests)/[^"]*)", line (\d+), in (\S+)', stack)
    return "{}:{} {}".format(*frames[-1]) if frames else ""


@contextmanager
def own_garbage() -> Iterator[None]:
    """What is here before is out of the reach of the collection of garbage: pytest's own, other tests'."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def measured(request: pytest.FixtureRequest) -> Iterator[StepMeter]:
    """What the steps of this test take; it fails past the limit."""
    file = request.config.getoption("--holdups")
    limit_s = LIMIT_S * request.config.getoption("--slower")
    with own_garbage(), StepMeter(WANTED_S if file else limit_s) as meter:
        yield meter
    if meter.worst is None or request.node.get_closest_marker("computes"):
        return
    if file:
        worst = {"seconds": meter.worst.cpu_seconds, "where": where(meter.worst.stack)}
        with Path(file).open("a") as lines:
            lines.write(json.dumps({"test": request.node.nodeid, **worst}) + "\n")
    if meter.worst.cpu_seconds >= limit_s:
        pytest.fail(
            f"{meter.worst.task or 'a callback'} held the loop for {meter.worst.cpu_seconds * 1e3:.1f} ms "
            f"of CPU time; half way it was here:\n{meter.worst.stack}",
            pytrace=False,
        )


def backend(name: str, meter: StepMeter) -> tuple[str, dict[str, Any]]:
    """What anyio is told to run a test on this loop under the measure."""
    if name == "trio":
        from aiokvm.aio.trio_loop import StepInstrument

        return "trio", {"instruments": [StepInstrument(meter)]}

    def new_loop() -> asyncio.AbstractEventLoop:
        import asyncio

        loop = uvloop.new_event_loop() if name == "uvloop" else asyncio.new_event_loop()
        if name == "asyncio-eager":
            loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        measure_steps(loop, meter)
        return loop

    return "asyncio", {"loop_factory": new_loop}
