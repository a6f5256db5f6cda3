"""What devices get wrong is told ever so seldom, and always emitted."""

from __future__ import annotations

import time

import pytest

from aiokvm import host_limits
from aiokvm.logs import BURST
from aiokvm.machine.events import DeviceFailed, DeviceNeedsReset, EventHub
from aiokvm.machine.failures import Failures
from aiokvm.machine.log import machine_logger

pytestmark = pytest.mark.anyio


async def test_failures_are_logged_ever_so_seldom(caplog: pytest.LogCaptureFixture, fresh_log: None) -> None:
    hub = EventHub()
    failures = Failures("vm", machine_logger("vm"), hub)
    events = hub.subscribe()
    error = ZeroDivisionError()
    for _ in range(100):
        failures.on_needs_reset("Disk", "the index is ahead")
        failures.on_failed("Disk", "notified", error)
    hub.close()
    # One kind does not hide the other. A second may have passed meanwhile.
    for level in ("WARNING", "ERROR"):
        assert BURST <= len([r for r in caplog.records if r.levelname == level]) <= BURST + 1
    assert failures.errors == 100
    found = [event async for event in events]
    assert found[:2] == [
        DeviceNeedsReset("vm", "Disk", "the index is ahead"),
        DeviceFailed("vm", "Disk", "notified", error),
    ]
    assert len(found) == 200


def test_many_machines_write_no_more_than_the_process_may(
    caplog: pytest.LogCaptureFixture, fresh_log: None
) -> None:
    """Nor do those that come one after the other, each for a moment."""
    (limit,) = (limit for limit in host_limits() if limit.unit == "lines in a second")
    began_ns = time.monotonic_ns()
    for number in range(100):
        failures = Failures(f"vm-{number}", machine_logger(f"vm-{number}"), EventHub())
        for _ in range(100):
            failures.on_needs_reset("Disk", "the index is ahead")
            failures.on_failed("Disk", "notified", ZeroDivisionError())
        del failures
    seconds = (time.monotonic_ns() - began_ns) // 1_000_000_000
    # The first and the last of the budget's seconds are not whole.
    assert 0 < len(caplog.records) <= limit.value * (seconds + 2)
    (limit,) = (limit for limit in host_limits() if limit.unit == "lines in a second")
    assert limit.used <= limit.value
