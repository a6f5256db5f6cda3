from __future__ import annotations

import errno
import logging
import random
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream

from aiokvm import ConfigError, NbdError
from aiokvm._core import ffi, lib
from aiokvm.block import Nbd
from aiokvm.block import nbd_client as module
from aiokvm.budget import BOUNCE_BYTES, Share
from aiokvm.proto import nbd as proto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from anyio.abc import SocketStream

pytestmark = pytest.mark.anyio

MIB = 1 << 20
ALL_FLAGS = (
    proto.NBD_FLAG_HAS_FLAGS
    | proto.NBD_FLAG_SEND_FLUSH
    | proto.NBD_FLAG_SEND_TRIM
    | proto.NBD_FLAG_SEND_WRITE_ZEROES
    | proto.NBD_FLAG_CAN_MULTI_CONN
)


def view(data: bytes) -> memoryview:
    return memoryview(data)


async def exercise(disk: Nbd) -> None:
    """Requests of all kinds and sizes, many at once."""
    size = disk.size_bytes
    model = bytearray(size)
    assert bytes(await disk.read(0, size)) == model
    chance = random.Random(7)

    async def write(offset: int, data: bytes) -> None:
        model[offset : offset + len(data)] = data
        await disk.write(offset, view(data))

    def parts() -> list[tuple[int, bytes]]:
        places = [at + 512 for at in range(0, size, 65536) if chance.random() < 0.7]
        return [(at, chance.randbytes(chance.randrange(512, 65536, 512))) for at in places]

    # Making up megabytes takes long.
    to_write = await anyio.to_thread.run_sync(parts)
    async with anyio.create_task_group() as tasks:
        for at, data in to_write:
            tasks.start_soon(write, at, data)
    await disk.flush()
    assert bytes(await disk.read(0, size)) == model
    for unmap in (False, True):
        offset = MIB + 512 * unmap
        model[offset : offset + 65536] = bytes(65536)
        await disk.write_zeroes(offset, 65536, unmap)
    assert bytes(await disk.read(0, size)) == model
    if disk.discard_granularity_bytes:
        await disk.discard(2 * MIB, 65536)
    await disk.flush()


# Real servers.


async def test_nbdkit_serves_several_connections(servers: Any) -> None:
    servers.nbdkit("memory", "8M")
    async with Nbd(servers.uri) as disk:
        assert (disk.size_bytes, disk.block_size, disk.readonly) == (8 * MIB, 512, False)
        assert len(disk._live) == 4
        await exercise(disk)


async def test_by_tcp() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    server = FakeServer(4 * MIB)
    async with server.serving(listener) as port:
        async with Nbd(f"nbd://127.0.0.1:{port}/disk", connections=2) as disk:
            await exercise(disk)
        assert server.export == "disk"


async def test_qemu_nbd_serves_a_file(servers: Any, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 * MIB))
    servers.qemu_nbd("--discard=unmap", "-f", "raw", "-x", "", image)
    async with Nbd(servers.uri) as disk:
        await exercise(disk)
        await disk.write(0, view(b"x" * 512))
        await disk.flush()
    assert image.read_bytes()[:512] == b"x" * 512


async def test_qemu_storage_daemon_serves_a_file(servers: Any, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 * MIB))
    servers.storage_daemon(
        *("--blockdev", f"driver=file,node-name=disk,filename={image},discard=unmap"),
        *("--export", "type=nbd,id=disk,node-name=disk,writable=on"),
    )
    async with Nbd(servers.uri.replace("?", "disk?")) as disk:
        await exercise(disk)
    with pytest.raises(NbdError, match="no such export") as caught:
        await Nbd(servers.uri).open()
    assert caught.value.errno == errno.ENOENT


async def test_a_read_only_export(servers: Any, raises_errno: Any) -> None:
    servers.nbdkit("-r", "pattern", "1M")
    async with Nbd(servers.uri) as disk:
        assert disk.readonly
        assert bytes(await disk.read(512, 512))[:8] == struct.pack(">Q", 512)
        with raises_errno(errno.EPERM):
            await disk.write(0, view(bytes(512)))
        await disk.flush()


