"""Services in the process that a guest behind user-mode NAT connects to."""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from anyio import to_thread

from aiokvm import ConfigError, net
from aiokvm.aio import current_loop
from aiokvm.net import user as module
from aiokvm.net.plane import BUDGET_NS, Plane
from aiokvm.process import Folder

sys.path.append(str(Path(__file__).parents[2]))  # behind what is installed

from tests.holdups import WANTED_S
from tests.net.namespace import needs
from tests.net.nat import PAGE, TALK, greeting, guest_of, in_use, needs_slirp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiokvm.net import Connection
    from aiokvm.net.service import Handler, Service

pytestmark = needs_slirp


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    """A process that may have more of them than most shells allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(count, soft), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- connections


@needs()
@pytest.mark.anyio
async def test_a_service_is_a_byte_stream(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[tuple[str, int], tuple[str, int]]] = []

    async def upper(stream: Connection) -> None:
        seen.append((stream.guest, stream.service))
        async for data in stream:
            await stream.send(data.upper())
            if data == b"fail":
                raise RuntimeError("as planned")

    async def other(stream: Connection) -> None:
        await stream.send(b"other")

    user = net.User(services={"10.0.2.100:7": upper}, restrict=True)
    async with guest_of(user, tmp_path) as guest:
        assert await guest.python(TALK, "10.0.2.100", "7", "SOCK_STREAM", "hello") == "HELLO"
        assert await guest.python(TALK, "10.0.2.100", "7", "SOCK_STREAM", "fail") == "FAIL"
        assert seen[0] == (("10.0.2.15", seen[0][0][1]), ("10.0.2.100", 7))
        await user.add_service(("10.0.2.101", 8), other)
        assert await guest.python(TALK, "10.0.2.101", "8", "SOCK_STREAM", "hello") == "other"
        with pytest.raises(ConfigError, match="already"):
            await user.add_service("10.0.2.101:8", other)
        await user.remove_service("10.0.2.101:8")
        with pytest.raises(ConfigError, match="no service"):
            await user.remove_service("10.0.2.101:8")
        assert user.services == (("10.0.2.100", 7),)
        output = await guest.python(TALK, "10.0.2.101", "8", "SOCK_STREAM", "hello", check=False)
        assert "Error" in output
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        f"exception in the handler of service 10.0.2.100:7 for 10.0.2.15:{seen[1][0][1]}"
    ]


# Says half of what it has to say, and then closes or resets; or waits for what comes.
PART = """
import socket, struct, sys
host, port, how = sys.argv[1:]
with socket.create_connection((host, int(port)), timeout=10) as s:
    if how == "wait":
        s.sendall(b"go")
        try:
            while data := s.recv(100):
                print(data.decode(), end=" ")
            print("end")
        except ConnectionResetError:
            print("reset")
    else:
        s.sendall(b"half")
        if how == "reset":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
"""


@needs()
@pytest.mark.anyio
async def test_a_reset_is_no_end(tmp_path: Path) -> None:
    seen: list[tuple[bytes, str]] = []
    changed = anyio.Event()

    async def keep(stream: Connection) -> None:
        data = b""
        try:
            while True:
                data += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            seen.append((data, type(error).__name__))
            changed.set()

    async def cut(stream: Connection) -> None:
        await stream.receive()
        await stream.send(b"part")
        stream.abort()

    async def whole(stream: Connection) -> None:
        await stream.receive()
        await stream.send(b"all")

    services: dict[str, Handler] = {"10.0.2.100:7": keep, "10.0.2.100:8": cut, "10.0.2.100:9": whole}
    async with guest_of(net.User(services=services), tmp_path) as guest:
        for how, error in (("close", "EndOfStream"), ("reset", "BrokenResourceError")):
            await guest.python(PART, "10.0.2.100", "7", how)
            with anyio.fail_after(30):
                await changed.wait()
            # What was not read when the reset came may be gone.
            assert seen[-1][1] == error
            assert seen[-1][0] in (b"half", b"" if how == "reset" else b"half")
            changed = anyio.Event()
        assert (await guest.python(PART, "10.0.2.100", "8", "wait")).endswith("reset\n")
        assert await guest.python(PART, "10.0.2.100", "9", "wait") == "all end\n"


# Many connections of a guest, all of them open before the first is used.
MANY = """
import socket, sys
count, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def connect():
    s = socket.create_connection((host, port), timeout=30)
    return s
