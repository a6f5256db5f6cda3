"""What a guest can bring about without end does not fill the log."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import NoReturn

import pytest

from aiokvm import host_limits
from aiokvm.logs import BURST, SeldomLogger

PACKAGE = Path(__file__).parents[1] / "aiokvm"
PARTS = ("aio", "block", "machine", "net", "virtio")
LOGGING = {"critical", "debug", "error", "exception", "info", "log", "warning"}


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000

    def __call__(self) -> int:
        return self.seconds * 1_000_000_000


@pytest.fixture(autouse=True)
def second(fresh_log: None) -> None:
    """For all of them."""


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
        "again 0 (990 more before this one were left out)"
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


def deep(levels: int) -> NoReturn:
    if levels:
        # A line each, for a frame that is repeated is shown three times.
        exec(f"deep({levels - 1})\n", {"deep": deep})
    raise ZeroDivisionError


def test_the_lines_of_a_traceback_count(caplog: pytest.LogCaptureFixture) -> None:
    (limit,) = (limit for limit in host_limits() if limit.unit == "lines in a second")
    seldom = SeldomLogger(logging.getLogger("aiokvm.test"))
    for kind in [seldom.kind() for _ in range(20)]:
        for _ in range(BURST):
            try:
                deep(10)
            except ZeroDivisionError:
                kind.exception("it failed\nin two lines")
    lines = sum(record.getMessage().count("\n") + 1 for record in caplog.records)
    lines += sum((record.exc_text or "").count("\n") for record in caplog.records)
    assert lines > len(caplog.records) * 10
    # A third of the budget, in two seconds at most.
    assert lines < limit.value
    # However long it is, it is told.
    caplog.clear()
    try:
        deep(200)
    except ZeroDivisionError:
        SeldomLogger(logging.getLogger("aiokvm.test")).exception("it failed")
    assert len(caplog.records) == 1


class Untold:
    def __repr__(self) -> str:
        raise ValueError("not to be shown")


def test_what_cannot_be_shown_is_left_to_the_handlers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger = logging.getLogger("aiokvm.test")
    # pytest's own handler would raise.
    monkeypatch.setattr(logger, "propagate", False)
    seldom = SeldomLogger(logger)
    seldom.error("%r failed", Untold())
    seldom.error("%d of them failed", "some")
    assert caplog.records == []


def test_what_is_not_enabled_takes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    seldom = SeldomLogger(logging.getLogger("aiokvm.test"))
    with caplog.at_level(logging.ERROR, "aiokvm.test"):
        for _ in range(100):
            seldom.warning("nothing")
        for _ in range(BURST):
            seldom.error("something")
    assert len(caplog.records) == BURST


def test_kinds_do_not_hide_each_other_and_have_one_share(caplog: pytest.LogCaptureFixture) -> None:
    seldom = SeldomLogger(logging.getLogger("aiokvm.test"))
    kinds = [seldom.kind() for _ in range(50)]
    for kind in kinds[:2]:
        for _ in range(100):
            kind.warning("flood")
    assert len(caplog.records) == 2 * BURST
    for kind in kinds:
        for _ in range(100):
            kind.warning("flood")
    # One alone may have a third, of each second.
    assert len(caplog.records) < 50 * BURST


def test_what_a_guest_can_cause_goes_through_the_budget() -> None:
    """The parts that serve guests give what they log to a `SeldomLogger`; one line is told once a process."""
    for path in (path for part in PARTS for path in (PACKAGE / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in LOGGING or path.name == "emulated.py":
                continue
            owner = ast.unparse(node.func.value)
            assert not owner.startswith(("logger", "get_logger", "logging")), (path, node.lineno)
            # What the program does by itself.
            assert not owner.endswith(".always") or node.func.attr == "info", (path, node.lineno)
