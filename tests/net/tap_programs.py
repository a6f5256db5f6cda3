"""What test_tap.py runs in network namespaces: `python tap_programs.py PROGRAM LOOP`."""

from __future__ import annotations

import array
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import uvloop

# Behind what is installed: aiokvm is not to come from the source tree.
sys.path.append(str(Path(__file__).parents[2]))

from aiokvm import ConfigError
from aiokvm._core import lib
from aiokvm.aio import current_loop
from aiokvm.net import Limit, Tap
from aiokvm.net.plane import Plane
from tests.net.peers import (
    ETH_P_ARP,
    ETH_P_IP,
    ETH_P_LOCAL,
    GUEST_MAC,
    PATIENCE_S,
    Peer,
    checksum,
    ethernet,
    insist,
    ipv4,
    is_local,
    linked,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"loop_factory": uvloop.new_event_loop}),
    "trio": ("trio", {}),
}
HOST, GUEST = "10.77.0.1", "10.77.0.2"


def ip(*arguments: str) -> str:
    return subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True).stdout


def packet_socket(name: str) -> socket.socket:
    """What the kernel's side of an interface sees, and sends."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_LOCAL))
    made.bind((name, ETH_P_LOCAL))
    made.setblocking(False)
    return made


async def receive(made: socket.socket, wanted: bytes | None = None) -> bytes:
    """The next frame, or the next that is this one."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            await anyio.wait_readable(made)
            frame = made.recv(1 << 17)
            if wanted is None or frame == wanted:
                return frame


async def exchange(peer: Peer, name: str) -> None:
    with packet_socket(name) as kernel:

        async def send(frame: bytes) -> None:
            kernel.send(frame)

        for size in (46, 1000, 1500):
            frame = ethernet(os.urandom(size))
            await insist(partial(send, frame), partial(peer.receive, frame.__eq__))
            await insist(partial(peer.send, frame), partial(receive, kernel, frame))


async def answers_arp_and_echo(peer: Peer) -> None:
    """A guest with an address."""
    while True:
        frame = await peer.receive()
        kind = int.from_bytes(frame[12:14])
        if kind == ETH_P_ARP and frame[38:42] == socket.inet_aton(GUEST):
            head = struct.pack("!HHBBH", 1, ETH_P_IP, 6, 4, 2)
            reply = head + GUEST_MAC + socket.inet_aton(GUEST) + frame[22:32]
            await peer.send(ethernet(reply, ETH_P_ARP, frame[6:12]))
        elif kind == ETH_P_IP and frame[23] == socket.IPPROTO_ICMP and frame[34] == 8:
            size = int.from_bytes(frame[16:18]) - 20
            echo = b"\0\0\0\0" + frame[38 : 34 + size]
            echo = echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:]
            await peer.send(ipv4(GUEST, HOST, socket.IPPROTO_ICMP, echo, frame[6:12]))


async def traffic() -> None:
    """The kernel pings a guest that a program plays, of which the device is created."""
    for queues, offload in ((1, True), (4, True), (1, False)):
        tap = Tap("tap7", queues=queues, offload=offload)
        async with linked(tap) as peer:
            assert tap.name == "tap7"
            assert tap.ifindex == socket.if_nametoindex("tap7")
            assert tap.mtu == 1500
            assert bool(tap.offloads & lib.AIOKVM_NET_OFFLOAD_TSO4) is offload
            await exchange(peer, "tap7")
            ip("addr", "add", f"{HOST}/24", "dev", "tap7")
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pinger:
                pinger.setblocking(False)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(answers_arp_and_echo, peer)
                    for number in range(5):
                        body = struct.pack("!BBHHH", 8, 0, 0, 77, number) + os.urandom(100)
                        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
                        pinger.sendto(body, (GUEST, 0))
                        answer = await receive(pinger)
                        assert answer[20] == 0
                        assert answer[24:] == body[4:]
                    tasks.cancel_scope.cancel()
            assert tap.stats().dropped_invalid == 0
        # What was created is gone.
        assert "tap7" not in ip("link")
    async with linked(Tap("tap7", queues=2), thread="net") as peer:
        await exchange(peer, "tap7")


