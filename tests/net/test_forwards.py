"""Ports of the host that lead to a guest behind user-mode NAT."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread

from aiokvm import ConfigError, net
from aiokvm.aio import current_loop
from aiokvm.net.plane import Plane

sys.path.append(str(Path(__file__).parents[2]))  # behind what is installed

from tests.net.namespace import needs
from tests.net.nat import PAGE, application, ask, echoing, guest_of, needs_slirp

pytestmark = needs_slirp


def is_there(path: str | Path) -> bool:
    return os.path.lexists(path)


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


@pytest.mark.parametrize(
    ("host", "guest", "message"),
    [
        ("9" * 5000, 80, "is no port of the host"),
        (80, "9" * 5000, "is no port of the guest"),
        ("10.0.2.15:" + "9" * 5000, 80, "is no port of the host"),
        ("/\ud800", 80, "is no path of a Unix socket"),
        ("/a\0b", 80, "is no path of a Unix socket"),
        ("/" + "a" * 200, 80, "is no path of a Unix socket"),
        (80, True, "give a dict of anything to a whole number or str"),
    ],
)
def test_forwards_that_cannot_be(host: Any, guest: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        net.User(forward={host: guest})


@pytest.mark.anyio
async def test_a_path_may_be_any_bytes(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.sock")
    async with net.Switch() as switch:
        user = net.User(forward={path: 80})
        await switch.connect(user)
        assert is_there(Path(path))
        await user.remove_forward(path)
        assert not is_there(Path(path))


@pytest.mark.anyio
async def test_a_path_that_cannot_be_forwarded_is_told_as_text() -> None:
    async with net.Switch() as switch:
        with pytest.raises(FileNotFoundError, match=r"cannot forward /nope\\x1b\[31m/socket"):
            await switch.connect(net.User(forward={"/nope\x1b[31m/socket": 80}))


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


def test_what_is_forwarded_is_said_in_short() -> None:
    user = net.User(forward={8080: 80, "udp:53": 53, "/run/x.sock": 22, "[::]:80": "[fec0::15]:80"})
    assert [str(forward) for forward in user.forwards] == [
        "tcp:127.0.0.1:8080 to port 80 of the guest",
        "udp:127.0.0.1:53 to port 53 of the guest",
        "/run/x.sock to port 22 of the guest",
        "tcp:[::]:80 to port 80 of fec0::15",
    ]
    assert user.mtu == 1500
