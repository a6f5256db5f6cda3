from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

import anyio
import anyio.lowlevel
import pytest

from aiokvm import ConfigError, StateError
from aiokvm.aio import current_loop
from aiokvm.net import Limit, Stream
from aiokvm.net.plane import Plane
from tests.net.peers import PATIENCE_S, dhcp, ethernet, linked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.abc import ByteStream

pytestmark = pytest.mark.anyio


def framed(frame: bytes) -> bytes:
    return struct.pack("!I", len(frame)) + frame


async def read(stream: ByteStream, size: int) -> bytes:
    data = b""
    with anyio.fail_after(PATIENCE_S):
        while len(data) < size:
            data += await stream.receive(size - len(data))
    return data


async def until(stream: Stream, connected: bool) -> None:
    with anyio.fail_after(PATIENCE_S):
        while stream.connected is not connected:
            await anyio.lowlevel.checkpoint()


class Listener:
    """A peer that listens on a path, or a port of this machine."""

    def __init__(self, path: Path | None) -> None:
        self.socket = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self.socket.bind(str(path) if path else ("127.0.0.1", 0))
        self.socket.listen()
        self.socket.setblocking(False)
        self.where: str | tuple[str, int] = str(path) if path else self.socket.getsockname()

    async def accept(self) -> socket.socket:
        with anyio.fail_after(PATIENCE_S):
            await anyio.wait_readable(self.socket)
        made, _ = self.socket.accept()
        made.settimeout(PATIENCE_S)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def exactly(made: socket.socket, size: int) -> bytes:
    return made.recv(size, socket.MSG_WAITALL)


@pytest.mark.parametrize("thread", [None, "net"])
async def test_frames_go_both_ways_over_a_socket_that_was_given(thread: str | None) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with linked(Stream(ours), thread=thread) as peer:
            frames = [ethernet(os.urandom(size)) for size in (50, 1500, 9000)]
            theirs.sendall(b"".join(map(framed, frames)))
            for frame in frames:
                assert await peer.receive() == frame
            await peer.send(*frames)
            await anyio.wait_readable(theirs)
            for frame in frames:
                assert await anyio.to_thread.run_sync(exactly, theirs, 4 + len(frame)) == framed(frame)
        # The caller's is still open.
        theirs.sendall(b"x")
        ours.setblocking(True)
        assert ours.recv(1) == b"x"


@pytest.mark.parametrize("unix", [True, False])
async def test_a_client_connects_and_says_when_the_peer_has_gone(unix: bool, tmp_path: Path) -> None:
    with Listener(tmp_path / "s" if unix else None) as listener:
        async with linked(Stream(listener.where)) as peer:
            with await listener.accept() as made:
                made.sendall(framed(ethernet(b"hello")))
                assert await peer.receive() == ethernet(b"hello")
                await peer.send(ethernet(b"world"))
                await anyio.wait_readable(made)
                assert exactly(made, 64) == framed(ethernet(b"world"))
            assert "the peer has closed the connection" in await peer.until_lost()
            # What is sent now is dropped, and nothing waits.
            await peer.send(ethernet(b"gone"))
        assert len(peer.lost) == 1


async def test_a_client_that_finds_nobody_raises(tmp_path: Path) -> None:
    plane = Plane(current_loop())
    for where in (str(tmp_path / "nobody"), ("127.0.0.1", 1)):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            await Stream(where).open(plane, pytest.fail)
        assert caught.value.errno in (errno.ENOENT, errno.ECONNREFUSED)
    assert not plane._ends
    plane.close()


@pytest.mark.parametrize("unix", [True, False])
async def test_a_client_connects_again_and_again(unix: bool, tmp_path: Path) -> None:
    path = tmp_path / "s" if unix else None
    with Listener(path) as first:
        where = first.where
        stream = Stream(where, reconnect=0.01)
        async with linked(stream) as peer:
            for index in range(3):
                made = await first.accept()
                await until(stream, True)
                made.sendall(framed(ethernet(b"%d" % index)) + b"\0\0\0\x40 and no more"[: index * 5])
                assert await peer.receive() == ethernet(b"%d" % index)
                made.close()
                await until(stream, False)
            assert not peer.lost


async def test_a_client_that_reconnects_need_not_find_the_peer_at_first(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "s", reconnect=0.01)
    async with linked(stream) as peer:
        await peer.send(ethernet(b"into the void"))
        with Listener(tmp_path / "s") as listener, await listener.accept() as made:
            await until(stream, True)
            made.sendall(framed(ethernet(b"hello")))
            assert await peer.receive() == ethernet(b"hello")
        assert not peer.lost