all = [connect() for _ in range(count)]
for n, s in enumerate(all):
    s.sendall(b"%d" % n)
print(sum(s.recv(100) == b"%d" % n for n, s in enumerate(all)))
"""


@needs()
@pytest.mark.anyio
async def test_two_hundred_connections(tmp_path: Path) -> None:
    async def echo(stream: Connection) -> None:
        async for data in stream:
            await stream.send(data)

    with descriptors(4096):
        async with guest_of(net.User(services={PAGE: echo}), tmp_path) as guest:
            assert await guest.python(MANY, "200", *map(str, PAGE)) == "200\n"


@needs()
@pytest.mark.anyio
async def test_both_ends_of_a_service_s_connections_are_counted(tmp_path: Path) -> None:
    """Each has a descriptor of libslirp's and one of the handler's: both are counted, once."""
    count = 20
    used: list[int] = []
    before = in_use()

    async def echo(stream: Connection) -> None:
        async for data in stream:
            used.append(in_use() - before)
            await stream.send(data)

    async with guest_of(net.User(services={PAGE: echo}), tmp_path) as guest:
        assert await guest.python(MANY, str(count), *map(str, PAGE)) == f"{count}\n"
    assert max(used) == 2 * count
    assert in_use() == before


FLOOD = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
s.settimeout(2)
sent = 0
try:
    while True:
        sent += s.send(b"x" * 65536)
except TimeoutError:
    print(sent)
"""


@needs()
@pytest.mark.anyio
async def test_a_handler_that_never_reads_holds_its_guest_up(tmp_path: Path) -> None:
    async def deaf(stream: Connection) -> None:
        await anyio.sleep_forever()

    user = net.User(services={PAGE: deaf})
    async with guest_of(user, tmp_path) as guest:
        # What is buffered on the way is bounded: the guest's, libslirp's and the socket's.
        assert int(await guest.python(FLOOD, *map(str, PAGE))) < 8 << 20
        await user.remove_service(PAGE)


