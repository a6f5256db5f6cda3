"""One logger a part, and the machine's name in each record about one."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import aiokvm
from aiokvm import Device
from aiokvm.logs import BURST
from aiokvm.machine.log import machine_logger

if TYPE_CHECKING:
    from tests.machine.conftest import Guest, Program

SOURCE = Path(__file__).parents[2] / "aiokvm"
CALLS = [
    (path.relative_to(SOURCE), node)
    for path in sorted(SOURCE.rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call)
    and ast.unparse(node.func) in ("logging.getLogger", "getLogger", "get_logger")
    # It makes the loggers for all.
    and path.name != "text.py"
]


@pytest.mark.parametrize(("path", "call"), CALLS, ids=lambda value: str(value)[:30])
def test_a_logger_is_named_after_its_part(path: Path, call: ast.Call) -> None:
    part = path.parts[0]
    # The command line shows what all parts log.
    expected = ["aiokvm"] if part == "cli" else [f"aiokvm.{part}"]
    assert [ast.literal_eval(argument) for argument in call.args] == expected


def test_what_is_about_a_machine_is_logged_with_its_name() -> None:
    """No other file of the part makes a logger, and none logs by the root's. One is about the host."""
    assert [path.name for path, _ in CALLS if path.parts[0] == "machine"] == ["emulated.py", "log.py"]
    for path in (SOURCE / "machine").glob("*.py"):
        source = path.read_text()
        assert "import logging" not in source or path.name == "log.py", path


def test_a_record_has_the_machines_name(caplog: pytest.LogCaptureFixture) -> None:
    machine_logger("web").warning("it rains")
    (record,) = caplog.records
    assert (record.name, record.__dict__["machine"]) == ("aiokvm.machine", "web")


class Broken(Device):
    """Fails at everything."""

    def read(self, offset: int, size: int) -> int:
        raise ValueError("no read today")

    def write(self, offset: int, size: int, value: int) -> None:
        self.timer(self.now_ns(), self.on_timer)

    def on_timer(self) -> None:
        raise ValueError("no timer today")

    async def run(self) -> None:
        raise ValueError("no task today")


@pytest.mark.anyio
@pytest.mark.kvm
async def test_all_that_a_machine_logs_has_its_name(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aiokvm")
    # in al, 0x99; mov dx, 0x300; out dx, al; in al, dx; jmp $
    code = bytes.fromhex("e4 99 66 ba 00 03 ee ec eb fe")
    devices = [Broken().at(pio=0x300)]
    async with guest(
        code, mode="protected", start=False, devices=devices, name="web", log_unclaimed=True
    ) as vm:
        events = vm.events()
        await vm.start()
        failures = set()
        async for event in events:
            if isinstance(event, aiokvm.DeviceFailed):
                failures.add(event.access.split()[0])
            if len(failures) == 3:
                break
    assert failures == {"run", "read", "timer"}
    records = [record for record in caplog.records if record.name.startswith("aiokvm")]
    assert {record.__dict__["machine"] for record in records} == {"web"}
    assert {record.levelname for record in records} >= {"INFO", "ERROR"}


@pytest.mark.anyio
@pytest.mark.kvm
async def test_a_guest_cannot_flood_the_log(
    guest: Guest, program: type[Program], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiokvm")
    code = program().read(0x9999_0000).times(300).end()
    async with guest(code, mode="protected", start=False, log_unclaimed=True) as vm:
        await vm.start()
        await vm.wait()
    told = [record for record in caplog.records if "nothing is there" in record.getMessage()]
    # A second may have passed, or a few.
    assert BURST <= len(told) < 30
