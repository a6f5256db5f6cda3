"""The nameservers of the host, asked one after the other. Some are here, on addresses of the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from aiokvm.budget import DESCRIPTORS, Share
from aiokvm.net import dns
from aiokvm.net.dns import Resolver, nameservers
from aiokvm.net.service import Connection

sys.path.append(str(Path(__file__).parents[2]))  # behind what is installed

from tests.net.namespace import needs
from tests.net.nat import in_use, needs_slirp

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 30
QUERY = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01x\x00\x00\x01\x00\x01"


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nameserver 192.0.2.1\n", ["192.0.2.1"]),
        ("# c\n; d\n\tnameserver\t192.0.2.1 # x\nsearch a", ["192.0.2.1"]),
        ("nameserver 2001:db8::1\nnameserver 192.0.2.1", ["2001:db8::1", "192.0.2.1"]),
        ("nameserver fe80::1%eth0\n", ["fe80::1%eth0"]),
        ("nameserver 192.0.2.1\nnameserver 192.0.2.1\n", ["192.0.2.1"]),
        ("nameserver name.example\nnameserver\nnameserver 1.2.3\n", ["127.0.0.1"]),
        ("nameserver fe80::1%a\0b\nnameserver fe80::1%é\n", ["127.0.0.1"]),
        ("", ["127.0.0.1"]),
    ],
)
def test_what_a_resolv_conf_names(text: str, servers: list[str]) -> None:
    assert nameservers(text) == servers


@contextmanager
def answering(address: str, port: int, code: int | None) -> Iterator[int]:
    """A nameserver that answers with this code, after something that is no answer; None: never."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((address, port))

        def serve() -> None:
            while (query := server.recvfrom(4096))[0]:
                data, whom = query
                if code is not None:
                    server.sendto(b"\0\0" + data[2:], whom)
                    server.sendto(data[:2] + bytes([0x81, 0x80 | code]) + data[4:] + address.encode(), whom)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            with socket.socket(family, socket.SOCK_DGRAM) as last:
                last.sendto(b"", server.getsockname()[:2])
            thread.join(LIMIT_S)


@pytest.mark.anyio
async def test_all_of_them_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "PATIENCE_S", 0.1)
    conf = tmp_path / "resolv.conf"
    resolver = Resolver(conf)

    async def ask(*servers: str) -> bytes | None:
        # Of another size: a file system's time may be too coarse to tell two files apart.
        text = "".join(f"nameserver {server}\n" for server in servers)
        conf.write_text(text + "#" * (len(conf.read_text()) + 1 if conf.exists() else 0))
        with anyio.fail_after(LIMIT_S):
            answer = await resolver.ask(QUERY)
        return answer and answer[len(QUERY) :]

    with (
        answering("127.0.0.2", 0, 0) as port,
        answering("127.0.0.3", port, None),
        answering("127.0.0.4", port, 2),
        answering("::1", port, 0),
    ):
        monkeypatch.setattr(dns, "PORT", port)
        assert await ask("127.0.0.2") == b"127.0.0.2"
        assert await ask("::1") == b"::1"
        # Nobody there; one that says nothing; one that cannot help.
        for other in ("127.0.0.9", "127.0.0.3", "127.0.0.4"):
            assert await ask(other, "127.0.0.2") == b"127.0.0.2"
            resolver = Resolver(conf)
        # That is better than nothing.
        assert await ask("127.0.0.9", "127.0.0.4") == b"127.0.0.4"
        assert await ask("127.0.0.9") is None
        # Who has answered is asked first from then on.
        assert await ask("127.0.0.3", "::1") == b"::1"
        monkeypatch.setattr(dns, "PATIENCE_S", LIMIT_S * 2)
        assert await ask("127.0.0.3", "::1") == b"::1"
        monkeypatch.setattr(dns, "ANSWER_S", 0.1)
        assert await ask("127.0.0.3") is None


@pytest.mark.anyio
async def test_a_question_by_tcp_goes_to_the_first_that_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.9\nnameserver 127.0.0.2\n")
    guest, ours = socket.socketpair()
    with socket.create_server(("127.0.0.2", 0)) as server, guest:
        monkeypatch.setattr(dns, "PORT", server.getsockname()[1])

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(client.recv(100).upper())

        thread = threading.Thread(target=serve)
        thread.start()
        guest.sendall(b"question")
        connection = Connection(ours, ("10.0.2.15", 1), ("10.0.2.255", 53))
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(Resolver(conf).relay, connection)
                assert await anyio.to_thread.run_sync(guest.recv, 100) == b"QUESTION"
                guest.shutdown(socket.SHUT_WR)
        thread.join(LIMIT_S)
        connection.close()


