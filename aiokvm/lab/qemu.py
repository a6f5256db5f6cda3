"""The lab's machine on QEMU, whose TCG emulates a CPU with AMD-V."""

from __future__ import annotations

import inspect
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from aiokvm.errors import LabError
from aiokvm.images.process import child
from aiokvm.lab.config import writable
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokvm.lab.config import LabConfig

_CONSOLE_LINES = 15
_CHUNK_BYTES = 64 << 10
# Not the network that a NAT of a guest's has by default. `init` has the same addresses.
_NETWORK = "net=10.77.0.0/24,host=10.77.0.2,dns=10.77.0.3,dhcpstart=10.77.0.15"
_CMDLINE = "console=ttyS0 quiet panic=-1 mitigations=off"


class Machine:
    """One QEMU with its files in ``folder``."""

    def __init__(self, folder: Path, kernel: Path, config: LabConfig) -> None:
        self._kernel = kernel
        self._config = config
        self._initramfs = folder / "initramfs"
        self._console = folder / "console"
        self._status = folder / "status"
        self._stderr = folder / "stderr"

    def write_initramfs(self, busybox: Path, modules: Path, own: bytes) -> None:
        """Write what the kernel starts with: busybox, the modules, and the archive of this run."""
        base = cpio.archive(
            [
                *map(cpio.directory, ("bin", "dev", "proc", "sys", "lower", "upper", "root")),
                cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
            ]
        )
        self._initramfs.write_bytes(cpio.join(base, modules.read_bytes(), own))

    async def run(self, output: Callable[[bytes], Awaitable[None] | None]) -> int:
        """Start it, pass its output on until it ends, and return the command's exit status."""
        # A pipe of our own: uvloop gives a child a socket as its output, which QEMU cannot open by name.
        source, sink = os.pipe()
        with (
            os.fdopen(source, "rb", buffering=0) as stream,
            os.fdopen(sink, "wb", buffering=0) as end,
            self._stderr.open("wb") as stderr,
        ):
            os.set_blocking(source, False)
            async with child(self._argv(), stdout=end, stderr=stderr) as process:
                end.close()
                while True:
                    await anyio.wait_readable(stream)
                    if not (chunk := stream.read(_CHUNK_BYTES)):
                        break
                    result = output(chunk)
                    if inspect.isawaitable(result):
                        await result
                status = await process.wait()
        told = _read(self._status).strip()
        if status == 0 and told.isdigit():
            return int(told)
        how = "was switched off" if status == 0 else f"died: QEMU ended with status {status}"
        lines = [*_read(self._stderr).splitlines(), *_read(self._console).splitlines()][-_CONSOLE_LINES:]
        raise LabError(f"the lab's machine {how} before the command had ended; its last words:", *lines)

    def _argv(self) -> list[str]:
        config = self._config
        # On one processor of the host: at a #VMEXIT of its emulated AMD-V, QEMU changes what interrupts are
        # pending by an instruction that is not atomic, and would lose one that another thread raises then.
        argv = [
            *("taskset", "-c", str(random.choice(sorted(os.sched_getaffinity(0))))),
            *(program(), "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"),
            *("-smp", str(config.cpus), "-m", f"{config.memory_bytes >> 20}M"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(self._kernel), "-initrd", str(self._initramfs), "-append", _CMDLINE),
            *("-chardev", f"file,id=console,path={_option(self._console)}", "-serial", "chardev:console"),
            # Not serial ports: these are fast, carry every byte unchanged, and no kernel message gets in.
            *("-device", "virtio-serial-pci"),
            # Not "stdio": the end of QEMU's empty standard input would unplug the port.
            *("-chardev", "file,id=output,path=/dev/stdout", "-device", "virtserialport,nr=1,chardev=output"),
            *("-chardev", f"file,id=status,path={_option(self._status)}"),
            *("-device", "virtserialport,nr=2,chardev=status"),
            *("-virtfs", _virtfs(Path("/"), "hostroot") + ",readonly=on"),
        ]
        for tag, path in writable(config):
            argv += ["-virtfs", _virtfs(path, tag)]
        if config.network:
            forwards = "".join(f",hostfwd={forward}" for forward in config.forwards)
            argv += ["-netdev", f"user,id=net,{_NETWORK}{forwards}", "-device", "virtio-net-pci,netdev=net"]
        return argv


def program() -> str:
    """Return the QEMU that is used: ``AIOKVM_QEMU``, or the one that Debian's package has."""
    return os.environ.get("AIOKVM_QEMU", "qemu-system-x86_64")


def _virtfs(path: Path, tag: str) -> str:
    return f"local,path={_option(path)},mount_tag={tag},security_model=none,multidevs=remap"


def _option(path: Path) -> str:
    return str(path).replace(",", ",,")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
