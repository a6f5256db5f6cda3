"""Fixtures and markers that all tests share."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from aiokvm import kvm
from aiokvm.aio import failures
from aiokvm.budget import LOG_LINES, Share
from aiokvm.kvm.probe import HARDWARE_RING0, ring0_speed
from tests import holdups

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=holdups.LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Iterator[object]:
    """Every test marked anyio runs on the three loops, and none holds them."""
    with holdups.measured(request) as meter:
        yield holdups.backend(request.param, meter)


@pytest.fixture
def step(request: pytest.FixtureRequest) -> Iterator[holdups.Step]:
    """``with step():`` what a callback of the loop does, in a test that has no loop."""
    with holdups.measured(request) as meter:

        @contextmanager
        def step() -> Iterator[None]:
            meter.begin()
            try:
                yield
            finally:
                meter.end(None)

        yield step


def _until_fresh() -> None:
    """Until a second begins in which guests have caused no lines, or few: a tenth of what there may be."""
    share = Share(LOG_LINES)
    while not share.fits(300):
        pass


@pytest.fixture(autouse=True)
def lines_to_spare(request: pytest.FixtureRequest) -> None:
    """Whoever looks at the log finds all of it: the tests before have left lines of the second's budget."""
    if "caplog" in request.fixturenames:
        _until_fresh()


@pytest.fixture
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a test that fills the log, or counts its lines: it has the process's budget of lines for itself."""
    monkeypatch.setattr(failures, "log", failures.log.kind())
    _until_fresh()
    yield
    _until_fresh()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--holdups", metavar="FILE", help="write what the worst step of each test took")
    slower = "steps may take so many times as long as on a CPU that is not emulated"
    parser.addoption("--slower", type=float, default=1.0, metavar="TIMES", help=slower)


class Passed:
    """Keeps a list of what has passed, and leaves that out: a lab that dies does not take it along."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.called: set[str] = set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        passed = set(self.file.read_text().splitlines()) if self.file.exists() else set()
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.called.add(report.nodeid)
        elif report.when == "teardown" and report.passed and report.nodeid in self.called:
            with self.file.open("a") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    if file := os.environ.get("AIOKVM_PASSED"):
        config.pluginmanager.register(Passed(Path(file)))
    # Programs that tests start are to import what is installed, not the source tree that they stand in.
    os.environ["PYTHONSAFEPATH"] = "1"
    # A shell that starts pytest in the background has it ignored, and so would programs that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes says more about the machine that runs it than about the code.
    hypothesis.settings.register_profile("aiokvm", deadline=None)
    hypothesis.settings.load_profile("aiokvm")


def why_no_kvm() -> str:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return ""
    return "no access to /dev/kvm" if Path("/dev/kvm").exists() else "this machine has no /dev/kvm"


def why_no_linux() -> str:
    if reason := why_no_kvm():
        return reason
    with kvm.System() as system:
        speed = ring0_speed(system)
    if speed >= HARDWARE_RING0:
        return ""
    return f"ring 0 has no hardware here ({speed / 1e6:.1f} M instructions/s): tools/linux-tests uses the lab"


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark, why_not in (("kvm", why_no_kvm), ("linux", why_no_linux)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := why_not()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