async def test_a_server_that_fails_gives_its_errors(servers: Any, raises_errno: Any) -> None:
    servers.nbdkit(
        "--filter=error",
        "memory",
        "1M",
        *("error-pwrite=ENOSPC", "error-pread=EIO", "error-pwrite-rate=1", "error-pread-rate=1"),
    )
    async with Nbd(servers.uri) as disk:
        for _ in range(2):
            with raises_errno(errno.ENOSPC):
                await disk.write(0, view(bytes(512)))
            with raises_errno(errno.EIO):
                await disk.read(0, 512)
        await disk.flush()


async def test_a_server_that_is_killed_and_comes_back_has_what_was_written(
    servers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    process = servers.nbdkit("memory", "4M")
    async with Nbd(servers.uri) as disk:
        await disk.write(0, view(b"a" * 4096))
        await disk.write(4096, view(b"b" * 512))
        await disk.write(512, view(b"c" * 512))
        servers.end(process)
        done: list[int] = []

        async def write(at: int) -> None:
            await disk.write(at, view(bytes([at // MIB]) * 512))
            done.append(at)

        async with anyio.create_task_group() as tasks:
            for at in range(MIB, 4 * MIB, MIB):
                tasks.start_soon(write, at)
            await anyio.to_thread.run_sync(servers.nbdkit, "memory", "4M")  # which has forgotten all
        assert sorted(done) == [MIB, 2 * MIB, 3 * MIB]
        assert bytes(await disk.read(0, 8192)) == (
            b"a" * 512 + b"c" * 512 + b"a" * 3072 + b"b" * 512 + bytes(3584)
        )
        assert await disk.read(3 * MIB, 512) == b"\3" * 512
        await disk.flush()
    assert "connected again" in caplog.text


async def test_a_server_that_stays_away_gives_eio_in_time(servers: Any, raises_errno: Any) -> None:
    process = servers.nbdkit("memory", "4M")
    async with Nbd(servers.uri, timeout=0.3) as disk:
        servers.end(process)
        with anyio.fail_after(20):
            for call in (disk.read(0, 512), disk.write(0, view(bytes(512))), disk.flush()):
                with raises_errno(errno.EIO):
                    await call
        assert not disk._waiting
        await anyio.to_thread.run_sync(servers.nbdkit, "memory", "4M")
        with anyio.fail_after(20):
            back = False
            while not back:
                with suppress(OSError):
                    await disk.read(0, 512)
                    back = True
        await disk.flush()


async def test_nobody_listens(tmp_path: Path) -> None:
    for uri in (f"nbd+unix:///?socket={tmp_path}/none", "nbd://127.0.0.1:1/"):
        with pytest.raises(NbdError, match="cannot be reached") as caught:
            await Nbd(uri).open()
        assert caught.value.errno in (errno.ENOENT, errno.ECONNREFUSED)


# A server in this process, which does as a test says.


class FakeServer:
    """Serves a disk in memory, one request after the other; ``misbehave`` may answer instead of it."""

    def __init__(self, size: int, flags: int = ALL_FLAGS, *, greeting: bytes | None = None) -> None:
        self.data = bytearray(size)
        self.size = size
        self.flags = flags
        self.greeting = greeting
        self.export = ""
        self.misbehave: Any = None
        self.requests: list[tuple[int, int, int]] = []
        self.blocks = (1, 4096, 1 << 20)
        self.connections = 0

    @asynccontextmanager
    async def serving(self, listener: Any) -> AsyncIterator[int]:
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self.serve)
            yield listener.extra(SocketAttribute.local_port, 0)
            tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def at(self, path: Path) -> AsyncIterator[str]:
        async with self.serving(await anyio.create_unix_listener(path)):
            yield f"nbd+unix:///?socket={path}"

    async def serve(self, stream: SocketStream) -> None:
        self.connections += 1
        try:
            async with stream:
                await self._serve(stream)
        except (
            anyio.IncompleteRead,
            anyio.BrokenResourceError,
            anyio.EndOfStream,
            anyio.ClosedResourceError,
        ):
            pass

    async def _serve(self, stream: SocketStream) -> None:
        buffered = BufferedByteReceiveStream(stream)
        take = buffered.receive_exactly
        if self.greeting is not None:
            await stream.send(self.greeting)
            await anyio.sleep_forever()
        await stream.send(struct.pack(">QQH", proto.NBDMAGIC, proto.IHAVEOPT, 3))
        await take(4)
        while True:
            _, option, length = struct.unpack(">QII", await take(16))
            data = await take(length) if length else b""

            async def reply(kind: int, data: bytes = b"", option: int = option) -> None:
                head = struct.pack(">QIII", proto.NBD_OPT_REPLY_MAGIC, option, kind, len(data))
                await stream.send(head + data)

            if option == proto.NBD_OPT_GO:
                self.export = data[4 : 4 + int.from_bytes(data[:4], "big")].decode()
                await reply(proto.NBD_REP_INFO, struct.pack(">HQH", 0, self.size, self.flags))
                await reply(proto.NBD_REP_INFO, struct.pack(">HIII", 3, *self.blocks))
                await reply(proto.NBD_REP_ACK)
                break
            await reply(proto.NBD_REP_ACK)
        while True:
            _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", await take(28))
            data = await take(length) if command == proto.NBD_CMD_WRITE else b""
            self.requests.append((command, offset, length))
            if command == proto.NBD_CMD_DISC:
                return
            if self.misbehave and await self.misbehave(stream, command, cookie, offset, length):
                continue
            if command == proto.NBD_CMD_WRITE:
                self.data[offset : offset + length] = data
            elif command == proto.NBD_CMD_WRITE_ZEROES:
                self.data[offset : offset + length] = bytes(length)
            if command == proto.NBD_CMD_READ:
                head = struct.pack(">IHHQI", proto.NBD_STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8)
                content = self.data[offset : offset + length]
                await stream.send(head + struct.pack(">Q", offset) + content)
            else:
                await stream.send(struct.pack(">IIQ", proto.NBD_SIMPLE_REPLY_MAGIC, 0, cookie))


def bad_reply(data: Callable[[int], bytes], then: bool = True) -> Any:
    """Answers the first request so, and then nothing, or as it should."""
    count = 0

    async def misbehave(stream: SocketStream, command: int, cookie: int, offset: int, length: int) -> bool:
        nonlocal count
        count += 1
        if count > 1:
            return not then
        await stream.send(data(cookie))
        return True

    return misbehave


def structured(kind: int, data: bytes, length: int | None = None) -> Callable[[int], bytes]:
    size = len(data) if length is None else length
    magic = proto.NBD_STRUCTURED_REPLY_MAGIC
    return lambda cookie: struct.pack(">IHHQI", magic, 1, kind, cookie, size) + data


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(lambda cookie: b"SSH-2.0-OpenSSH\r\n", id="magic"),
        pytest.param(
            lambda cookie: struct.pack(">IIQ", proto.NBD_SIMPLE_REPLY_MAGIC, 0, cookie), id="simple"
        ),
        pytest.param(lambda cookie: struct.pack(">IIQ", proto.NBD_SIMPLE_REPLY_MAGIC, 0, 99), id="cookie"),
        pytest.param(structured(1, bytes(8), 0xFFFF_FFFF), id="4 GiB"),
        pytest.param(structured(1, struct.pack(">Q", 1 << 63) + b"x"), id="offset"),
        pytest.param(structured(1, bytes(9)), id="partial"),
        pytest.param(structured(2, struct.pack(">QI", 0, 1 << 31)), id="hole"),
        pytest.param(structured(0x8001, struct.pack(">IH", 5, 0xFFFF), 6), id="message"),
        pytest.param(structured(77, b""), id="type"),
    ],
)
async def test_a_server_that_breaks_the_protocol_is_left_with_a_typed_error(
    reply: Callable[[int], bytes], tmp_path: Path
) -> None:
    server = FakeServer(MIB)
    server.misbehave = bad_reply(reply)
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=1) as disk:
        with pytest.raises(NbdError) as caught:
            await disk.read(0, 512)
        assert caught.value.errno == errno.EPROTO
        # It may do better on the next connection.
        assert await disk.read(0, 512) == bytes(512)
        assert server.connections == 2


async def test_a_server_that_goes_on_with_tiny_chunks_is_left(tmp_path: Path) -> None:
    server = FakeServer(MIB)
    error = struct.pack(">IH", errno.EIO, 0)

    async def misbehave(stream: SocketStream, command: int, cookie: int, offset: int, length: int) -> bool:
        chunk = struct.pack(">IHHQI", proto.NBD_STRUCTURED_REPLY_MAGIC, 0, 1 << 15 | 1, cookie, 6) + error
        while True:
            await stream.send(chunk * 10000)

    server.misbehave = misbehave
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=1) as disk:
        with pytest.raises(NbdError, match="more than"):
            await disk.read(0, MIB)
        server.misbehave = None
        with anyio.fail_after(20):
            assert await disk.read(0, 512) == bytes(512)


