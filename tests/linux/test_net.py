"""Linux with aiokvm's network adapters: one that leads to the program, one to another guest."""

from __future__ import annotations

import struct
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import LinkChanged, net

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.linux.conftest import Guest, LinuxBooter

pytestmark = [pytest.mark.linux, pytest.mark.anyio]

CMDLINE = "console=ttyS0 quiet panic=-1 aiokvm.nodhcp"
MAC = "52:54:00:00:00:01"
PROGRAM_MAC = bytes.fromhex("525400000099")
PROGRAM = bytes([10, 1, 0, 1])
ETH = struct.Struct(">6s6sH")
ARP = struct.Struct(">HHBBH6s4s6s4s")


def internet_sum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def answer(frame: bytes) -> bytes | None:
    """What a host at ``PROGRAM`` says to ARP and to a ping."""
    to, source, ethertype = ETH.unpack_from(frame)
    if ethertype == 0x0806:
        *head, _operation, mac, address, _, wanted = ARP.unpack_from(frame, ETH.size)
        if wanted != PROGRAM or address == wanted:
            return None
        reply = ARP.pack(*head, 2, PROGRAM_MAC, PROGRAM, mac, address)
        return ETH.pack(source, PROGRAM_MAC, ethertype) + reply + bytes(18)
    if ethertype == 0x0800 and to == PROGRAM_MAC and frame[23] == 1 and frame[34] == 8:
        ip = frame[14:26] + frame[30:34] + frame[26:30]
        length = int.from_bytes(frame[16:18], "big")
        icmp = b"\0\0\0\0" + frame[38 : 14 + length]
        checksum = internet_sum(icmp + bytes(len(icmp) % 2))
        return ETH.pack(source, to, ethertype) + ip + icmp[:2] + struct.pack(">H", checksum) + icmp[4:]
    return None


class Program:
    """The program as a host of the network: it answers, and knows which kinds of frames it has seen."""

    def __init__(self) -> None:
        self.port = net.Port()
        self.ethertypes: set[int] = set()
        self.news = anyio.Event()

    async def heard(self, ethertype: int) -> None:
        while ethertype not in self.ethertypes:
            await self.news.wait()

    async def run(self) -> None:
        async for batch in self.port.batches():
            self.ethertypes |= {ETH.unpack_from(frame)[2] for frame in batch}
            self.news.set()
            self.news = anyio.Event()
            await self.port.send([reply for frame in batch if (reply := answer(bytes(frame)))])


@pytest.fixture(scope="module")
async def guests(boot_linux: LinuxBooter) -> AsyncIterator[tuple[Guest, Guest, Program]]:
    """Two guests on a switch; the first has the program on eth0, and two queue pairs."""
    program = Program()
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(anyio.create_task_group())
        switch = await stack.enter_async_context(net.Switch())
        nets = [
            net.Nic(program.port, mac=MAC, queues=2, mtu=1400, speed_mbps=25_000),
            net.Nic(switch.port(), queues=2),
        ]
        one = await stack.enter_async_context(boot_linux(cmdline=CMDLINE, cpus=2, nets=nets))
        other = await stack.enter_async_context(boot_linux(cmdline=CMDLINE, nets=[switch.port()]))
        group.start_soon(program.run)
        await one.run("ip addr add 10.1.0.2/24 dev eth0; ip link set eth0 up")
        await one.run("ip addr add 10.2.0.1/24 dev eth1; ip link set eth1 up")
        await other.run("ip addr add 10.2.0.2/24 dev eth0; ip link set eth0 up")
        yield one, other, program
        group.cancel_scope.cancel()


async def test_the_guest_sees_the_adapter(guests: tuple[Guest, Guest, Program]) -> None:
    guest, _, _ = guests
    words = await guest.run("cd /sys/class/net/eth0; cat address mtu speed duplex carrier; ls queues; cd")
    assert words.split() == [MAC, "1400", "25000", "full", "1", "rx-0", "rx-1", "tx-0", "tx-1"]
    assert await guest.run("cat /sys/class/net/eth1/mtu") == "1500"


