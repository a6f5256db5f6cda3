"""What a guest can bring about without end does not fill the log."""

from __future__ import annotations

import logging

import pytest

from aiokvm import host_limits
from aiokvm._core import lib
from aiokvm.logs import BURST, SeldomLogger


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000

    def __call__(self) -> int:
        return self.seconds * 1_000_000_000


@pytest.fixture(autouse=True)
def second() -> None:
    """A second of its own for each test: they share the process's budget of lines."""
    share = lib.aiokvm_share_new(lib.AIOKVM_BUDGET_LOG_LINES)
    while not lib.aiokvm_share_take(share, 40):
        pass
    lib.aiokvm_share_give(share, 40)
    lib.aiokvm_share_free(share)


def test_a_flood_is_ten_lines_and_one_a_second(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    seldom = SeldomLogger(logging.getLogger("aiokvm.test"), clock)
    for number in range(1000):
        seldom.warning("line %d", number)
    assert [record.getMessage() for record in caplog.records] == [f"line {n}" for n in range(BURST)]
    caplog.clear()
    clock.seconds += 1
    for number in range(1000):
        seldom.error("again %d", number)
    assert [record.getMessage() for record in caplog.records] == [
        "again 0 (990 more lines before this one were left out)"
    ]


def test_an_exception_is_logged_with_it(caplog: pytest.LogCaptureFixture) -> None:
    seldom = SeldomLogger(logging.getLogger("aiokvm.test"))
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        seldom.exception("it failed")
    assert "ZeroDivisionError" in caplog.text


def test_many_that_are_flooded_leave_lines_to_others(caplog: pytest.LogCaptureFixture) -> None:
    limit = next(limit for limit in host_limits() if limit.name == "lines of the log that guests cause")
    assert limit.each == 0
    flooded = [SeldomLogger(logging.getLogger("aiokvm.test")) for _ in range(10)]
    for seldom in flooded:
        for _ in range(20):
            seldom.warning("flood")
    assert len(caplog.records) < limit.value * 2  # a new second may have begun
    caplog.clear()
    SeldomLogger(logging.getLogger("aiokvm.test")).warning("still heard")
    assert [record.getMessage() for record in caplog.records] == ["still heard"]


def test_what_is_not_enabled_takes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    seldom = SeldomLogger(logging.getLogger("aiokvm.test"))
    with caplog.at_level(logging.ERROR, "aiokvm.test"):
        for _ in range(100):
            seldom.warning("nothing")
        for _ in range(BURST):
            seldom.error("something")
    assert len(caplog.records) == BURST
