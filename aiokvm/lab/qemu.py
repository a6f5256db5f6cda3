"""The lab's machine on QEMU, whose TCG emulates a CPU with AMD-V."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from aiokvm.lab.config import base_archive, writable
from aiokvm.lab.emulator import CONSOLE, beside, died, emulate
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator

    from aiokvm.lab.config import LabConfig

# Not the network that a NAT of a guest's has by default. `init` has the same addresses.
_NETWORK = "net=10.77.0.0/24,host=10.77.0.2,dns=10.77.0.3,dhcpstart=10.77.0.15"
_INPUT = "input"  # in the machine's folder, where QEMU runs
_CHUNK_BYTES = 64 << 10
# On a host that is busy the timer seems broken when Linux tests it, and that would be a panic.
_CMDLINE = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"


class Machine:
    """One QEMU with its files in ``folder``."""

    def __init__(self, folder: Path, kernel: Path, config: LabConfig) -> None:
        self._kernel = kernel
        self._config = config
        self._folder = folder
        self._initramfs = folder / "initramfs"
        self._status = folder / "status"

    def write_initramfs(self, busybox: Path, modules: Path, own: bytes) -> None:
        """Write what the kernel starts with: busybox, the modules, and the archive of this run."""
        self._initramfs.write_bytes(cpio.join(base_archive(busybox), modules.read_bytes(), own))

    async def run(
        self,
        output: Callable[[bytes], Awaitable[None] | None],
        read_input: Callable[[int], Awaitable[bytes]],
    ) -> int:
        """Start it, pass output and input on until it ends, and return the command's exit status."""
        with self._listen() as listener, processor(os.sched_getaffinity(0)) as number:
            async with beside(partial(self._feed, listener, read_input)):
                status = await emulate(self._argv(number), self._folder, output)
        told = self._status.read_text().strip() if self._status.exists() else ""
        if status == 0 and told.isdigit():
            return int(told)
        raise died(
            "was switched off" if status == 0 else f"died: QEMU ended with status {status}", self._folder
        )

    def _listen(self) -> socket.socket:
        """Return the socket that QEMU connects its port for input to."""
        listener = socket.socket(socket.AF_UNIX)
        listener.setblocking(False)
        # The folder's path may be too long for a socket's.
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{_INPUT}")
        finally:
            os.close(folder)
        listener.listen(1)
        return listener

    async def _feed(self, listener: socket.socket, read_input: Callable[[int], Awaitable[bytes]]) -> None:
        await anyio.wait_readable(listener)
        connection, _ = listener.accept()
        with connection:
            connection.setblocking(False)
            while data := await read_input(_CHUNK_BYTES):
                rest = memoryview(data)
                while rest:
                    await anyio.wait_writable(connection)
                    try:
                        rest = rest[connection.send(rest) :]
                    except BlockingIOError:
                        continue
                    except OSError:  # the machine has ended
                        return
            # Not closed: QEMU would take no more of what it has not read yet.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            await anyio.sleep_forever()

    def _argv(self, processor: int) -> list[str]:
        config = self._config
        # On one processor of the host: at a #VMEXIT of its emulated AMD-V, QEMU changes what interrupts are
        # pending by an instruction that is not atomic, and would lose one that another thread raises then.
        argv = [
            *("taskset", "-c", str(processor)),
            *(program(), "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"),
            *("-smp", str(config.cpus), "-m", f"{config.memory_bytes >> 20}M"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(self._kernel), "-initrd", str(self._initramfs), "-append", _CMDLINE),
            *(
                "-chardev",
                f"file,id=console,path={_option(self._folder / CONSOLE)}",
                "-serial",
                "chardev:console",
            ),
            # Not serial ports: these are fast, carry every byte unchanged, and no kernel message gets in.
            *("-device", "virtio-serial-pci"),
            # Not "stdio": the end of QEMU's empty standard input would unplug the port.
            *("-chardev", "file,id=output,path=/dev/stdout", "-device", "virtserialport,nr=1,chardev=output"),
            *("-chardev", f"file,id=status,path={_option(self._status)}"),
            *("-device", "virtserialport,nr=2,chardev=status"),
            *("-chardev", f"socket,id=input,path={_INPUT}", "-device", "virtserialport,nr=3,chardev=input"),
            *("-virtfs", _virtfs(Path("/"), "hostroot") + ",readonly=on"),
        ]
        for tag, path in writable(config):
            argv += ["-virtfs", _virtfs(path, tag)]
        if config.network:
            forwards = "".join(f",hostfwd={forward}" for forward in config.forwards)
            argv += ["-netdev", f"user,id=net,{_NETWORK}{forwards}", "-device", "virtio-net-pci,netdev=net"]
        return argv


@contextmanager
def processor(allowed: Collection[int], name: str = "aiokvm-lab") -> Iterator[int]:
    """Have a lab's place on a processor of the host: of those that are allowed one with the fewest labs.

    Each has places 0, 1 and so on, which are names of Unix sockets with no file: whoever has bound one has
    the place, and the kernel frees it however that process ends.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
        for place in itertools.count():
            for number in random.sample(sorted(allowed), len(allowed)):
                try:
                    held.bind(f"\0{name}/{number}/{place}")
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                else:
                    yield number
                    return


def program() -> str:
    """Return the QEMU that is used: ``AIOKVM_QEMU``, or the one that Debian's package has."""
    name = os.environ.get("AIOKVM_QEMU", "qemu-system-x86_64")
    return os.path.abspath(name) if "/" in name else name


def _virtfs(path: Path, tag: str) -> str:
    return f"local,path={_option(path)},mount_tag={tag},security_model=none,multidevs=remap"


def _option(path: Path) -> str:
    return str(path).replace(",", ",,")
