"""User-mode NAT with Linux's own network stack as the guest, in a network namespace."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from anyio import to_thread

from aiokvm import ConfigError, net
from aiokvm._core import ffi, lib
from aiokvm.aio import current_loop
from aiokvm.budget import DESCRIPTORS
from aiokvm.net import user as module
from aiokvm.net.plane import BUDGET_NS, Plane
from aiokvm.process import Folder

sys.path.append(str(Path(__file__).parents[2]))  # behind what is installed

from tests.holdups import WANTED_S
from tests.net.namespace import namespace, why_not

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiokvm.net import Connection
    from aiokvm.net.service import Handler, Service
    from tests.net.namespace import Namespace

LIMIT_S = 90
PAGE = ("10.0.2.100", 80)

pytestmark = pytest.mark.skipif(
    not lib.aiokvm_net_slirp_built(), reason="built without libslirp: libslirp-dev is missing"
)


def needs(*commands: str) -> pytest.MarkDecorator:
    reason = why_not(*commands)
    return pytest.mark.skipif(bool(reason), reason=reason)


@asynccontextmanager
async def guest_of(
    user: net.User, folder: Path, lease: bool = True, thread: str | None = None
) -> AsyncIterator[Namespace]:
    """A guest behind this NAT."""
    plane = Plane(current_loop(), thread)
    with anyio.fail_after(LIMIT_S):
        async with namespace(folder) as guest:
            try:
                end = await user.open(plane, print)
                end.link(await guest.tap.open(plane, print))
                if lease:
                    await guest.lease()
                yield guest
            finally:
                with anyio.CancelScope(shield=True):
                    await user.close()
                    await guest.tap.close()
                plane.close()


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    """A process that may have more of them than most shells allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(count, soft), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def in_use() -> int:
    """How many descriptors of the process's budget guests have."""
    state = ffi.new("struct aiokvm_budget_state *")
    lib.aiokvm_budget_state(lib.aiokvm_budget_of_process(DESCRIPTORS), state)
    return int(state.used)


def is_there(path: str | Path) -> bool:
    return os.path.lexists(path)


@contextmanager
def listening(host: str = "127.0.0.1", kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """A server of the host's: it says back what it hears, once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as server:
        server.bind((host, 0))
        if kind == socket.SOCK_STREAM:
            server.listen()

        def serve() -> None:
            try:
                if kind == socket.SOCK_STREAM:
                    with server.accept()[0] as accepted:
                        accepted.sendall(accepted.recv(1000))
                else:
                    server.sendto(*server.recvfrom(1000))
            except OSError:  # it was closed
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown(socket.SHUT_RDWR) if kind == socket.SOCK_STREAM else server.sendto(
                b"", server.getsockname()
            )
            thread.join()


# What a guest does: connects, says something, prints the answer.
TALK = """
import socket, sys
host, port, kind, text = sys.argv[1:]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family, getattr(socket, kind)) as s:
    s.settimeout(10)
    s.connect((host, int(port)))
    s.send(text.encode())
    print(s.recv(1000).decode(), end="")
"""
# A server of the guest's that says back what it hears.
ECHO = """
import socket, sys
port, kind = int(sys.argv[1]), sys.argv[2]
family = socket.AF_INET6 if kind.endswith("6") else socket.AF_INET
with socket.socket(family, getattr(socket, kind.rstrip("6"))) as s:
    s.bind(("", port))
    if kind.startswith("SOCK_STREAM"):
        s.listen()
    print("ready", flush=True)
    while True:
        if kind.startswith("SOCK_STREAM"):
            with s.accept()[0] as c:
                while data := c.recv(1000):
                    c.sendall(data)
        else:
            s.sendto(*s.recvfrom(1000))
