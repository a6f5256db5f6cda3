"""Linux with aiokvm's virtio console, entropy device and memory balloon."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm.machine.ports import FIRST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.linux.conftest import Guest, LinuxBooter

pytestmark = [pytest.mark.linux, pytest.mark.anyio]

AGENT = "org.qemu.guest_agent.0"
DEVICES = {"console": [AGENT], "rng": True, "balloon": True}
MIB = 1 << 20


@pytest.fixture(scope="module")
async def virtio(boot_linux: LinuxBooter) -> AsyncIterator[Guest]:
    async with boot_linux(cpus=2, **DEVICES) as guest:
        yield guest


async def port_file(guest: Guest, name: str) -> str:
    """The device file of a port."""
    return await guest.run(
        f"until p=$(grep -lx {name} /sys/class/virtio-ports/*/name); do sleep 0.1; done; "
        'p=${p%/name}; echo "/dev/${p##*/}"'
    )


async def test_hvc0_is_a_terminal(virtio: Guest) -> None:
    hvc = virtio.vm.console[FIRST]
    hvc.resize(132, 43)
    with anyio.fail_after(60):
        await hvc.opened()
    await virtio.run("setsid sh -c 'exec sh </dev/hvc0 >/dev/hvc0 2>&1' & sleep 1")
    await hvc.expect(b"# ", 60)
    await hvc.send(b"echo $((6 * 7)); tty; stty size\n")
    await hvc.expect(b"42\r\n", 60)
    await hvc.expect(b"/dev/hvc0\r\n", 60)
    # Kernels differ in which of the two they take for the columns.
    await hvc.expect(re.compile(rb"43 132|132 43"), 60)
    # The kernel hands over 16 bytes at a time, and spins until they are taken.
    await hvc.send(b"seq 300; echo; exit\n")
    await hvc.expect(b"\n300\r\n", 120)
    assert hvc.dropped == 0


async def test_a_port_is_a_stream_of_bytes_both_ways(virtio: Guest) -> None:
    agent = virtio.vm.console[AGENT]
    path = await port_file(virtio, AGENT)
    data = random.Random(3).randbytes(2 * MIB)
    # Reading what comes, writing it back: neither side may lose or stop anything.
    await virtio.vm.serial.send(
        f"exec 3<>{path}; head -c {len(data)} <&3 >/tmp/in; cat /tmp/in >&3\n".encode()
    )
    with anyio.fail_after(60):
        await agent.opened()
    received = bytearray()
    async with anyio.create_task_group() as group:
        group.start_soon(agent.send, data)
        with anyio.fail_after(240):
            while len(received) < len(data):
                received += await agent.read()
    assert received == data
    await virtio.finished()
    await virtio.run("exec 3<&-")
    with anyio.fail_after(60):
        while agent.guest_open:
            await virtio.run("true")
    assert agent.dropped == 0


async def test_a_writer_waits_while_nobody_reads(virtio: Guest) -> None:
    agent = virtio.vm.console[AGENT]
    path = await port_file(virtio, AGENT)
    await virtio.vm.serial.send(f"head -c {3 * MIB} /dev/zero >{path}\n".encode())
    with pytest.raises(TimeoutError):
        await virtio.finished(3)
    count = 0
    with anyio.fail_after(120):
        while count < 3 * MIB:
            count += len(await agent.read())
    await virtio.finished()
    assert agent.dropped == 0


async def test_a_port_comes_and_goes(virtio: Guest) -> None:
    late = virtio.vm.console.add("late")
    path = await port_file(virtio, "late")
    await virtio.run(f"echo hello >{path}")
    assert await late.expect(b"\n", 60) == b"hello\n"
    virtio.vm.console.remove("late")
    await virtio.run(f"while [ -e {path} ]; do sleep 0.1; done")


async def test_hwrng(virtio: Guest) -> None:
    name = await virtio.run("cat /sys/class/misc/hw_random/rng_current")
    assert name.startswith("virtio_rng")
    first, second = (
        await virtio.run("head -c 4096 /dev/hwrng | md5sum; head -c 4096 /dev/hwrng | md5sum")
    ).splitlines()
    assert first != second
    assert await virtio.run("head -c 200000 /dev/hwrng | wc -c") == "200000"


async def test_the_balloon_takes_memory_and_gives_it_back(virtio: Guest) -> None:
    vm = virtio.vm
    balloon = vm.balloon
    before = await balloon.stats(60)
    assert before["total"] <= vm.memory.size_bytes
    balloon.target = 128 * MIB
    with anyio.fail_after(120):
        await balloon.reached()
    assert balloon.device.pages * 4096 == balloon.actual == 128 * MIB
    assert balloon.dropped == 0
    assert balloon.released_bytes >= 128 * MIB
    # A guest that takes it back when it is short of memory counts it as its own.
    after = await balloon.stats(60)
    assert after["total"] == before["total"]
    assert before["free"] - after["free"] > 100 * MIB
    balloon.target = 0
    with anyio.fail_after(120):
        await balloon.reached()
    assert balloon.device.pages == 0
    assert balloon.dropped == 0
    # Pages that come back are the guest's to use.
    await virtio.run("head -c 50000000 /dev/zero >/tmp/fill; rm /tmp/fill")


async def test_free_pages_are_reported(virtio: Guest) -> None:
    balloon = virtio.vm.balloon
    await virtio.run("head -c 100000000 /dev/zero >/tmp/fill; rm /tmp/fill")
    before = balloon.released_bytes
    with anyio.fail_after(120):
        while balloon.released_bytes == before:
            await virtio.run("sleep 0.1")
    assert await virtio.troubles() == []


@pytest.mark.parametrize("kernel", ["generic", "i386"])
async def test_the_other_kernels_have_drivers(boot_linux: LinuxBooter, kernel: str) -> None:
    async with boot_linux(kernel, memory="256M", **DEVICES) as guest:
        assert (await guest.run("cat /sys/class/misc/hw_random/rng_current")).startswith("virtio_rng")
        await guest.run(f"echo hello >{await port_file(guest, AGENT)}; echo hello >/dev/hvc0")
        assert await guest.vm.console[AGENT].expect(b"\n", 60) == b"hello\n"
        await guest.vm.console[FIRST].expect(b"hello", 60)
        guest.vm.balloon.target = 8 * MIB
        with anyio.fail_after(60):
            await guest.vm.balloon.reached()
        assert await guest.troubles() == []
