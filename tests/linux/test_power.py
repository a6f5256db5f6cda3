"""How a Linux guest ends, and begins again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import VM, Exit, ExitReason, boot, images

if TYPE_CHECKING:
    from tests.linux.conftest import LinuxBooter

pytestmark = [pytest.mark.linux, pytest.mark.anyio]

WAIT_S = 120.0
QUIET = "console=ttyS0 quiet panic=-1"


@pytest.mark.parametrize(
    ("command", "option", "reason", "code"),
    [
        ("poweroff -f", "", ExitReason.SHUTDOWN, None),
        ("reboot -f", "", ExitReason.RESET, None),
        ("reboot -f", "reboot=k", ExitReason.RESET, None),
        ("reboot -f", "reboot=t", ExitReason.CRASH, None),
        ("echo c >/proc/sysrq-trigger", "", ExitReason.RESET, None),
        (r"printf '\052' | /aiokvm/debug-exit", "", ExitReason.DEBUG_EXIT, 42),
    ],
)
async def test_end(
    command: str, option: str, reason: ExitReason, code: int | None, boot_linux: LinuxBooter
) -> None:
    async with boot_linux(cmdline=f"{QUIET} {option}") as guest:
        await guest.vm.serial.send(command.encode() + b"\n")
        with anyio.fail_after(WAIT_S):
            end = await guest.vm.wait()
        assert (end.reason, end.code) == (reason, code)
        assert ("triple fault" in end.detail) == (reason is ExitReason.CRASH)


async def test_reset_boots_again(boot_linux: LinuxBooter) -> None:
    async with boot_linux(cpus=2) as guest:
        for _ in range(2):
            await guest.run("echo here >/tmp/file")
            await guest.vm.reset()
            await guest.boot()
            assert (
                await guest.run("cat /tmp/file || nproc")
                == "cat: can't open '/tmp/file': No such file or directory\n2"
            )
            assert await guest.troubles() == []
        assert await guest.vm.stop(timeout=WAIT_S) == Exit(ExitReason.SHUTDOWN)


async def test_two_machines_at_once(boot_linux: LinuxBooter) -> None:
    ends: dict[int, Exit] = {}

    async def live(cpus: int) -> None:
        async with boot_linux(cpus=cpus) as guest:
            assert await guest.run("nproc") == str(cpus)
            ends[cpus] = await guest.vm.stop(timeout=WAIT_S)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(live, 1)
        tasks.start_soon(live, 2)
    assert ends == {1: Exit(ExitReason.SHUTDOWN), 2: Exit(ExitReason.SHUTDOWN)}


async def test_kill_in_the_middle_of_a_boot() -> None:
    kernel = images.path("cloud") or await images.pull("cloud")
    async with await VM.create(boot=boot.Linux(kernel, cmdline="console=ttyS0"), cpus=2) as vm:
        await vm.start()
        await vm.serial.expect(b"Booting SMP configuration", WAIT_S)
        before = time.monotonic()
        assert await vm.kill() == Exit(ExitReason.KILLED)
        assert time.monotonic() - before < 5