"""


@asynccontextmanager
async def echoing(guest: Namespace, port: int, kind: str) -> AsyncIterator[None]:
    with guest.start(sys.executable, "-c", ECHO, str(port), kind) as process:
        assert process.stdout
        assert await to_thread.run_sync(process.stdout.readline) == "ready\n"
        yield


def ask(family: int, kind: int, address: Any, text: bytes) -> bytes:
    with socket.socket(family, kind) as client:
        client.settimeout(LIMIT_S)
        client.connect(address)
        client.send(text)
        return client.recv(1000)


async def application(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"hello {scope['client'][0]}".encode()})


# ---- what a guest gets


@needs("curl")
@pytest.mark.anyio
async def test_an_address_by_dhcp_and_a_page_of_this_process(tmp_path: Path) -> None:
    user = net.User(services={PAGE: application}, hostname="web-1", domains=("a.example", "b.example"))
    async with guest_of(user, tmp_path, lease=False) as guest:
        assert await guest.lease() == (
            "lease 10.0.2.15/24 router=10.0.2.2 dns=10.0.2.3 domain=a.example "
            "search=a.example b.example hostname=web-1\n".rstrip("\n")
        )
        output = await guest.run("curl", "-sS", "http://10.0.2.100/", "http://10.0.2.100/again")
        assert output == "hello 10.0.2.15" * 2
    assert user.stats().received_frames > 0


@needs()
@pytest.mark.anyio
async def test_a_network_of_ones_own(tmp_path: Path) -> None:
    user = net.User(network="192.168.7.0/28", host="192.168.7.14", dhcp_start="192.168.7.9", dns="9.9.9.9")
    async with guest_of(user, tmp_path, lease=False) as guest:
        assert (await guest.lease()).startswith("lease 192.168.7.9/28 router=192.168.7.14 dns=9.9.9.9 ")


@needs()
@pytest.mark.anyio
async def test_the_host_is_reached_if_that_is_wanted_only(tmp_path: Path) -> None:
    for kind in ("SOCK_STREAM", "SOCK_DGRAM"):
        number = getattr(socket, kind)
        with listening(kind=number) as server:
            port = str(server.getsockname()[1])
            async with guest_of(net.User(allow_host_loopback=True), tmp_path) as guest:
                assert await guest.python(TALK, "10.0.2.2", port, kind, "hello") == "hello"
    with listening() as server:
        port = str(server.getsockname()[1])
        async with guest_of(user := net.User(), tmp_path) as guest:
            output = await guest.python(TALK, "10.0.2.2", port, "SOCK_STREAM", "hello", check=False)
            assert "ConnectionRefusedError" in output
            await guest.run("ip", "route", "add", "0.0.0.0/8", "via", "10.0.2.2", check=False)
            assert user.stats().dropped_filtered == 1


@needs()
@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="the kernel has no IPv6")
@pytest.mark.anyio
async def test_ipv6(tmp_path: Path) -> None:
    with listening("::1") as server:
        port = server.getsockname()[1]
        user = net.User(allow_host_loopback=True, forward={"[::1]:0": 7})
        async with guest_of(user, tmp_path) as guest:
            # The address comes by a router advertisement, and is tried out for a second.
            ready = "until ip -6 addr show dev tap0 scope site -tentative | grep -q inet6; do :; done"
            await guest.run("timeout", "30", "sh", "-c", ready)
            assert await guest.python(TALK, "fec0::2", str(port), "SOCK_STREAM", "hello") == "hello"
            async with echoing(guest, 7, "SOCK_STREAM6"):
                (forward,) = user.forwards
                address = ("::1", forward.port)
                answer = await to_thread.run_sync(ask, socket.AF_INET6, socket.SOCK_STREAM, address, b"hello")
                assert answer == b"hello"


# ---- forwards


@needs()
@pytest.mark.anyio
async def test_ports_of_the_guest(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    user = net.User(forward={"127.0.0.1:0": 7, "udp:127.0.0.1:0": "10.0.2.15:7", path: 7})
    assert [forward.port for forward in user.forwards] == [0, 0, 0]
    async with guest_of(user, tmp_path) as guest:
        tcp, udp, unix = user.forwards
        assert tcp.port != 0 != udp.port
        assert unix.host == path
        async with echoing(guest, 7, "SOCK_STREAM"), echoing(guest, 7, "SOCK_DGRAM"):
            for family, kind, address in (
                (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", tcp.port)),
                (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", udp.port)),
                (socket.AF_UNIX, socket.SOCK_STREAM, path),
            ):
                assert await to_thread.run_sync(ask, family, kind, address, b"hello") == b"hello"
            # Changed while it runs; who is connected stays so.
            with socket.create_connection(("127.0.0.1", tcp.port)) as client:
                client.send(b"one")
                assert await to_thread.run_sync(client.recv, 10) == b"one"
                await user.remove_forward(f"127.0.0.1:{tcp.port}")
                client.send(b"two")
                assert await to_thread.run_sync(client.recv, 10) == b"two"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", tcp.port))
            await user.remove_forward(unix)
            assert not is_there(path)
            added = await user.add_forward("127.0.0.1:0", 7)
            assert added in user.forwards
            address = ("127.0.0.1", added.port)
            answer = await to_thread.run_sync(ask, socket.AF_INET, socket.SOCK_STREAM, address, b"hello")
            assert answer == b"hello"
            with pytest.raises(ConfigError, match="is not forwarded"):
                await user.remove_forward(tcp.port)
            with pytest.raises(ConfigError, match="already"):
                await user.add_forward(added.port, 8)
    # It can be used again as it was meant.
    assert [str(forward.key) for forward in user.forwards] == ["udp:127.0.0.1:0", "tcp:127.0.0.1:0"]


@pytest.mark.anyio
async def test_ports_that_are_not_to_be_had(tmp_path: Path) -> None:
    plane = Plane(current_loop())
    try:
        descriptors = set(os.listdir("/proc/self/fd"))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            path = tmp_path / "socket"
            user = net.User(forward={str(path): 1, port: 80}, services={PAGE: application})
            with pytest.raises(OSError, match=f"127.0.0.1:{port}.*choose another port") as caught:
                await user.open(plane, print)
            assert caught.value.errno == errno.EADDRINUSE
            assert not is_there(path)
            with pytest.raises(OSError, match="no such address"):
                await net.User(forward={"198.51.100.1:80": 80}).open(plane, print)
            path.touch()
            with pytest.raises(OSError, match="remove the file"):
                await net.User(forward={str(path): 80}).open(plane, print)
            assert is_there(path)
            user = net.User(forward={"127.0.0.1:0": 80})
            await user.open(plane, print)
            with pytest.raises(OSError, match="choose another port"):
                await user.add_forward(port, 80)
            assert len(user.forwards) == 1
            await user.close()
        assert set(os.listdir("/proc/self/fd")) == descriptors
    finally:
        plane.close()


@needs()
@pytest.mark.anyio
async def test_a_guest_that_is_restricted(tmp_path: Path) -> None:
    async def upper(stream: Connection) -> None:
        await stream.send((await stream.receive()).upper())

    with listening() as server:
        port = str(server.getsockname()[1])
        user = net.User(
            restrict=True, allow_host_loopback=True, forward={"127.0.0.1:0": 7}, services={PAGE: upper}
        )
        async with guest_of(user, tmp_path, lease=False) as guest:
            assert "router= dns= " in await guest.lease()
            output = await guest.python(TALK, "10.0.2.2", port, "SOCK_STREAM", "hello", check=False)
            assert "ConnectionRefusedError" in output
            assert await guest.python(TALK, *map(str, PAGE), "SOCK_STREAM", "hello") == "HELLO"
            async with echoing(guest, 7, "SOCK_STREAM"):
                address = ("127.0.0.1", user.forwards[0].port)
                answer = await to_thread.run_sync(ask, socket.AF_INET, socket.SOCK_STREAM, address, b"hello")
                assert answer == b"hello"


# ---- services


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


@pytest.mark.anyio
async def test_a_path_that_cannot_be_forwarded_is_told_as_text() -> None:
    async with net.Switch() as switch:
        with pytest.raises(FileNotFoundError, match=r"cannot forward /nope\\x1b\[31m/socket"):
            await switch.connect(net.User(forward={"/nope\x1b[31m/socket": 80}))


@pytest.mark.anyio
async def test_what_is_added_while_it_opens_is_kept() -> None:
    user = net.User()
    plane = Plane(current_loop())
    added: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # While it starts the network is about to be open.
        added.append((await user.add_forward(0, 81)).key)
        await user.add_service("10.0.2.101:8", handler)
        await user.remove_service("10.0.2.102:8")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await receive()

    async def handler(stream: Connection) -> None:
        raise NotImplementedError

    await user.add_service("10.0.2.100:80", net.Asgi(app))
    await user.add_service("10.0.2.102:8", handler)
    try:
        await user.open(plane, print)
        (forward,) = user.forwards
        assert forward.key == added[0]
        assert forward.port != 0
        socket.create_connection(("127.0.0.1", forward.port), 10).close()
        assert set(user.services) == {("10.0.2.100", 80), ("10.0.2.101", 8)}
        # And the nameserver, for who asks by TCP.
        assert set(user._services) == {*user.services, ("10.0.2.255", 53)}
    finally:
        await user.close()
        plane.close()


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
async def test_forwards_whose_ports_the_system_chooses_stay_as_many() -> None:
    user = net.User(forward={0: 80})
    await user.add_forward("127.0.0.1:0", 80)
    await user.add_forward(0, 81)
    for _ in range(2):
        assert [(each.port, each.guest_port) for each in user.forwards] == [(0, 80), (0, 80), (0, 81)]
        plane = Plane(current_loop())
        await user.open(plane, print)
        assert len({each.port for each in user.forwards} - {0}) == 3
        await user.close()
        plane.close()
    await user.remove_forward(user.forwards[2])
    assert [each.guest_port for each in user.forwards] == [80, 80]


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


@pytest.mark.anyio
async def test_a_network_has_one_share_however_many_ways_lead_out_of_it() -> None:
    def shares() -> int:
        state = ffi.new("struct aiokvm_budget_state *")
        lib.aiokvm_budget_state(lib.aiokvm_budget_of_process(DESCRIPTORS), state)
        return int(state.shares)

    async def handler(_stream: Connection) -> None:
        pass

    gc.collect()
    before = shares()
    plane = Plane(current_loop())
    user = net.User(services={PAGE: handler})
    try:
        await user.open(plane, print)
        assert shares() == before + 1
        await user.close()
    finally:
        plane.close()


@pytest.mark.anyio
async def test_many_connections_are_accepted_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of a millisecond each: the loop has its turn after five, and goes on by itself."""
    waiting = 250
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

    def accept(_service: Service) -> Any:
        nonlocal waiting
        if not waiting:
            return None
        waiting -= 1
        return Accepted()

    async def handler(stream: Connection) -> None:
        done.append(stream)
        if len(done) == 250:
            all_done.set()
        # So that none makes room for the next at its end.
        await anyio.sleep_forever()

    plane = Plane(current_loop())
    user = net.User(services={PAGE: handler}, dns="192.0.2.1")
    try:
        await user.open(plane, print)
        monkeypatch.setattr(user._connections, "accept", accept)
        monkeypatch.setattr("aiokvm.net.user.time", Clock())
        user._on_news(0, 0, 0)
        assert 250 - waiting == BUDGET_NS // 100_000
        user._on_news(0, 0, 0)
        assert 250 - waiting == BUDGET_NS // 100_000
        with anyio.fail_after(60):
            await all_done.wait()
        assert not user._accepting
        await user.close()
    finally:
        plane.close()


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


