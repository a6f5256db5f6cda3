"""How a Linux guest ends, and begins again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import VM, Exit, ExitReason, WasReset, block, boot, images

if TYPE_CHECKING:
    from pathlib import Path

    from tests.linux.conftest import LinuxBooter

pytestmark = [pytest.mark.linux, pytest.mark.anyio]

WAIT_S = 120.0
QUIET = "console=ttyS0 quiet panic=-1"


@pytest.mark.parametrize(
    ("command", "option", "reason", "code", "detail"),
    [
        ("poweroff -f", "", ExitReason.SHUTDOWN, None, ""),
        ("reboot -f", "", ExitReason.RESET, None, "ACPI reset register"),
        ("reboot -f", "reboot=k", ExitReason.RESET, None, "keyboard controller"),
        ("reboot -f", "reboot=p", ExitReason.RESET, None, "port 0xcf9"),
        ("reboot -f", "reboot=b", ExitReason.RESET, None, "jump to the reset vector"),
        ("reboot -f", "reboot=t", ExitReason.RESET, None, "vCPU 0: triple fault; rip="),
        ("echo c >/proc/sysrq-trigger", "", ExitReason.RESET, None, ""),
        (r"printf '\052' | /aiokvm/debug-exit", "", ExitReason.DEBUG_EXIT, 42, ""),
    ],
)
async def test_end(
    command: str, option: str, reason: ExitReason, code: int | None, detail: str, boot_linux: LinuxBooter
) -> None:
    async with boot_linux(cmdline=f"{QUIET} {option}") as guest:
        await guest.vm.serial.send(command.encode() + b"\n")
        with anyio.fail_after(WAIT_S):
            end = await guest.vm.wait()
        assert (end.reason, end.code) == (reason, code)
        assert end.detail.startswith(detail)


async def test_a_guest_that_reboots_comes_up_again(boot_linux: LinuxBooter, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    async with boot_linux(cpus=2, on_reset="reboot", disks=[block.Raw(disk)]) as guest:
        events = guest.vm.events()
        for times in range(1, 3):
            await guest.run("echo here >/tmp/file")
            await guest.run(f"printf {times} | dd of=/dev/vda bs=512 conv=sync 2>/dev/null; sync")
            await guest.vm.serial.send(b"reboot -f\n")
            await guest.boot()
            event = await anext(events)
            assert event == WasReset(guest.vm.name, "ACPI reset register")
            assert "No such file" in await guest.run("cat /tmp/file 2>&1; true")
            assert await guest.run("dd if=/dev/vda bs=1 count=1 2>/dev/null") == str(times)
            assert await guest.run("nproc") == "2"
            assert await guest.troubles() == []
        assert guest.vm.exit is None
        assert await guest.vm.stop(timeout=WAIT_S) == Exit(ExitReason.SHUTDOWN)


async def test_a_pause_is_no_lockup(boot_linux: LinuxBooter) -> None:
    """A watchdog that finds a CPU busy for 2 s in the kernel says so, if it is not told of a pause."""
    async with boot_linux() as guest:
        assert "kvm-clock" in await guest.run("dmesg | grep kvm-clock | tail -n 1")
        await guest.run("echo 1 >/proc/sys/kernel/watchdog_thresh")
        # A system call that takes a while: the CPU is in the kernel when the pause comes.
        await guest.vm.serial.send(b"dd if=/dev/zero of=/dev/null bs=64M count=40 2>/dev/null\n")
        for _ in range(3):
            await anyio.sleep(1)
            await guest.vm.pause()
            await anyio.sleep(6)
            await guest.vm.resume()
        await guest.finished()
        assert await guest.troubles() == []


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
