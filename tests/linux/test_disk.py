from __future__ import annotations

import hashlib
import random
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

import pytest

from aiokvm import VM, Exit, ExitReason, WasReset, block, boot, images
from tests.linux.conftest import BOOT_S, COMMAND_S, SHELL, Guest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.linux, pytest.mark.anyio]

DATA_BYTES = 8 << 20


@pytest.fixture(scope="session")
async def debian() -> images.DebianDisk:
    """Debian's root file system; it was verified when it was built."""
    return images.find_debian() or await images.build_debian()


@asynccontextmanager
async def boot_debian(
    debian: images.DebianDisk,
    root: block.BlockBackend,
    *more: block.BlockBackend,
    mode: str,
    on_reset: Literal["exit", "reboot"] = "exit",
) -> AsyncIterator[VM]:
    linux = boot.Linux(
        debian.kernel, debian.initrd, f"console=ttyS0 quiet loglevel=3 panic=-1 root=/dev/vda {mode}"
    )
    async with await VM.create(boot=linux, memory="512M", disks=[root, *more], on_reset=on_reset) as vm:
        await vm.start()
        yield vm


async def login(vm: VM) -> Guest:
    await vm.serial.expect(b"login: ", BOOT_S)
    await vm.serial.send(b"root\n")
    await vm.serial.expect(b"# ", COMMAND_S)
    await vm.serial.send(SHELL)
    await vm.serial.expect(b"\0010\n", COMMAND_S)
    return Guest(vm)


async def test_debian_boots_from_a_disk_to_a_login(debian: images.DebianDisk, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(random.Random(2).randbytes(DATA_BYTES))
    root = block.Overlay(block.Raw(debian.disk, readonly=True), None)
    async with boot_debian(debian, root, block.Raw(data), mode="rw") as vm:
        guest = await login(vm)
        assert 'NAME="Debian GNU/Linux"' in await guest.run("cat /etc/os-release")
        assert re.match("/dev/vda / ext4 rw", await guest.run("grep ' / ' /proc/mounts"))
        assert await guest.run("systemctl is-system-running --wait") == "running"
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
        assert (await guest.run("sha256sum /dev/vdb")).split()[0] == digest
        # A module that the initramfs does not have.
        assert await guest.run("modprobe tun && grep -c ^tun /proc/modules") == "1"
        # What the guest writes and flushes is on the host.
        await guest.run("dd if=/usr/bin/bash of=/dev/vdb bs=1M conv=fsync,notrunc 2>/dev/null")
        size, wrote = (await guest.run("stat -c %s /usr/bin/bash; sha256sum </usr/bin/bash")).split()[:2]
        assert hashlib.sha256(data.read_bytes()[: int(size)]).hexdigest() == wrote
        assert await guest.troubles() == []
        assert await vm.stop(timeout=120) == Exit(ExitReason.SHUTDOWN)


async def test_a_debian_that_reboots_comes_up_again(debian: images.DebianDisk) -> None:
    root = block.Overlay(block.Raw(debian.disk, readonly=True), None)
    async with boot_debian(debian, root, mode="rw", on_reset="reboot") as vm:
        events = vm.events()
        await login(vm)
        # As a user types it: what has been written is on the disk without a word more.
        await vm.serial.send(b"echo here >/root/kept; touch /run/lost; reboot\n")
        assert await anext(events) == WasReset(vm.name, "ACPI reset register")
        guest = await login(vm)
        assert await guest.run("cat /root/kept") == "here"
        assert "cannot access" in await guest.run("ls /run/lost 2>&1; true")
        assert await guest.troubles() == []
        assert await guest.run("systemctl is-system-running --wait") == "running"
        assert vm.exit is None
        assert await vm.stop(timeout=120) == Exit(ExitReason.SHUTDOWN)


async def test_debian_boots_from_a_disk_that_it_may_not_write(debian: images.DebianDisk) -> None:
    async with boot_debian(debian, block.Raw(debian.disk, readonly=True), mode="ro") as vm:
        guest = await login(vm)
        assert await guest.run("cat /sys/block/vda/ro") == "1"
        assert re.match("/dev/vda / ext4 ro", await guest.run("grep ' / ' /proc/mounts"))
        assert await vm.stop(timeout=120) == Exit(ExitReason.SHUTDOWN)