SINK = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
print("ready", flush=True)
while s.recv(65536):
    s.send(b"y" * 1000)
"""


@needs()
@pytest.mark.anyio
async def test_closing_in_the_middle_of_everything(tmp_path: Path) -> None:
    ended: list[str] = []
    speaking = anyio.Event()

    async def speak(stream: Connection) -> None:
        try:
            while True:
                await stream.send(b"x" * 65536)
                speaking.set()
        except anyio.get_cancelled_exc_class():
            ended.append("cancelled")
            raise
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            ended.append("closed")

    user = net.User(services={PAGE: speak}, forward={"127.0.0.1:0": 7})
    async with guest_of(user, tmp_path) as guest:
        with guest.start(sys.executable, "-c", SINK, *map(str, PAGE)) as sink:
            assert sink.stdout
            assert await to_thread.run_sync(sink.stdout.readline) == "ready\n"
            await speaking.wait()
            with socket.create_connection(("127.0.0.1", user.forwards[0].port)):
                await user.close()
                assert len(ended) == 1
                with pytest.raises(ConfigError):
                    await user.remove_forward(1)
    assert not user._directory


@pytest.mark.anyio
async def test_closing_though_it_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        """That never comes to the end of its connections."""

        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def aiokvm_net_slirp_cut_some(self, _end: Any) -> int:
            return 1

    monkeypatch.setattr(module, "lib", Core())
    path = tmp_path / "guest.sock"
    plane = Plane(current_loop())
    user = net.User(forward={str(path): 22})
    try:
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(2):
            await user.open(plane, print)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await user.close()
            assert scope.cancelled_caught
            assert not path.exists()
        assert set(os.listdir("/proc/self/fd")) == before
    finally:
        plane.close()


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


@pytest.mark.anyio
async def test_figures_are_there_while_it_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[net.NetStats] = []

    class Core:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def aiokvm_net_slirp_cut_some(self, _end: Any) -> int:
            seen.append(user.stats())
            return 0

    monkeypatch.setattr(module, "lib", Core())
    plane = Plane(current_loop())
    user = net.User()
    try:
        await user.open(plane, print)
        await user.close()
        assert seen == [user.stats()]
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
        user._accepting = True  # it goes on in this turn
        with pytest.raises(OSError, match="Too many open files"):
            user._accept_all()
        user._on_news(0, 0, 0)
        assert calls == 2
        await user.close()
    finally:
        plane.close()


SYNS = """
import socket, sys
all = []
for port in range(1, 60000):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex((sys.argv[1], int(sys.argv[2])))
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    u.sendto(b"x", (sys.argv[1], port))
    all += [s, u]
    del all[:-3000]