@pytest.mark.anyio
async def test_a_question_by_tcp_has_a_descriptor_of_the_guest_s_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.2\n")
    share = Share(DESCRIPTORS)
    resolver = Resolver(conf, share)
    before = in_use()
    with socket.create_server(("127.0.0.2", 0)) as server:
        monkeypatch.setattr(dns, "PORT", server.getsockname()[1])

        def asked() -> tuple[socket.socket, Connection]:
            guest, ours = socket.socketpair()
            return guest, Connection(ours, ("10.0.2.15", 1), ("10.0.2.255", 53))

        (guest, connection), (second_guest, second) = asked(), asked()
        with guest, second_guest, anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(resolver.relay, connection)
                accepted, _ = await anyio.to_thread.run_sync(server.accept)
                assert in_use() == before + 1
                # What the guest has elsewhere counts: there is no second one.
                share.add(1 << 40)
                await resolver.relay(second)
                assert await anyio.to_thread.run_sync(second_guest.recv, 1) == b""
                share.give(1 << 40)
                accepted.close()
                guest.shutdown(socket.SHUT_WR)
    connection.close()
    assert in_use() == before


# In a network namespace of its own, where a nameserver has an address of one link only.
LINK_LOCAL = """
import pathlib, socket, sys, threading
sys.path.append(sys.argv[2])
import anyio
from aiokvm.net import dns
from aiokvm.net.dns import Resolver
from aiokvm.net.service import Connection
from tests.net.test_dns import LIMIT_S, QUERY

at = ("fe80::53", 53, 0, socket.if_nametoindex("lo"))
udp, tcp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM), socket.socket(socket.AF_INET6)
udp.bind(at)
tcp.bind(at)
tcp.listen()

def answer():
    while True:
        query, asker = udp.recvfrom(512)
        udp.sendto(query[:2] + bytes([0x81, 0x80]) + query[4:], asker)

def talk():
    while True:
        client, _ = tcp.accept()
        with client:
            client.sendall(client.recv(100).upper())

for serve in (answer, talk):
    threading.Thread(target=serve, daemon=True).start()

async def main():
    # Whoever cannot be reached is not waited for.
    dns.PATIENCE_S = LIMIT_S * 2
    with anyio.fail_after(LIMIT_S):
        assert (await Resolver(conf).ask(QUERY))[12:] == QUERY[12:]
        guest, ours = socket.socketpair()
        guest.sendall(b"question")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Resolver(conf).relay, Connection(ours, ("10.0.2.15", 1), ("10.0.2.255", 53)))
            assert await anyio.to_thread.run_sync(guest.recv, 100) == b"QUESTION"
            tasks.cancel_scope.cancel()

conf = pathlib.Path(sys.argv[1])
conf.write_text("nameserver fe80::53\\nnameserver fe80::53%lo\\n")
for backend, options in (("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})):
    anyio.run(main, backend=backend, backend_options=options)
print("done")
"""


@needs()
def test_a_nameserver_of_one_link_is_asked_if_its_scope_is_told(tmp_path: Path) -> None:
    """Without the scope it cannot be reached, and the next is asked at once."""
    prepare = 'ip link set lo up; ip -6 addr add fe80::53/64 dev lo nodad; exec "$@"'
    argv = ("unshare", "-rn", "sh", "-ec", prepare, "sh", sys.executable, "-c", LINK_LOCAL)
    done = subprocess.run(
        (*argv, tmp_path / "resolv.conf", str(Path(__file__).parents[2])),
        capture_output=True,
        text=True,
        timeout=LIMIT_S * 4,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr


# In a network and mount namespace of its own: asks a nameserver that only it knows.
RESOLVER = """
import pathlib, socket, sys, threading
sys.path.append(sys.argv[2])
import anyio
from aiokvm import net
from tests.net.nat import guest_of

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


@needs_slirp
@needs("dig")
def test_names_by_the_nameserver_of_the_host(tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    prepare = f"ip link set lo up; mount --bind {resolv} /etc/resolv.conf; "
    argv = ("unshare", "-rnm", "sh", "-ec", prepare + 'exec "$@"', "sh", sys.executable, "-c", RESOLVER)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        (*argv, tmp_path, root), capture_output=True, text=True, timeout=LIMIT_S * 3, check=False
    )
    assert done.stdout == "198.51.100.7\n", done.stderr


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["fifo", "endless", "folder", "large"])
async def test_a_resolv_conf_that_is_no_such_thing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "resolv.conf"
    if kind == "fifo":
        os.mkfifo(conf)
    elif kind == "endless":
        conf.symlink_to("/dev/zero")
    elif kind == "folder":
        conf.mkdir()
    else:
        with conf.open("w") as file:
            file.write("nameserver 127.0.0.1\n")
            file.truncate(1 << 32)
    monkeypatch.setattr(dns, "ANSWER_S", 0.1)
    with answering("127.0.0.1", 0, 0) as port:
        monkeypatch.setattr(dns, "PORT", port)
        with anyio.fail_after(LIMIT_S):
            answer = await Resolver(conf).ask(QUERY)
        assert answer
        assert answer.endswith(b"127.0.0.1")


@pytest.mark.anyio
@pytest.mark.parametrize("zone", ["nope0", "a\0b", "é" * 40, "x" * 5000])
async def test_nameservers_that_cannot_be_asked_are_passed_over(
    zone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text(f"nameserver fe80::1%{zone}\nnameserver 127.0.0.2\n")
    with answering("127.0.0.2", 0, 0) as port:
        monkeypatch.setattr(dns, "PORT", port)
        with anyio.fail_after(LIMIT_S):
            answer = await Resolver(conf).ask(QUERY)
        assert answer
        assert answer.endswith(b"127.0.0.2")
