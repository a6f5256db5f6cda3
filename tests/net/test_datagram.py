from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm import ConfigError
from aiokvm.aio import current_loop
from aiokvm.net import Datagram, Limit
from aiokvm.net.plane import Plane
from tests.net.peers import PATIENCE_S, dhcp, ethernet, linked
from tests.net.test_stream import HUB, QEMU, running, until_there

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


def unused_ports(count: int, family: int = socket.AF_INET) -> list[int]:
    probes = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(count)]
    for probe in probes:
        probe.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


async def receive(made: socket.socket) -> bytes:
    made.setblocking(False)
    with anyio.fail_after(PATIENCE_S):
        await anyio.wait_readable(made)
    return made.recv(1 << 17)


async def until_seen(datagram: Datagram, count: int) -> None:
    """Until it has received so many frames from its peer."""
    with anyio.fail_after(PATIENCE_S):
        while datagram.stats().received_frames < count:
            await current_loop().turn()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("thread", [None, "net"])
async def test_frames_go_both_ways_over_a_socket_that_was_given(
    kind: socket.SocketKind, thread: str | None
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        async with linked(Datagram(fd=ours), thread=thread) as peer:
            for size in (50, 1500, 9000, 60000):
                frame = ethernet(os.urandom(size))
                theirs.send(frame)
                assert await peer.receive() == frame
                await peer.send(frame)
                assert await receive(theirs) == frame


async def test_paths_find_each_other_whoever_comes_first(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    # What is left of a program that was killed is in nobody's way.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(str(here))
    one, other = Datagram(here, there), Datagram(there, here)
    async with linked(one) as first:
        await first.send(ethernet(b"nobody hears this"))
        await until_seen(one, 1)
        for _ in range(2):
            async with linked(other) as second:
                await first.send(ethernet(b"hello"))
                assert await second.receive() == ethernet(b"hello")
                await second.send(ethernet(b"world"))
                assert await first.receive() == ethernet(b"world")
        assert not first.lost
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_ports_find_each_other(family: int, host: str) -> None:
    try:
        here, there = unused_ports(2, family)
    except OSError as error:
        pytest.skip(f"no address {host}: {error}")
    one, other = Datagram((host, here), (host, there)), Datagram((host, there), (host, here))
    async with linked(one) as first:
        await first.send(ethernet(b"nobody hears this"))
        await until_seen(one, 1)
        async with linked(other) as second:
            with socket.socket(family, socket.SOCK_DGRAM) as stranger:
                stranger.sendto(ethernet(b"stranger"), (host, there))
            await first.send(ethernet(b"hello"))
            assert await second.receive() == ethernet(b"hello")
            await second.send(ethernet(b"world"))
            assert await first.receive() == ethernet(b"world")
        assert not first.lost


async def test_the_other_of_a_pair_that_closes_is_the_end() -> None:
    for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        with ours, theirs:
            async with linked(Datagram(fd=ours)) as peer:
                theirs.close()
                await peer.send(ethernet(b""))
                assert "the peer has closed" in await peer.until_lost()
                await peer.send(ethernet(b""))


async def test_what_is_no_frame_is_dropped_and_counted() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        datagram = Datagram(fd=ours)
        async with linked(datagram) as peer:
            for size in (0, 13, 65551, 100_000):
                theirs.send(bytes(size))
            theirs.send(ethernet(b"hello"))
            assert await peer.receive() == ethernet(b"hello")
            assert datagram.stats().dropped_invalid == 4


async def test_rates_hold_frames_back_and_lose_none() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        limit = Limit(operations_per_second=1000, burst_operations=5)
        datagram = Datagram(fd=ours, ingress=limit, egress=limit)
        async with linked(datagram) as peer:
            frames = [ethernet(b"%d" % index) for index in range(50)]
            for frame in frames:
                theirs.send(frame)
            assert [await peer.receive() for _ in frames] == frames
            assert datagram.stats().throttled > 0
            await peer.send(*frames)
            assert [await receive(theirs) for _ in frames] == frames


async def test_an_address_in_use_is_an_error(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    async with linked(Datagram(here, there)) as peer:
        with pytest.raises(OSError, match="in use"):
            await Datagram(here, there).open(peer.plane, pytest.fail)
        assert here.exists()


async def test_arguments_that_make_no_sense_are_refused() -> None:
    for addresses in ((), ("x",), (None, "x"), ("x", ("host", 1)), ("x" * 200, "y")):
        with pytest.raises(ConfigError):
            Datagram(*addresses)
    with pytest.raises(ConfigError, match="no addresses"):
        Datagram("x", fd=3)
    plane = Plane(current_loop())
    loose = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    stream = socket.socketpair()
    for wrong in (loose, stream[0], 12345):
        with pytest.raises(ConfigError):
            await Datagram(fd=wrong).open(plane, pytest.fail)
    for each in (loose, *stream):
        each.close()
    with pytest.raises(ConfigError, match="IPv6"):
        await Datagram(("127.0.0.1", 5555), ("::1", 5555)).open(plane, pytest.fail)
    assert not plane._ends
    plane.close()


@pytest.mark.parametrize("unix", [True, False])
async def test_qemu_and_its_nat_give_an_address(unix: bool, tmp_path: Path) -> None:
    if unix:
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        datagram = Datagram(ours, theirs)
        netdev = f"local.type=unix,local.path={theirs},remote.type=unix,remote.path={ours}"
    else:
        here, there = unused_ports(2)
        datagram = Datagram(("127.0.0.1", here), ("127.0.0.1", there))
        netdev = (
            f"local.type=inet,local.host=127.0.0.1,local.port={there},"
            f"remote.type=inet,remote.host=127.0.0.1,remote.port={here}"
        )
    async with linked(datagram) as peer:
        with running(*QEMU, "-netdev", f"dgram,id=n,{netdev}", *HUB) as process:
            if unix:
                await until_there(theirs, process, listening=False)
            assert await dhcp(peer) == "10.9.8.15"
        assert not peer.lost