@pytest.mark.parametrize("unix", [True, False])
async def test_a_server_waits_for_one_peer(unix: bool, tmp_path: Path, unused_port: int) -> None:
    where = str(tmp_path / "s") if unix else ("127.0.0.1", unused_port)
    async with linked(Stream(where, server=True)) as peer:
        if isinstance(where, str):
            made: ByteStream = await anyio.connect_unix(where)
        else:
            made = await anyio.connect_tcp(*where)
        async with made:
            await made.send(framed(ethernet(b"hello")))
            assert await peer.receive() == ethernet(b"hello")
            await peer.send(ethernet(b"world"))
            assert await read(made, 64) == framed(ethernet(b"world"))
        await peer.until_lost()
    assert not (tmp_path / "s").exists()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def test_a_server_that_reconnects_takes_one_peer_after_another(tmp_path: Path) -> None:
    path = tmp_path / "s"
    # A program that was killed has left its socket.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    stream = Stream(path, server=True, reconnect=1)
    async with linked(stream) as peer:
        first = await anyio.connect_unix(path)
        await first.send(framed(ethernet(b"first")))
        assert await peer.receive() == ethernet(b"first")
        second = await anyio.connect_unix(path)
        await second.send(framed(ethernet(b"second")))
        await first.aclose()
        assert await peer.receive() == ethernet(b"second")
        await second.aclose()
        await until(stream, False)
        assert not peer.lost


async def test_an_address_in_use_is_an_error(tmp_path: Path) -> None:
    async with linked(Stream(tmp_path / "s", server=True)) as peer:
        with pytest.raises(OSError, match="in use"):
            await Stream(tmp_path / "s", server=True).open(peer.plane, pytest.fail)
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="in use"):
            await Stream(tmp_path / "file", server=True).open(peer.plane, pytest.fail)
        assert (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (struct.pack("!I", 0), "a frame of 0 bytes"),
        (struct.pack("!I", 1 << 20), "a frame of 1048576 bytes"),
        (struct.pack("!I", 0xFFFF_FFFF), "a frame of 4294967295 bytes"),
        (framed(ethernet(b""))[:-1], "in the middle of a frame"),
        (b"\0", "in the middle of a frame"),
        (b"", "has closed the connection"),
    ],
)
async def test_a_peer_that_misbehaves_is_left(sent: bytes, why: str) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        async with linked(Stream(ours)) as peer:
            ours.close()
            with theirs:
                theirs.sendall(framed(ethernet(b"first")) + sent)
                assert await peer.receive() == ethernet(b"first")
            assert why in await peer.until_lost()
            await peer.send(ethernet(b"gone"))


async def test_a_peer_that_stalls_holds_up_its_sender_only() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Stream(ours)
        async with linked(stream) as peer:
            frame = ethernet(bytes(9000))
            sent = 0
            with anyio.move_on_after(PATIENCE_S):
                # Until what the sender has in its hands is not taken any more.
                while stream.stats().received_frames < 20 or sent < stream.stats().received_frames + 5:
                    try:
                        peer._far.send(frame)
                        sent += 1
                    except BlockingIOError:
                        break
                    await current_loop().turn()
            assert sent < 1000
            # The other way is free.
            theirs.sendall(framed(ethernet(b"hello")))
            assert await peer.receive() == ethernet(b"hello")
            size = (4 + len(frame)) * sent
            assert len(await anyio.to_thread.run_sync(exactly, theirs, size)) == size
            assert stream.stats().dropped_full == 0


async def test_rates_hold_frames_back_and_lose_none() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        limits = Limit(operations_per_second=1000, burst_operations=5), Limit(bytes_per_second=100_000)
        stream = Stream(ours, ingress=limits[0], egress=limits[1])
        async with linked(stream) as peer:
            frames = [ethernet(b"%d" % index) for index in range(50)]
            theirs.sendall(b"".join(map(framed, frames)))
            assert [await peer.receive() for _ in frames] == frames
            assert stream.stats().throttled > 0
            await peer.send(*frames)
            data = await anyio.to_thread.run_sync(exactly, theirs, 64 * len(frames))
            assert data == b"".join(map(framed, frames))


