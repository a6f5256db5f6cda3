"""Check this machine, boot Debian from a disk with two vCPUs, run a few commands in it and turn it off.

What the guest reads from a second disk is what the host wrote there: a checksum shows it. Its network is a
NAT in this process: it gets an address by DHCP, fetches a page from an ASGI application that runs here, and
serves one that is fetched from here through a forwarded port.

Where ring 0 has no hardware the machine runs in the lab, which is slower and otherwise the same.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from rich.console import Console
from rich.table import Table

from aiokvm import VM, AiokvmError, ExitReason, block, boot, images, kvm, lab, net
from aiokvm.kvm.probe import HARDWARE_RING0, ring0_speed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, MutableMapping
    from typing import Any

COMMANDS = (
    *("uname -a", "head -n 1 /etc/os-release", "nproc", "grep MemTotal /proc/meminfo"),
    *("cat /proc/cmdline", "cat /proc/uptime", "df -h /"),
)
CHECKSUM = "sha256sum /dev/vdb"
APPLICATION = ("10.0.2.100", 80)
LEASE = "until busybox ip -4 addr show eth0 | grep inet; do sleep 0.1; done"
FETCH = f"busybox wget -q -O - http://{APPLICATION[0]}/"
SERVE = "mkdir -p /run/www; uname -n >/run/www/index.html; busybox httpd -p 80 -h /run/www"
CMDLINE = "console=ttyS0 panic=-1 root=/dev/vda rw aiokvm.autologin"
DATA_BYTES = 16 << 20
PROMPT = b"root@debian:~# "
TIMEOUT_SECONDS = 240
HERE = "--here"

console = Console(highlight=False)
steps: list[tuple[str, float]] = []


@contextmanager
def step(what: str) -> Iterator[None]:
    """Take the time that a step takes."""
    begin = time.perf_counter()
    yield
    steps.append((what, time.perf_counter() - begin))


async def application(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],  # noqa: ARG001
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """Answer the guest: an ASGI application, as starlette and others make them."""
    if scope["type"] != "http":
        return
    page = f"from process {os.getpid()} of the host: you are {scope['client'][0]}\n".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": page})


async def show_until_prompt(vm: VM) -> bytes:
    """Copy the guest's console to ours until its shell waits for a command; return the end of it."""
    seen = b""
    with anyio.move_on_after(TIMEOUT_SECONDS):
        while PROMPT not in seen:
            text = await vm.serial.read()
            if not text:
                raise SystemExit(f"the machine ended before its shell: {vm.exit}")
            console.file.write(text.replace(b"\r", b"").decode(errors="replace"))
            console.file.flush()
            seen = (seen + text)[-4096:]
    if PROMPT not in seen:
        raise SystemExit(f"no prompt of the guest's shell within {TIMEOUT_SECONDS} s")
    return seen


async def run(vm: VM, command: str) -> bytes:
    """Type a command, show what it prints, and return that."""
    with step(command):
        await vm.serial.send(command.encode() + b"\n")
        return await show_until_prompt(vm)


async def fetch(user: net.User) -> str:
    """Return the page of the guest's server, by the port of the host that leads to it."""
    port = next(iter(user.forwards)).port

    def get() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=TIMEOUT_SECONDS) as response:
            return str(response.read().decode()).strip()

    return await anyio.to_thread.run_sync(get)


async def boot_and_show(data: bytes, path: str) -> None:
    """Boot, show the console, run the commands, power off; ``data`` is what the file at ``path`` holds."""
    debian = images.find_debian() or await images.build_debian()
    # The image stays as it is: what the guest writes is kept in memory.
    root = block.Overlay(block.Raw(debian.disk, readonly=True), None)
    linux = boot.Linux(debian.kernel, debian.initrd, CMDLINE)
    user = net.User(forward={"127.0.0.1:0": 80}, services={APPLICATION: application})
    with step("create the machine"):
        disks = [root, block.Raw(path, readonly=True)]
        vm = await VM.create(boot=linux, cpus=2, memory="512M", name="demo", disks=disks, nets=[user])
    async with vm:
        with step("boot to a shell"):
            await vm.start()
            await show_until_prompt(vm)
        for command in (*COMMANDS, LEASE):
            await run(vm, command)
        page = await run(vm, FETCH)
        await run(vm, SERVE)
        with step("a page from the guest"):
            name = await fetch(user)
        output = await run(vm, CHECKSUM)
        with step("power button to power off"):
            end = await vm.stop(timeout=TIMEOUT_SECONDS)
    console.print(f"\n[bold]the machine ended: {end.reason.value}[/bold]")
    if end.reason is not ExitReason.SHUTDOWN:
        raise SystemExit("the guest did not turn itself off")
    digest = hashlib.sha256(data).hexdigest()
    if digest.encode() not in output:
        raise SystemExit(f"the guest's checksum of the second disk is not the host's, {digest}")
    console.print(f"[bold]the guest's checksum is the host's: {digest}[/bold]")
    if f"from process {os.getpid()} of the host".encode() not in page:
        raise SystemExit("the guest did not get the page of this process's application")
    console.print("[bold]the guest fetched a page from an application in this process[/bold]")
    if name != "debian":
        raise SystemExit(f"the page of the guest's server is {name!r}")
    console.print(f"[bold]its own page, through a forwarded port, says: {name}[/bold]")


async def in_the_lab() -> int:
    """Do the same in the lab."""

    def show(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    return await lab.run([sys.executable, __file__, HERE], output=show)


def ring0_has_hardware() -> bool:
    """Measure it."""
    try:
        with kvm.System() as system:
            return ring0_speed(system) >= HARDWARE_RING0
    except AiokvmError:
        return False


def main() -> None:
    """Run the demo, here or in the lab, and print how long each step took."""
    if HERE not in sys.argv:
        subprocess.run([Path(sys.executable).with_name("aiokvm"), "doctor"], check=False)
        console.print("\nbuilding a Debian disk of Debian's packages (cached from the first time on)")
        subprocess.run([Path(sys.executable).with_name("aiokvm"), "images", "build", "debian"], check=True)
        if not ring0_has_hardware():
            console.print("ring 0 has no hardware here: the machine runs in the lab\n")
            raise SystemExit(anyio.run(in_the_lab))
    try:
        with tempfile.NamedTemporaryFile() as file:
            data = os.urandom(DATA_BYTES)
            file.write(data)
            file.flush()
            anyio.run(boot_and_show, data, file.name)
    except AiokvmError as error:
        raise SystemExit(f"demo: {error}") from error
    table = Table("step", "seconds")
    for what, seconds in steps:
        table.add_row(what, f"{seconds:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
