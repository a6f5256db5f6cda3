"""What test_kernels.py runs in a network namespace: `python kernel_programs.py LOOP FAMILY FILE`.

TCP from the kernel here, through a switch, to that of another namespace: here frames are whole as they leave,
there they have to be cut and have their checksums, which that kernel looks at.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import uvloop

from aiokvm import net

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"loop_factory": uvloop.new_event_loop}),
    "trio": ("trio", {}),
}
PATIENCE_S = 60
PORT = 5000
DATA = bytes(range(251)) * 40_000  # 10 MB
ADDRESSES = {"ipv4": ("10.77.0.1", "10.77.0.2"), "ipv6": ("fd77::1", "fd77::2")}
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 2, 0x1000, 0x4000


def opened(name: str, address: str) -> int:
    """A TAP device that is up and has this address."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    bits = 64 if ":" in address else 24
    nodad = ("nodad",) if ":" in address else ()
    subprocess.run(("ip", "addr", "add", f"{address}/{bits}", "dev", name, *nodad), check=True)
    subprocess.run(("ip", "link", "set", name, "up"), check=True)
    return fd


def there(address: str, control: int) -> None:
    """The other namespace: hands its device out, and tells what it got of its one connection."""
    fd = opened("there", address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(fileno=control) as sock:
        socket.send_fds(sock, [b"0"], [fd])
        with socket.create_server((address, PORT), family=family) as server:
            sock.sendall(b"1")
            connection, _ = server.accept()
            with connection:
                got = hashlib.sha256()
                left = len(DATA)
                while left and (chunk := connection.recv(1 << 16)):
                    got.update(chunk)
                    left -= len(chunk)
                connection.sendall(got.digest() + DATA)
                connection.recv(1)
        counts = Path("/proc/net/snmp").read_text().split("Tcp: ")
        names, values = counts[1].split(), counts[2].split()
        sock.sendall(values[names.index("InCsumErrors")].encode())


def started(address: str) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """The other namespace, the way to it, and its device."""
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE_S)
    command = ("unshare", "-n", sys.executable, __file__, "there", address, str(theirs.fileno()))
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    assert ours.recv(1) == b"1"
    return process, ours, fd


async def here(family: str, file: str) -> None:
    mine, other = ADDRESSES[family]
    process, control, their_fd = started(other)
    fd = opened("here", mine)
    filters = [*net.essentials(), net.allow(direction="egress", dst=other, protocol="tcp"), net.deny()]
    tap = net.Tap(fds=[their_fd], offload=False, filters=filters, tap=net.Pcap(file, snaplen=128))
    try:
        async with net.Switch() as switch:
            await switch.connect(net.Tap(fds=[fd]))
            port = await switch.connect(tap)
            async with await anyio.connect_tcp(other, PORT) as stream:
                await stream.send(DATA)
                got = b""
                while len(got) < 32 + len(DATA):
                    got += await stream.receive(1 << 20)
            assert got[:32] == hashlib.sha256(DATA).digest(), "what arrived is not what was sent"
            assert got[32:] == DATA
            assert await anyio.to_thread.run_sync(control.recv, 100) == b"0", "wrong checksums"
            assert port.stats().segmented > 10, port.stats()
    finally:
        process.kill()
        process.wait()
        control.close()
        os.close(fd)
        os.close(their_fd)


def main() -> None:
    if sys.argv[1] == "there":
        there(sys.argv[2], int(sys.argv[3]))
        return
    loop, family, file = sys.argv[1:]
    backend, options = OPTIONS[loop]

    async def limited() -> None:
        with anyio.fail_after(PATIENCE_S):
            await here(family, file)

    anyio.run(limited, backend=backend, backend_options=options)


if __name__ == "__main__":
    main()