async def rates() -> None:
    """What is held back by a limit is not lost."""
    limit = Limit(operations_per_second=1000, burst_operations=5)
    for queues in (1, 3):
        tap = Tap("tap7", queues=queues, ingress=limit, egress=limit)
        async with linked(tap) as peer:
            await exchange(peer, "tap7")
            with packet_socket("tap7") as kernel:
                frames = [ethernet(b"%d" % index) for index in range(50)]
                for frame in frames:
                    kernel.send(frame)
                assert [await peer.receive(frames.__contains__) for _ in frames] == frames
                assert tap.stats().throttled > 0
                await peer.send(*frames)
                assert [await receive(kernel, frame) for frame in frames] == frames


async def names() -> None:
    """Without a name the kernel chooses; and what persists is found again."""
    first, second = Tap(), Tap(mtu=9000)
    async with linked(first), linked(second) as peer:
        assert (first.name, second.name) == ("aiokvm0", "aiokvm1")
        assert second.mtu == 9000
        assert "mtu 9000" in ip("link", "show", "aiokvm1")
        assert second.name
        await exchange(peer, second.name)
    assert first.name is None
    for _ in range(2):
        async with linked(Tap("kept", persist=True)) as peer:
            await exchange(peer, "kept")
        assert "kept" in ip("link")
    # Somebody else made it, for several queues; one is enough for us.
    ip("tuntap", "add", "dev", "many", "mode", "tap", "multi_queue")
    for queues in (1, 3):
        async with linked(Tap("many", queues=queues)) as peer:
            await exchange(peer, "many")


async def deleted() -> None:
    """Somebody deletes the device."""
    for queues in (1, 3):
        tap = Tap("tap7", queues=queues)
        async with linked(tap) as peer:
            await exchange(peer, "tap7")
            ip("link", "del", "tap7")
            assert await peer.until_lost() == "the interface tap7 was deleted"
            await peer.send(ethernet(b"gone"))
            # Nothing is left that wakes the loop.
            for _ in range(10):
                await current_loop().turn()
            assert lib.aiokvm_net_serve(peer.plane.core, 1_000_000) == 0
        assert peer.lost == ["the interface tap7 was deleted"]
        # It can be had again.
        async with linked(tap) as peer:
            await exchange(peer, "tap7")


async def errors() -> None:
    plane = Plane(current_loop())

    async def fails(tap: Tap, text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            await tap.open(plane, print)
        assert not tap._fds
        assert not plane._ends

    async with linked(Tap("tap7")):
        await fails(Tap("tap7"), "in use by another program")
    await fails(Tap("lo"), "is no TAP")
    ip("tuntap", "add", "dev", "one", "mode", "tap")
    await fails(Tap("one", queues=2), "multi_queue")
    reader, writer = os.pipe()
    await fails(Tap(fds=[reader]), "IFF_TAP")
    await fails(Tap(fds=[12345]), "descriptor 12345")
    os.close(reader)
    os.close(writer)
    await fails(Tap("tap7", bridge="nobridge"), "no interface 'nobridge'")
    await fails(Tap("tap7", address="10.0.0.300"), "no address")
    assert "tap7" not in ip("link")
    plane.close()


async def bridges() -> None:
    """Two devices on a bridge hear each other, and one has an address."""
    ip("link", "add", "br7", "type", "bridge")
    ip("link", "set", "br7", "up")
    one, other = Tap("one", bridge="br7"), Tap("other", bridge="br7", address=[f"{HOST}/24", "fd77::1/64"])
    async with linked(one) as first, linked(other) as second:
        assert f"inet {HOST}/24" in ip("addr", "show", "other")
        assert "fd77::1/64" in ip("addr", "show", "other")
        # The bridge may need a moment before its ports forward.
        await insist(lambda: first.send(ethernet(b"hello")), lambda: second.receive(is_local))


async def helped(flags: int, queues: int, *prefix: str) -> list[int]:
    """Descriptors of a device "helper" that another program opens."""
    ours, theirs = socket.socketpair()
    program = f"""
import array, fcntl, os, socket, struct
fds = []
for _ in range({queues}):
    fds.append(os.open("/dev/net/tun", os.O_RDWR))
    fcntl.ioctl(fds[-1], 0x400454CA, struct.pack("16sH22x", b"helper", {flags}))
socket.socket(fileno=0).sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
"""
    with ours, theirs:
        await anyio.run_process((*prefix, sys.executable, "-c", program), stdin=theirs.makefile("rb"))
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4 * queues))
    return array.array("i", ancillary[0][2]).tolist()