"""


@needs()
@pytest.mark.anyio
async def test_a_flood_is_bounded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        port = str(server.getsockname()[1])
        user = net.User(allow_host_loopback=True)
        async with guest_of(user, tmp_path) as guest:
            more = 'ulimit -n 8192; exec "$0" -c "$1" 10.0.2.2 "$2"'
            with guest.start("sh", "-c", more, sys.executable, SYNS, port):
                while user.stats().dropped_full < 100:
                    await anyio.lowlevel.checkpoint()
            assert len(os.listdir("/proc/self/fd")) < 1200


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


@needs("curl")
@pytest.mark.anyio
async def test_a_plane_with_a_thread(tmp_path: Path) -> None:
    user = net.User(services={PAGE: application})
    async with guest_of(user, tmp_path, thread="net") as guest:
        assert await guest.run("curl", "-sS", *["http://10.0.2.100/"] * 20) == "hello 10.0.2.15" * 20


async def greeting(stream: Connection) -> None:
    await stream.send(b"hello")
    stream.close()


async def without_python_ignoring_sigpipe(folder: Path) -> None:
    """Run by the next test in a process of its own."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    async with guest_of(net.User(services={PAGE: greeting}), folder) as guest:
        assert "True" in await guest.python(AFTERWARDS, *map(str, PAGE))
        assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# Goes on to send to one who has gone: little, libslirp is slow to reset a connection whose window is full.