@needs("curl")
@pytest.mark.anyio
async def test_large_pages_both_ways(tmp_path: Path) -> None:
    size = 20 << 20
    hashes: list[int] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        got = 0
        more = True
        while more:
            message = await receive()
            got += len(message["body"])
            more = message["more_body"]
        hashes.append(got)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(size // 65536):
            await send({"type": "http.response.body", "body": b"z" * 65536, "more_body": True})
        await send({"type": "http.response.body"})

    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(size)
    async with guest_of(net.User(services={PAGE: page}), tmp_path) as guest:
        output = await guest.run(
            "curl", "-sS", "-T", str(big), "-o", "/dev/null", "-w", "%{size_download}", "http://10.0.2.100/"
        )
        assert output == str(size)
        assert hashes == [size]


# ---- accepting them


@pytest.mark.anyio
@pytest.mark.parametrize("services", [1, 50])
async def test_many_connections_are_accepted_in_several_turns(
    monkeypatch: pytest.MonkeyPatch, services: int
) -> None:
    """A tenth of a millisecond each: the loop has its turn after five, and goes on by itself."""
    waiting = dict.fromkeys(((f"10.0.2.{100 + number}", 80) for number in range(services)), 250 // services)
    done: list[Connection] = []
    all_done = anyio.Event()

    class Clock:
        now_ns = 0

        def monotonic_ns(self) -> int:
            self.now_ns += 100_000
            return self.now_ns

    class Accepted:
        guest = ("10.0.2.15", 1)

        def close(self) -> None:
            pass

        def abort(self) -> None:
            pass

    def accept(service: Service) -> Any:
        if not waiting[service.address]:
            return None
        waiting[service.address] -= 1
        return Accepted()

    async def handler(stream: Connection) -> None:
        done.append(stream)
        if len(done) == 250:
            all_done.set()
        # So that none makes room for the next at its end.
        await anyio.sleep_forever()

    plane = Plane(current_loop())
    user = net.User(services=dict.fromkeys(waiting, handler), dns="192.0.2.1")
    try:
        await user.open(plane, print)
        monkeypatch.setattr(user._connections, "accept", accept)
        monkeypatch.setattr("aiokvm.net.user.time", Clock())
        user._on_news(0, 0, 0)
        assert 250 - sum(waiting.values()) == BUDGET_NS // 100_000
        user._on_news(0, 0, 0)
        assert 250 - sum(waiting.values()) == BUDGET_NS // 100_000
        with anyio.fail_after(60):
            await all_done.wait()
        assert not user._accepting
        await user.close()
    finally:
        plane.close()


@pytest.mark.anyio
async def test_connections_are_accepted_though_a_turn_before_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    async def handler(_stream: Connection) -> None:
        pass

    def accept(_service: Service) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    plane = Plane(current_loop())
    user = net.User(services={PAGE: handler}, dns="192.0.2.1")
    try:
        await user.open(plane, print)
        monkeypatch.setattr(user._connections, "accept", accept)
        user._accepting = user._has_news = True  # it goes on in this turn
        with pytest.raises(OSError, match="Too many open files"):
            user._accept_all()
        user._on_news(0, 0, 0)
        assert calls == 2
        await user.close()
    finally:
        plane.close()


# ---- many services, and the folder of their sockets


@pytest.mark.anyio
async def test_the_loop_does_not_sweep_temporary_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Folder] = []

    def make() -> Folder:
        assert threading.current_thread() is not threading.main_thread()
        made.append(Folder())
        return made[-1]

    async def handler(stream: Connection) -> None:
        raise NotImplementedError

    monkeypatch.setattr(module, "Folder", make)
    for restrict in (False, True):
        user = net.User(restrict=restrict)
        plane = Plane(current_loop())
        await user.open(plane, print)
        async with anyio.create_task_group() as group:
            for port in (1, 2):
                group.start_soon(user.add_service, f"10.0.2.100:{port}", handler)
        assert len(user.services) == 2
        await user.close()
        plane.close()
    # Of two that were made at the same time one is not needed.
    assert len(made) == 3
    assert not any(folder.path.exists() for folder in made)


@pytest.mark.anyio
async def test_many_services_are_opened_and_closed_turn_by_turn() -> None:
    worst_s = 0.0

    async def watch() -> None:
        nonlocal worst_s
        last_s = time.thread_time()
        while True:
            await anyio.lowlevel.checkpoint()
            now_s = time.thread_time()
            worst_s, last_s = max(worst_s, now_s - last_s), now_s

    plane = Plane(current_loop())
    places = [(f"10.0.2.{100 + number % 100}", 1 + number // 100) for number in range(500)]
    user = await to_thread.run_sync(lambda: net.User(services=dict.fromkeys(places, greeting)))
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await anyio.lowlevel.checkpoint()
            await user.open(plane, print)
            await user.close()
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        assert worst_s < WANTED_S
    finally:
        await user.close()
        plane.close()


@pytest.mark.anyio
async def test_a_folder_of_many_services_is_removed_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    class Recorded(Folder):
        def close(self) -> None:
            threads.append(threading.get_ident())
            super().close()

    monkeypatch.setattr(module, "Folder", Recorded)
    plane = Plane(current_loop())
    user = net.User(services={(f"10.0.2.{number}", 80): greeting for number in range(100, 120)})
    try:
        await user.open(plane, print)
        assert user._directory
        path = user._directory.path
        assert len(list(path.iterdir())) == 21  # and the nameserver
        await user.close()
        assert not path.exists()
        assert threads
        assert threading.get_ident() not in threads
    finally:
        plane.close()
