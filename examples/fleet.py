"""Five guests on a switch behind one NAT, which reach the world by a proxy in this process, and no other way.

Each guest has a proxy of its own, at an address that no other guest's frames are let through to: so what is
asked there was asked by that guest, whatever it says of itself. The proxy asks for what is on an allow-list,
and writes down who wanted what.

    python examples/fleet.py                    # a world that this program makes up
    python examples/fleet.py deb.debian.org     # the real one, as far as it is listed

It boots Debian's kernel: on a KVM that cannot run Linux, ``aiokvm lab -- python examples/fleet.py`` does, and
with ``lab --network`` it reaches the real one.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from aiokvm import VM, boot, images, net
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, MutableMapping

    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

GUESTS = 5
PORT = 3128
ALLOWED = ("news.example",)
REFUSED = "secret.example"
SECONDS = 600


async def world(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    """Stand in for the Internet: every host has a page that says its name."""
    name = next(value for key, value in scope["headers"] if key == b"host")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"this is " + name + b"\n"})


class Proxy:
    """An HTTP proxy for one guest, as an ASGI application."""

    def __init__(
        self, guest: str, client: httpx.AsyncClient, allowed: Collection[str], log: list[tuple[str, str, int]]
    ) -> None:
        self.guest = guest
        self.client = client
        self.allowed = allowed
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Fetch what the guest asks for, if it may have it."""
        if scope["type"] != "http":
            return
        # A proxy is asked for a whole URL.
        url = httpx.URL(scope["raw_path"].decode("ascii", "replace"))
        if scope["method"] != "GET" or url.scheme != "http" or url.host not in self.allowed:
            status, body = 403, b"not for you\n"
        else:
            try:
                response = await self.client.get(url)
                status, body = response.status_code, response.content
            except httpx.HTTPError as error:
                status, body = 502, f"{error!r}\n".encode()
        self.log.append((self.guest, str(url), status))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


def filters(proxy: str) -> list[net.Rule]:
    """Let a guest have an address and talk to its proxy; that alone."""
    rule = net.allow(direction="egress", dst=proxy, protocol="tcp", dst_port=PORT)
    return [*net.essentials(), rule, net.deny()]


def wanted(allowed: Collection[str]) -> list[str]:
    """Return what each guest asks for: what it may have, and something else."""
    return [f"http://{host}/" for host in (*allowed, REFUSED)]


async def initrd(folder: Path, name: str, proxy: str, urls: Collection[str]) -> Path:
    """Return an initramfs whose guest asks its proxy for the URLs, and turns itself off."""
    base = images.path("initramfs") or await images.pull("initramfs")
    script = f"export http_proxy=http://{proxy}:{PORT}; "
    script += "; ".join(f"wget -q -O - {url} || echo {url}: refused" for url in urls)
    command = images.command_archive(["sh", "-c", script])
    path = folder / name
    path.write_bytes(cpio.join(base.read_bytes(), command))
    return path


async def run_guest(vm: VM) -> None:
    """Show what the guest prints after its boot."""
    async with vm:
        await vm.start()
        booted = False
        async for line in vm.serial.lines():
            text = line.decode(errors="replace").strip()
            if booted and text:
                print(f"{vm.name}: {text}", flush=True)
            booted = booted or text.startswith("aiokvm: init")


async def main(*hosts: str) -> list[tuple[str, str, int]]:
    """Run the fleet; return who asked for what, and was answered how."""
    allowed = hosts or ALLOWED
    log: list[tuple[str, str, int]] = []
    kernel = images.path("cloud-elf") or await images.pull("cloud-elf")
    proxies = {f"guest{index}": f"10.0.2.{100 + index}" for index in range(1, GUESTS + 1)}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        client = httpx.AsyncClient(transport=None if hosts else httpx.ASGITransport(world))
        await stack.enter_async_context(client)
        switch = await stack.enter_async_context(net.Switch("fleet"))
        services = {(address, PORT): Proxy(name, client, allowed, log) for name, address in proxies.items()}
        await switch.connect(net.User(services=services, restrict=True))
        machines = []
        for name, address in proxies.items():
            # Isolated ports talk to the NAT, not to each other.
            port = switch.port(isolated=True, filters=filters(address))
            archive = await initrd(folder, name, address, wanted(allowed))
            linux = boot.Linux(kernel, archive, "console=ttyS0 quiet loglevel=3 panic=-1")
            machines.append(await VM.create(boot=linux, memory="128M", name=name, nets=[port]))
            stack.push_async_callback(machines[-1].aclose)
        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as tasks:
                for vm in machines:
                    tasks.start_soon(run_guest, vm)
    for guest, url, status in sorted(log):
        print(f"{guest} asked for {url}: {status}")
    return log


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