AFTERWARDS = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
while s.recv(100):
    pass
try:
    for _ in range(100_000):
        s.send(b"x")
except OSError:
    print(True)
"""


@needs()
def test_a_program_that_does_not_ignore_sigpipe_lives(tmp_path: Path) -> None:
    program = (
        "import anyio, pathlib, sys; from tests.net import test_user; "
        "anyio.run(test_user.without_python_ignoring_sigpipe, pathlib.Path(sys.argv[1]))"
    )
    root = str(Path(__file__).parents[2])
    argv = (sys.executable, "-c", f"import sys; sys.path.append({root!r}); {program}", tmp_path)
    subprocess.run(argv, check=True, timeout=LIMIT_S)


# In a network and mount namespace of its own: asks a nameserver that only it knows.
RESOLVER = """
import pathlib, socket, sys, threading
sys.path.append(sys.argv[2])
import anyio
from aiokvm import net
from tests.net.test_user import guest_of

def answer():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        ready.set()
        query, asker = server.recvfrom(512)
        # The question again, and a record of type A: RFC 1035, section 4.
        end = query.index(b"\\0", 12) + 5
        head = query[:2] + bytes.fromhex("8180 0001 0001 0000 0000")
        server.sendto(head + query[12:end] + bytes.fromhex("c00c 0001 0001 0000003c 0004 c6336407"), asker)

