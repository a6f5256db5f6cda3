"""What devices get wrong is told ever more seldom, and always emitted."""

from __future__ import annotations

import logging

import pytest

from aiokvm.machine.events import DeviceFailed, DeviceNeedsReset, EventHub
from aiokvm.machine.failures import LOGGED, Failures

pytestmark = pytest.mark.anyio


async def test_failures_are_logged_ever_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    hub = EventHub()
    failures = Failures("vm", logging.LoggerAdapter(logging.getLogger("aiokvm.machine"), {}), hub)
    events = hub.subscribe()
    error = ZeroDivisionError()
    for _ in range(100):
        failures.on_needs_reset("Disk", "the index is ahead")
        failures.on_failed("Disk", "notified", error)
    hub.close()
    # 16, 32 and 64 follow the first ten.
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == LOGGED + 3
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == LOGGED + 3
    assert failures.errors == 100
    found = [event async for event in events]
    assert found[:2] == [
        DeviceNeedsReset("vm", "Disk", "the index is ahead"),
        DeviceFailed("vm", "Disk", "notified", error),
    ]
    assert len(found) == 200