async def test_it_pings_the_program(guests: tuple[Guest, Guest, Program]) -> None:
    guest, _, _ = guests
    for options in ("-c 5 -i 0.2", "-c 2 -s 1372", "-c 1 -s 0"):
        assert " 0% packet loss" in await guest.run(f"ping {options} 10.1.0.1")


async def test_the_queues_are_used(guests: tuple[Guest, Guest, Program]) -> None:
    guest, _, program = guests
    await guest.run("for cpu in 1 2; do taskset $cpu ping -c 2 -i 0.1 10.1.0.1 >/dev/null; done")
    stats = guest.vm.nets[0].stats()
    assert stats.sent_frames > 0
    assert stats.interrupts > 0
    assert program.port.stats().dropped_invalid == 0


async def test_tcp_between_guests(guests: tuple[Guest, Guest, Program]) -> None:
    one, other, _ = guests
    await one.run("dd if=/dev/urandom of=/data bs=64k count=64 2>/dev/null")
    sums = [await one.run("sha256sum </data")]
    # What holds its input open does not end before it has everything.
    await other.run("mkfifo /hold")
    # With segments and checksums that are left to the adapter, and with short frames.
    for port, mss in ((5001, ""), (5002, "ip link set eth1 mtu 576;")):
        await other.run(f"(nc -l -p {port} <>/hold >/got; sha256sum </got >/sum) & sleep 1")
        await one.run(f"{mss} nc -w 60 10.2.0.2 {port} </data")
        sums.append(await other.run("until [ -s /sum ]; do sleep 0.1; done; cat /sum; rm /sum"))
    assert len(set(sums)) == 1
    await one.run("ip link set eth1 mtu 1500")
    assert one.vm.nets[1].stats().dropped_invalid == 0


async def test_the_driver_filters_and_changes_its_address(guests: tuple[Guest, Guest, Program]) -> None:
    guest, _, program = guests
    stats = guest.vm.nets[0].stats
    stray = ETH.pack(bytes.fromhex("525400000077"), PROGRAM_MAC, 0x88B5) + bytes(50)
    ping = "ping -c 1 10.1.0.1"  # when it is answered, what came before has been received
    before = stats().dropped_filtered
    await program.port.send(stray)
    await guest.run(ping)
    assert stats().dropped_filtered == before + 1
    await guest.run("ip link set eth0 promisc on")
    await program.port.send(stray)
    await guest.run(ping)
    assert stats().dropped_filtered == before + 1
    await guest.run("ip link set eth0 promisc off; ip link set eth0 address 52:54:00:00:00:77")
    assert " 0% packet loss" in await guest.run("ping -c 2 10.1.0.1")
    await guest.run(f"ip link set eth0 address {MAC}")
    await guest.run("ip link add link eth0 name eth0.5 type vlan id 5 2>/dev/null; true")


async def test_the_link_goes_down_and_up(guests: tuple[Guest, Guest, Program]) -> None:
    guest, _, _ = guests
    nic = guest.vm.nets[0]
    await nic.set_link(False)
    await guest.run("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done")
    await nic.set_link(True)
    await guest.run("until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done")
    assert " 0% packet loss" in await guest.run("ping -c 2 10.1.0.1")


async def test_a_backend_is_replaced(guests: tuple[Guest, Guest, Program]) -> None:
    guest, _, before = guests
    events = guest.vm.events()
    program = Program()
    async with anyio.create_task_group() as group:
        group.start_soon(program.run)
        await guest.vm.nets[0].replace(program.port)
        assert [event.up for _ in range(2) if isinstance(event := await anext(events), LinkChanged)] == [
            False,
            True,
        ]
        # The guest tells the network where it is.
        with anyio.fail_after(60):
            await program.heard(0x0806)
        assert " 0% packet loss" in await guest.run("ping -c 2 10.1.0.1")
        assert before.port.end is None
        after = net.Port()
        await guest.vm.nets[0].replace(after)
        group.cancel_scope.cancel()


async def test_no_trouble(guests: tuple[Guest, Guest, Program]) -> None:
    for guest in guests[:2]:
        assert await guest.troubles() == []
        log = await guest.run("dmesg | grep -i 'virtio_net.*\\(fail\\|error\\)\\|NETDEV WATCHDOG'; true")
        assert log == ""