async def handed() -> None:
    """A helper opens the device, and hands its descriptors in: with headers and without."""
    for flags in (0x1002, 0x5002, 0x5102):
        fds = await helped(flags, 2 if flags & 0x100 else 1)
        tap = Tap(fds=fds)
        async with linked(tap) as peer:
            assert tap.name == "helper"
            assert tap.queues == len(fds)
            assert bool(tap.offloads) is bool(flags & 0x4000)
            await exchange(peer, "helper")
        # They are still the caller's.
        assert "helper" in ip("link")
        for fd in fds:
            os.close(fd)
        assert "helper" not in ip("link")


async def elsewhere() -> None:
    """The device is in a namespace of the helper's: what has its name here is left alone."""
    ip("tuntap", "add", "dev", "helper", "mode", "tap")
    (fd,) = await helped(0x5002, 1, "unshare", "-n")
    tap = Tap(fds=[fd])
    async with linked(tap) as peer:
        assert (tap.name, tap.ifindex, tap.mtu) == ("helper", 0, None)
        await peer.send(ethernet(b"hello"))
    assert "state DOWN" in ip("link", "show", "helper")
    assert "UP" not in ip("link", "show", "helper").split(">")[0]
    plane = Plane(current_loop())
    with pytest.raises(ConfigError, match="another network namespace"):
        await Tap(fds=[fd], mtu=9000).open(plane, print)
    plane.close()
    os.close(fd)


FAR = """
import array, fcntl, hashlib, os, socket, struct, subprocess, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"far", 0x5002))
for command in ("link set far up", "addr add 10.78.0.2/24 dev far"):
    subprocess.run(("ip", *command.split()), check=True)
listener = socket.create_server(("10.78.0.2", 5000))
socket.socket(fileno=0).sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
os.close(fd)
while True:
    made, _ = listener.accept()
    digest = hashlib.sha256()
    while data := made.recv(1 << 20):
        digest.update(data)
        made.sendall(data[:len(data) // 2])
    made.sendall(digest.digest())
    made.close()
"""
MEBIBYTES = 16


def transfer() -> None:
    """Sends through the kernel to a program in another namespace, which sends half of it back and the sum."""
    chunk = os.urandom(1 << 20)
    with socket.create_connection(("10.78.0.2", 5000), PATIENCE_S) as made:
        back = b""

        def read() -> None:
            nonlocal back
            while data := made.recv(1 << 20):
                back = (back + data)[-32:]

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(MEBIBYTES):
            made.sendall(chunk)
        made.shutdown(socket.SHUT_WR)
        reader.join()
    assert back == hashlib.sha256(chunk * MEBIBYTES).digest()


@contextmanager
def far_side() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        subprocess.Popen(("unshare", "-n", sys.executable, "-c", FAR), stdin=theirs.fileno()) as far,
    ):
        try:
            yield ours
        finally:
            far.kill()


