"""User-mode NAT with Linux's own network stack as the guest, in a network namespace."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
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
from aiokvm.net.plane import Plane

sys.path.append(str(Path(__file__).parents[2]))  # behind what is installed

from tests.net.namespace import needs
from tests.net.nat import (
    LIMIT_S,
    PAGE,
    TALK,
    application,
    ask,
    echoing,
    greeting,
    guest_of,
    listening,
    needs_slirp,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm.net import Connection

pytestmark = needs_slirp


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
async def test_a_plane_with_a_thread(tmp_path: Path) -> None:
    user = net.User(services={PAGE: application})
    async with guest_of(user, tmp_path, thread="net") as guest:
        assert await guest.run("curl", "-sS", *["http://10.0.2.100/"] * 20) == "hello 10.0.2.15" * 20


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


# ---- opening and closing


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
        ({"services": {PAGE: "page"}}, "give a dict of anything to net.Asgi"),
        ({"services": {PAGE: lambda: None}}, "neither"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        net.User(**arguments)


def test_a_build_without_libslirp_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiokvm.net import user

    class Lib:
        aiokvm_net_slirp_built: Callable[[], int] = staticmethod(lambda: 0)

    monkeypatch.setattr(user, "lib", Lib)
    with pytest.raises(ConfigError, match="libslirp-dev"):
        net.User()
