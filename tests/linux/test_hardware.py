"""CPUs and RAM as Linux finds them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.linux.conftest import Guest, LinuxBooter

pytestmark = [pytest.mark.linux, pytest.mark.anyio]


def modes(file: str) -> str:
    return Path("/sys/kernel/mm/transparent_hugepage", file).read_text()


async def numbers(guest: Guest, field: str) -> list[int]:
    """The values of one field of /proc/cpuinfo, of all CPUs."""
    return [
        int(line.split()[-1]) for line in (await guest.run(f"grep '^{field}\t' /proc/cpuinfo")).splitlines()
    ]


@pytest.mark.parametrize("cpus", [1, 2, 4, 8])
async def test_cpus(cpus: int, boot_linux: LinuxBooter) -> None:
    async with boot_linux(cpus=cpus) as guest:
        assert await guest.run("nproc") == str(cpus)
        each = list(range(cpus))
        assert await numbers(guest, "processor") == each
        assert await numbers(guest, "apicid") == each
        assert await numbers(guest, "initial apicid") == each
        assert await numbers(guest, "core id") == each
        assert await numbers(guest, "physical id") == [0] * cpus
        assert await numbers(guest, "siblings") == [cpus] * cpus
        assert await numbers(guest, "cpu cores") == [cpus] * cpus
        assert await guest.run("cat /sys/devices/system/cpu/cpu*/topology/thread_siblings_list") == "\n".join(
            map(str, each)
        )
        # Each runs what it is given.
        for cpu in each:
            assert await guest.run(f"taskset {1 << cpu:x} cut -d' ' -f39 /proc/self/stat") == str(cpu)
        assert await guest.troubles() == []


@pytest.mark.parametrize(
    ("memory", "usable"),
    [
        ("512M", [(0x10_0000, 0x1FFF_FFFF)]),
        ("5G", [(0x10_0000, 0xBFFF_FFFF), (0x1_0000_0000, 0x1_7FFF_FFFF)]),
    ],
)
async def test_memory(memory: str, usable: list[tuple[int, int]], boot_linux: LinuxBooter) -> None:
    async with boot_linux(memory=memory) as guest:
        e820 = re.findall(
            r"BIOS-e820: \[mem 0x(\w+)-0x(\w+)\] usable", await guest.run("dmesg | grep BIOS-e820")
        )
        assert [(int(first, 16), int(last, 16)) for first, last in e820] == [(0, 0x9_FBFF), *usable]
        size = guest.vm.memory.size_bytes
        total = 1024 * int((await guest.run("grep MemTotal /proc/meminfo")).split()[1])
        assert 0.85 * size < total < size
        assert await guest.troubles() == []


async def test_command_line(boot_linux: LinuxBooter) -> None:
    start = 'console=ttyS0 quiet panic=-1 two  spaces="in quotes" grüße=1 fill='
    # All that a kernel takes, without its NUL.
    cmdline = start + "x" * (2047 - len(start.encode()))
    async with boot_linux(cmdline=cmdline) as guest:
        assert await guest.run("cat /proc/cmdline") == cmdline


async def test_ram_is_mapped_by_large_pages(boot_linux: LinuxBooter) -> None:
    if "[never]" in modes("enabled"):
        pytest.skip("the host has no transparent huge pages")
    async with boot_linux(memory="512M") as guest:
        await guest.run("dd if=/dev/zero of=/zeros bs=1M count=200 2>&1")
        kvm = guest.vm.stats().kvm
        small, large = (kvm[name] for name in ("pages_4k", "pages_2m"))
        assert isinstance(small, int)
        assert isinstance(large, int)
        assert large >= 100
        assert small < 512  # what was mapped while no large page was there yet