async def test_what_is_kept_is_a_share_of_what_the_process_has(tmp_path: Path) -> None:
    """Where others have it all, each write is flushed before the next."""
    budget = lib.aiokvm_budget_of_process(BOUNCE_BYTES)
    state = ffi.new("struct aiokvm_budget_state *")
    lib.aiokvm_budget_state(budget, state)
    others, free, total = Share(BOUNCE_BYTES), state.used, state.total
    server = FakeServer(MIB)
    try:
        async with server.at(tmp_path / "s") as uri, Nbd(uri) as disk:
            for _ in range(3):
                await disk.write(0, view(b"x" * 512))
            assert [command for command, _, _ in server.requests] == [proto.NBD_CMD_WRITE] * 3
            others.add(total)
            for _ in range(3):
                await disk.write(0, view(b"x" * 512))
            commands = [command for command, _, _ in server.requests][3:]
            assert commands == [proto.NBD_CMD_FLUSH, proto.NBD_CMD_WRITE] * 3
    finally:
        others.give(total)
    lib.aiokvm_budget_state(budget, state)
    assert state.used == free


async def test_connections_are_opened_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has not come in time is done without."""
    server = FakeServer(4 * MIB)
    waiting = anyio.Event()

    async def serve(stream: SocketStream, real: Any = server._serve) -> None:
        if server.connections > 1:
            if server.connections == 4:
                waiting.set()
            if server.connections > 2:
                await anyio.sleep_forever()
            await waiting.wait()
        await real(stream)

    monkeypatch.setattr(server, "_serve", serve)
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.5)
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=4) as disk:
        assert (len(disk._live), server.connections) == (2, 4)
        await exercise(disk)


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 100])
async def test_a_server_that_is_none_cannot_be_opened(greeting: bytes, tmp_path: Path) -> None:
    async with FakeServer(MIB, greeting=greeting).at(tmp_path / "s") as uri:
        with pytest.raises(NbdError, match="does not greet"):
            await Nbd(uri).open()


async def test_a_server_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises_errno: Any
) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.1)
    async with FakeServer(MIB, greeting=b"").at(tmp_path / "s") as uri:
        with raises_errno(errno.ETIMEDOUT):
            await Nbd(uri).open()


async def test_a_server_that_answers_no_more_loses_its_connection(tmp_path: Path, raises_errno: Any) -> None:
    server = FakeServer(MIB)
    server.misbehave = bad_reply(lambda cookie: b"", then=True)
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=1, timeout=0.5) as disk:
        with raises_errno(errno.EIO):
            await disk.write(0, view(b"x" * 512))
        with anyio.fail_after(20):
            assert await disk.read(0, 512) == bytes(512)
        assert server.connections == 2


async def test_a_server_that_shuts_down_has_not_done_it(tmp_path: Path) -> None:
    server = FakeServer(MIB)
    server.misbehave = bad_reply(structured(0x8001, struct.pack(">IH", errno.ESHUTDOWN, 0)))
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=1) as disk:
        await disk.write(0, view(b"x" * 512))
        assert server.data[:512] == b"x" * 512
        assert [command for command, _, _ in server.requests] == [proto.NBD_CMD_WRITE] * 2


async def test_a_server_that_comes_back_as_another_is_not_used(tmp_path: Path, raises_errno: Any) -> None:
    server = FakeServer(MIB)
    server.misbehave = bad_reply(lambda cookie: b"nonsense")
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=1, timeout=0.5) as disk:
        server.size = 2 * MIB
        with pytest.raises(NbdError, match="begins with"):
            await disk.read(0, 512)
        with pytest.raises(OSError, match="not what it was") as caught:
            await disk.read(0, 512)
        assert caught.value.errno == errno.EIO


async def test_a_failed_flush_is_never_forgotten(tmp_path: Path, raises_errno: Any) -> None:
    server = FakeServer(MIB)
    server.misbehave = bad_reply(structured(0x8001, struct.pack(">IH", errno.EIO, 4) + b"gone"))
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=1) as disk:
        for message in ("gone", "an earlier flush failed: gone"):
            with pytest.raises(OSError, match=message):
                await disk.flush()


async def test_what_no_flush_covers_is_bounded_by_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNFLUSHED_MAX_BYTES", 100_000)
    server = FakeServer(MIB)
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=1) as disk:
        for at in range(0, MIB, 16384):
            await disk.write(at, view(b"x" * 16384))
            assert disk._unflushed_bytes < 120_000
        flushes = [command for command, _, _ in server.requests].count(proto.NBD_CMD_FLUSH)
        assert 8 <= flushes <= 12
        await disk.flush()
        assert not disk._unflushed


async def test_requests_are_cut_to_what_the_server_takes(tmp_path: Path) -> None:
    server = FakeServer(MIB)
    server.blocks = (1024, 4096, 64 << 10)
    async with server.at(tmp_path / "s") as uri, Nbd(uri) as disk:
        assert disk.block_size == 1024
        data = random.Random(1).randbytes(MIB)
        await disk.write(0, view(data))
        assert bytes(await disk.read(0, MIB)) == data
        assert max(length for _, _, length in server.requests) == 64 << 10


async def test_without_write_zeroes_zeroes_are_written(tmp_path: Path, raises_errno: Any) -> None:
    server = FakeServer(MIB, ALL_FLAGS & ~(proto.NBD_FLAG_SEND_WRITE_ZEROES | proto.NBD_FLAG_SEND_TRIM))
    server.data[:] = b"x" * MIB
    async with server.at(tmp_path / "s") as uri, Nbd(uri) as disk:
        await disk.write_zeroes(0, MIB // 2, unmap=True)
        assert server.data == bytes(MIB // 2) + b"x" * (MIB // 2)
        assert disk.discard_granularity_bytes == 0
        with raises_errno(errno.EOPNOTSUPP):
            await disk.discard(0, 512)


async def test_what_cannot_be_flushed_is_not_written(tmp_path: Path) -> None:
    server = FakeServer(MIB, proto.NBD_FLAG_HAS_FLAGS)
    async with server.at(tmp_path / "s") as uri:
        with pytest.raises(NbdError, match="readonly=True"):
            await Nbd(uri).open()
        async with Nbd(uri, readonly=True) as disk:
            assert disk.readonly
            await disk.read(0, 512)


async def test_cancelled_requests_leave_the_connection_as_it_is(tmp_path: Path) -> None:
    server = FakeServer(MIB)
    held, asked = anyio.Event(), anyio.Event()

    async def hold(stream: SocketStream, command: int, *rest: int) -> bool:
        asked.set()
        await held.wait()
        return False

    server.misbehave = hold
    async with server.at(tmp_path / "s") as uri, Nbd(uri, connections=1) as disk:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(disk.write, 0, view(b"x" * 512))
            await asked.wait()
            tasks.cancel_scope.cancel()
        held.set()
        assert await disk.read(0, 512) == b"x" * 512
        assert server.connections == 1


async def test_closing_waits_for_what_runs_and_says_goodbye(tmp_path: Path, raises_errno: Any) -> None:
    server = FakeServer(MIB)
    held, asked = anyio.Event(), anyio.Event()

    async def hold(stream: SocketStream, command: int, *rest: int) -> bool:
        asked.set()
        await held.wait()
        return False

    server.misbehave = hold
    async with server.at(tmp_path / "s") as uri:
        disk = Nbd(uri, connections=1)
        await disk.open()
        with raises_errno(errno.EBUSY):
            await disk.open()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(disk.write, 0, view(b"x" * 512))
            await asked.wait()
            tasks.start_soon(disk.close)
            await anyio.wait_all_tasks_blocked()
            held.set()
        assert server.data[:512] == b"x" * 512
        while server.requests[-1][0] != proto.NBD_CMD_DISC:
            await anyio.lowlevel.checkpoint()
        with raises_errno(errno.EBADF):
            await disk.read(0, 512)
        await disk.close()
        async with disk:  # once more
            assert await disk.read(0, 512) == b"x" * 512


def test_arguments_that_make_no_sense_are_refused() -> None:
    for arguments in ({"connections": 0}, {"connections": 100}, {"timeout": 0.0}, {"timeout": 1e9}):
        with pytest.raises(ConfigError):
            Nbd("nbd://host/", **arguments)
    with pytest.raises(ConfigError):
        Nbd("disk.img")