async def test_a_flood_leaves_the_loop_its_turns() -> None:
    ours, theirs = socket.socketpair()
    frames = 200_000
    data = framed(ethernet(b"flood")) * 1000
    with ours, theirs:
        stream = Stream(ours)
        async with linked(stream) as peer:
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    await current_loop().turn()
                    turns += 1

            def flood() -> None:
                for _ in range(frames // 1000):
                    theirs.sendall(data)

            async def drain() -> None:
                while True:
                    await peer.receive()

            async with anyio.create_task_group() as tasks:
                for each in (count, drain):
                    tasks.start_soon(each)
                await anyio.to_thread.run_sync(flood)
                with anyio.fail_after(PATIENCE_S):
                    while stream.stats().sent_frames < frames:
                        await current_loop().turn()
                tasks.cancel_scope.cancel()
            # One turn serves for half a millisecond at most.
            assert turns > 100


async def test_nothing_is_left_of_many(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        server = Stream(tmp_path / "s", server=True)
        async with linked(server) as one, linked(Stream(tmp_path / "s")) as other:
            await until(server, True)
            await one.send(ethernet(b"hello"))
            assert await other.receive() == ethernet(b"hello")
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the loop's own
    assert not os.listdir(tmp_path)


async def test_closing_while_it_connects_leaves_nothing(tmp_path: Path) -> None:
    stream = Stream(tmp_path / "s", reconnect=0.01)
    for _ in range(3):
        async with linked(stream):
            await current_loop().turn()


async def test_an_attempt_to_connect_can_be_cancelled() -> None:
    # The backlog is full: the third is not answered.
    with Listener(None) as listener:
        listener.socket.listen(0)
        stream = Stream(listener.where)
        with socket.socket() as first, socket.socket() as second:
            for each in (first, second):
                each.setblocking(False)
                each.connect_ex(listener.where)
            plane = Plane(current_loop())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stream.open, plane, pytest.fail)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            assert not plane._ends
            plane.close()
    with pytest.raises(StateError):
        stream.stats()


def test_arguments_that_make_no_sense_are_refused() -> None:
    for where in ("", "x" * 108, ("", 0), ("host", 70000), ("host", "80"), "a\0b"):
        with pytest.raises(ConfigError):
            Stream(where)  # type: ignore[arg-type]
    for arguments in ({"server": True}, {"reconnect": 1.0}):
        with pytest.raises(ConfigError, match="neither listens"):
            Stream(3, **arguments)
    with pytest.raises(ConfigError, match="reconnect"):
        Stream("x", reconnect=0)


async def test_descriptors_that_are_no_streams_are_refused() -> None:
    plane = Plane(current_loop())
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    reader, writer = os.pipe()
    for wrong in (pair[0], reader, 12345):
        with pytest.raises(ConfigError, match="descriptor"):
            await Stream(wrong).open(plane, pytest.fail)
    for fd in (reader, writer):
        os.close(fd)
    for each in pair:
        each.close()
    assert not plane._ends
    plane.close()


# Real peers.


@contextmanager
def running(*argv: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    if not shutil.which(argv[0]):
        pytest.skip(f"no {argv[0]}: a Debian package has it")
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def until_there(path: Path, process: subprocess.Popen[bytes], listening: bool = True) -> None:
    """Until the process has bound its socket there, and listens."""
    flags = "00010000" if listening else "00000000"
    with anyio.fail_after(PATIENCE_S):
        while True:
            # Num RefCount Protocol Flags Type St Inode Path
            lines = (await anyio.Path("/proc/net/unix").read_text()).splitlines()
            if any(line.endswith(f" {path}") and line.split()[3] == flags for line in lines):
                return
            if process.poll() is not None:
                assert process.stderr
                pytest.fail(f"{process.args!r} has ended: {process.stderr.read().decode()}")
            await anyio.lowlevel.checkpoint()


QEMU = ("qemu-system-x86_64", "-machine", "none", "-display", "none")
HUB = (
    *("-netdev", "hubport,id=h1,hubid=0,netdev=n", "-netdev", "user,id=u,net=10.9.8.0/24"),
    *("-netdev", "hubport,id=h2,hubid=0,netdev=u"),
)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that everybody may write to: passt started by root becomes nobody."""
    with TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o777)
        yield path


async def test_passt_gives_an_address(open_directory: Path) -> None:
    path = open_directory / "passt"
    with running("passt", "--foreground", "--socket", path) as process:
        await until_there(path, process)
        async with linked(Stream(path)) as peer:
            assert await dhcp(peer)


async def test_qemu_listens_and_its_nat_gives_an_address(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    netdev = f"stream,id=n,server=on,addr.type=unix,addr.path={path}"
    with running(*QEMU, "-netdev", netdev, *HUB) as process:
        await until_there(path, process)
        async with linked(Stream(path)) as peer:
            assert await dhcp(peer) == "10.9.8.15"
            process.kill()
            assert "closed" in await peer.until_lost()


async def test_qemu_connects_and_its_nat_gives_an_address(tmp_path: Path) -> None:
    path = tmp_path / "ours"
    stream = Stream(path, server=True, reconnect=1)
    async with linked(stream) as peer:
        for _ in range(2):
            netdev = f"stream,id=n,server=off,addr.type=unix,addr.path={path}"
            with running(*QEMU, "-netdev", netdev, *HUB):
                await until(stream, True)
                assert await dhcp(peer) == "10.9.8.15"
            await until(stream, False)
