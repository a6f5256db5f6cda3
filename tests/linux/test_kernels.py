from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop

from aiokvm import Exit, ExitReason, images

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.linux.conftest import LinuxBooter

pytestmark = [pytest.mark.linux, pytest.mark.anyio]

# What the kernel was told about its loader: 0xff is the zero page's, 0xb0 what Linux's PVH entry notes.
ZERO_PAGE, PVH = "255", "176"
XEN_ELFNOTE_PHYS32_ENTRY = re.compile(rb"\x04\0\0\0[\x04\x08]\0\0\0\x12\0\0\0Xen\0")


@pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"loop_factory": uvloop.new_event_loop}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ],
)
async def test_boots_on_every_loop(boot_linux: LinuxBooter) -> None:
    async with boot_linux(cmdline="console=ttyS0", cpus=2) as guest:
        assert "Linux version 6." in guest.log
        assert await guest.run("uname -m") == "x86_64"
        assert await guest.vm.stop(timeout=60) == Exit(ExitReason.SHUTDOWN)


@pytest.mark.parametrize(
    ("kernel", "machine", "loader"),
    [
        ("cloud-elf", "x86_64", PVH),
        ("generic", "x86_64", ZERO_PAGE),
        ("i386", "i686", ZERO_PAGE),
    ],
)
async def test_boots_every_kind_of_kernel(
    kernel: str, machine: str, loader: str, boot_linux: LinuxBooter
) -> None:
    async with boot_linux(kernel, cpus=2) as guest:
        assert await guest.run("uname -m") == machine
        assert await guest.run("cat /proc/sys/kernel/bootloader_type") == loader
        assert await guest.run("nproc") == "2"
        assert await guest.troubles() == []
        assert await guest.vm.stop(timeout=60) == Exit(ExitReason.SHUTDOWN)


def load_kvm_amd(*parameters: str) -> None:
    """Load the lab's module anew. Its file is in the first root file system, which is not this process's."""
    root = Path("/proc/1/root")
    busybox, module = root / "bin/busybox", root / "lib/modules" / os.uname().release / "kvm-amd.ko"
    if not module.exists():
        pytest.skip(f"there is no {module} to load with {parameters}")
    subprocess.run([busybox, "rmmod", "kvm-amd"], check=True)
    subprocess.run([busybox, "insmod", module, *parameters], check=True)


@pytest.fixture
def pae() -> Iterator[None]:
    """Have the lab's KVM page without the processor's help.

    TCG's walk of PAE page tables sets the accessed bit of PDPTEs. It is reserved (AMD APM volume 2, section
    5.2.3), so KVM, reading the guest's tables, refuses them. The shadow tables that TCG walks instead are
    KVM's own.
    """
    if "LAB" not in os.environ:
        yield
        return
    load_kvm_amd("npt=0")
    yield
    load_kvm_amd()


@pytest.mark.usefixtures("pae")
async def test_boots_pae_kernel(boot_linux: LinuxBooter) -> None:
    async with boot_linux("i386-pae", cpus=2, console=True, rng=True, balloon=True) as guest:
        assert await guest.run("uname -m") == "i686"
        assert (await guest.run("uname -r")).endswith("-pae")
        assert await guest.run("ls -d /sys/bus/virtio/drivers/*/virtio? | wc -l") == "3"
        assert await guest.run("nproc") == "2"
        assert await guest.troubles() == []
        assert await guest.vm.stop(timeout=60) == Exit(ExitReason.SHUTDOWN)


async def test_boots_vmlinux_without_a_pvh_note(boot_linux: LinuxBooter, tmp_path: Path) -> None:
    original = (images.path("cloud-elf") or await images.pull("cloud-elf")).read_bytes()
    (note,) = XEN_ELFNOTE_PHYS32_ENTRY.finditer(original)
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(original[: note.end() - 4] + b"Nex\0" + original[note.end() :])
    async with boot_linux(kernel) as guest:
        assert await guest.run("cat /proc/sys/kernel/bootloader_type") == ZERO_PAGE
        assert await guest.troubles() == []