async def main():
    async with guest_of(net.User(), pathlib.Path(sys.argv[1])) as guest:
        print(await guest.run("dig", "+short", "@10.0.2.3", "some.example"), end="")

ready = threading.Event()
threading.Thread(target=answer, daemon=True).start()
ready.wait()
anyio.run(main)
"""


@needs("dig")
def test_names_by_the_nameserver_of_the_host(tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    prepare = f"ip link set lo up; mount --bind {resolv} /etc/resolv.conf; "
    argv = ("unshare", "-rnm", "sh", "-ec", prepare + 'exec "$@"', "sh", sys.executable, "-c", RESOLVER)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        (*argv, tmp_path, root), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.stdout == "198.51.100.7\n", done.stderr


# ---- a killed program

KILLED = """
import os, signal, sys
import anyio
from aiokvm import net
from aiokvm.aio import current_loop
from aiokvm.net.plane import Plane

path = sys.argv[2]
backends = {
    "forward": lambda: net.User(forward={path: 22}, services={("10.0.2.100", 80): handler}),
    "stream": lambda: net.Stream(path, server=True),
    "datagram": lambda: net.Datagram(local=path, remote=path + ".peer"),
}

async def handler(stream): ...

async def main():
    plane = Plane(current_loop())
    await backends[sys.argv[1]]().open(plane, print)
    print("open", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

anyio.run(main)
"""


@pytest.mark.parametrize("kind", ["forward", "stream", "datagram"])
def test_what_a_killed_program_leaves_is_in_nobody_s_way(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "guest.sock"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for _ in range(2):
        done = subprocess.run(
            (sys.executable, "-c", KILLED, kind, path),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        assert (done.stdout, done.returncode) == ("open\n", -signal.SIGKILL), done.stderr
        assert path.is_socket()
    # Of the folders with sockets of services there is the last one's.
    assert len(list(temporary.iterdir())) == (kind == "forward")


@pytest.mark.anyio
async def test_a_socket_that_somebody_is_at_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "guest.sock"
    plane = Plane(current_loop())
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            with pytest.raises(OSError, match="remove the file"):
                await net.User(forward={str(path): 22}).open(plane, print)
            assert path.is_socket()
        user = net.User(forward={str(path): 22})
        await user.open(plane, print)
        await user.close()
        assert not path.exists()
    finally:
        plane.close()


# ---- what is refused


async def handler(stream: Connection) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"services": {5: lambda stream: None}}, "a service is at an IPv4 address and a TCP port"),
        ({"network": "10.0.2.0"}, "/8 to /29"),
        ({"network": "10.0.2.1/24"}, "host bits"),
        ({"network": "127.0.0.0/24"}, "cannot be"),
        ({"host": "10.0.3.2"}, "no address of a machine"),
        ({"host": "10.0.2.255"}, "no address of a machine"),
        ({"host": "10.0.2.x"}, "no IPv4 address"),
        ({"host": "10.0.2.15"}, "different"),
        ({"dns": "dns.example"}, "no IPv4 address"),
        ({"dhcp_start": "10.0.2.2"}, "different"),
        ({"ipv6": "fec0::/48"}, "/64"),
        ({"ipv6": "fec0"}, "no IPv6 network"),
        ({"ipv6": "fe80::/64"}, "cannot be"),
        ({"mtu": 68}, "1280"),
        ({"mtu": 68, "ipv6": None}, "576"),
        ({"mtu": 70000}, "65521"),
        ({"hostname": "a b"}, "no name"),
        ({"hostname": "x" * 33}, "no name"),
        ({"domains": "example.org"}, "give a list of str"),
        ({"domains": ["-"]}, "no name"),
        ({"domains": ["a" * 60] * 5}, "200 bytes"),
        ({"forward": {"x": 80}}, "no port of the host"),
        ({"forward": {True: 80}}, "no port of the host"),
        ({"forward": {"localhost:80": 80}}, "no port of the host"),
        ({"forward": {"sctp:80": 80}}, "no port of the host"),
        ({"forward": {"1.2.3:80": 80}}, "no address"),
        ({"forward": {"70000": 80}}, "65535"),
        ({"forward": {80: 0}}, "1 to 65535"),
        ({"forward": {80: "x"}}, "no port of the guest"),
        ({"forward": {80: "[fec0::15]:80"}}, "one version"),
        ({"forward": {"[::1]:80": 80}, "ipv6": None}, "which this network has not"),
        ({"forward": {80: 80, "tcp:127.0.0.1:80": 81}}, "already"),
        ({"forward": {"/" + "x" * 107: 80}}, "107 bytes"),
        ({"forward": {"udp:53": 53}, "restrict": True}, "cannot answer UDP"),
        ({"services": {("10.0.3.1", 80): handler}}, "not in 10.0.2.0/24"),
        ({"services": {("10.0.2.2", 80): handler}}, "the router's"),
        ({"services": {("10.0.2.100", 0): handler}}, "TCP port"),
        ({"services": {"10.0.2.100": handler}}, "TCP port"),
        ({"services": {PAGE: handler, "10.0.2.100:80": handler}}, "already"),
        ({"services": {PAGE: "page"}}, "neither"),
        ({"services": {PAGE: lambda: None}}, "neither"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        net.User(**arguments)


def test_what_is_forwarded_is_said_in_short() -> None:
    user = net.User(forward={8080: 80, "udp:53": 53, "/run/x.sock": 22, "[::]:80": "[fec0::15]:80"})
    assert [str(forward) for forward in user.forwards] == [
        "tcp:127.0.0.1:8080 to port 80 of the guest",
        "udp:127.0.0.1:53 to port 53 of the guest",
        "/run/x.sock to port 22 of the guest",
        "tcp:[::]:80 to port 80 of fec0::15",
    ]
    assert user.mtu == 1500


def test_a_build_without_libslirp_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiokvm.net import user

    class Lib:
        aiokvm_net_slirp_built: Callable[[], int] = staticmethod(lambda: 0)

    monkeypatch.setattr(user, "lib", Lib)
    with pytest.raises(ConfigError, match="libslirp-dev"):
        net.User()