async def tcp() -> None:
    """Two kernels talk TCP through two devices: whole segments of 64 KiB, or cut by whoever sends them."""
    with far_side() as ours:
        with anyio.fail_after(PATIENCE_S):
            await anyio.wait_readable(ours)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        (fd,) = array.array("i", ancillary[0][2])
        for thread, near_offload, far_offload in (
            (None, True, True),
            ("net", True, True),
            (None, False, True),
            (None, True, False),
        ):
            plane = Plane(current_loop(), thread)
            near, far = Tap("near", offload=near_offload), Tap(fds=[fd], offload=far_offload)
            (await near.open(plane, print)).link(await far.open(plane, print))
            ip("addr", "add", "10.78.0.1/24", "dev", "near")
            await anyio.to_thread.run_sync(transfer)
            for stats in (near.stats(), far.stats()):
                assert stats.dropped_invalid == stats.segmented == 0
                size = stats.sent_bytes / stats.sent_frames
                assert (size > 3000) is (near_offload and far_offload), size
            await near.close()
            await far.close()
            plane.close()
        os.close(fd)


async def macvtap() -> None:
    """A device of which only the descriptors are had; deleting it is told by the kernel's messages alone."""
    ip("tuntap", "add", "dev", "lower", "mode", "tap")
    ip("link", "set", "lower", "up")
    # Its node has the interface's number, of which other namespaces have the same.
    number = 100_000 + os.getpid()
    ip(
        *("link", "add", "link", "lower", "name", "mac7", "index", f"{number}"),
        *("type", "macvtap", "mode", "bridge"),
    )
    fd = os.open(f"/dev/tap{number}", os.O_RDWR)
    tap = Tap(fds=[fd])
    async with linked(Tap("lower")) as below, linked(tap) as peer:
        assert tap.name == "mac7"
        assert tap.offloads
        hello, world = ethernet(b"hello"), ethernet(b"world")
        await insist(lambda: peer.send(hello), lambda: below.receive(hello.__eq__))
        await insist(lambda: below.send(world), lambda: peer.receive(world.__eq__))
        ip("link", "add", "link", "lower", "name", "mac8", "type", "macvtap", "mode", "bridge")
        ip("link", "del", "mac8")
        ip("link", "del", "mac7")
        assert await peer.until_lost() == "the interface mac7 was deleted"
        await peer.send(ethernet(b"gone"))
    assert len(peer.lost) == 1
    os.close(fd)


async def cancelled() -> None:
    """Whatever cancels, nothing is left."""
    for delay in (0.0, 0.0001, 0.001, 0.003):
        for _ in range(5):
            with anyio.move_on_after(delay):
                async with linked(Tap("tap7")):
                    await anyio.sleep_forever()
            assert "tap7" not in ip("link")


async def unprivileged() -> None:
    """Without capabilities: what was made for this user can be had, and the rest is explained."""
    plane = Plane(current_loop())
    for tap, text in (
        (Tap("tap7"), "ip tuntap add dev tap7 mode tap user"),
        (Tap(queues=2), "ip tuntap add dev NAME mode tap user .* multi_queue"),
        (Tap("mine", mtu=9000), "ip link set mine mtu 9000"),
    ):
        with pytest.raises(ConfigError, match=text):
            await tap.open(plane, print)
    plane.close()
    tap = Tap("mine")
    async with linked(tap) as peer:
        await peer.send(ethernet(b"hello"))
        with anyio.fail_after(PATIENCE_S):
            while not tap.stats().received_frames:
                await current_loop().turn()
        # It was up: the frame is not lost. What the kernel says before there is a peer may be.
        [link] = json.loads(ip("-s", "-j", "link", "show", "mine"))
        assert link["stats64"]["rx"]["packets"] == 1
    assert "mine" in ip("link")


def main() -> None:
    program, loop = sys.argv[1:]
    backend, options = OPTIONS[loop]
    anyio.run(globals()[program], backend=backend, backend_options=options)


if __name__ == "__main__":
    main()
