"""The lab: a command run in a throwaway machine that has a real kvm_amd, on any host and without privileges.

QEMU's TCG emulates a CPU with AMD-V; Debian's generic kernel runs on it, loads kvm_amd and sees the host's
root file system through 9p, under an overlay that takes the writes.
"""

from __future__ import annotations

import inspect
import os
import random
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from aiokvm import images
from aiokvm.errors import ConfigError, LabError
from aiokvm.images.initramfs import command_line, quote
from aiokvm.images.process import child
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

__all__ = ["LabConfig", "needed", "run"]

INIT = Path(__file__).with_name("init")

# Less than this does not hold the kernel, the initramfs and its copy.
MIN_MEMORY_BYTES = 256 << 20
_CONSOLE_LINES = 15
_CHUNK_BYTES = 64 << 10
_PASSED_ON = ("HOME", "PATH", "LANG", "TERM")
_DEFAULT_ENV = {
    "HOME": "/root",
    "TERM": "dumb",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
# Not the network that a NAT of a guest's has by default. `init` has the same addresses.
_NETWORK = "net=10.77.0.0/24,host=10.77.0.2,dns=10.77.0.3,dhcpstart=10.77.0.15"
_CMDLINE = "console=ttyS0 quiet panic=-1 mitigations=off"


@dataclass(frozen=True)
class LabConfig:
    """How a command runs in the lab.

    All ``cpus`` are emulated by one of the host's (docs/hosts.md). ``timeout`` is in seconds from the start
    of the machine. ``writable`` are directories of the host that writes go through to; all other writes are
    gone at the end. ``workdir`` is the current directory if None. ``env`` is added to ``HOME``, ``PATH``,
    ``LANG`` and ``TERM`` of the caller and ``LAB=1``. ``network`` lets the lab reach what the host reaches,
    by QEMU's NAT; ``forwards`` lead ports of the host to the lab's, each as QEMU's ``hostfwd`` has it.
    """

    memory_bytes: int = 3 << 30
    cpus: int = 1
    timeout: float | None = None
    writable: tuple[Path, ...] = ()
    workdir: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    network: bool = False
    forwards: tuple[str, ...] = ()


def needed() -> list[str]:
    """Return the Debian packages that the lab needs and the machine lacks."""
    firmware = [Path(folder, "bios-256k.bin") for folder in ("/usr/share/seabios", "/usr/share/qemu")]
    present = {
        "qemu-system-x86": shutil.which(_qemu()) is not None,
        # A QEMU of the user's own brings its firmware.
        "seabios": "AIOKVM_QEMU" in os.environ or any(path.is_file() for path in firmware),
        "apt": shutil.which("apt-get") is not None,
        "dpkg": shutil.which("dpkg-deb") is not None,
        "util-linux": shutil.which("taskset") is not None,
    }
    return [package for package, there in present.items() if not there]


async def run(
    command: Sequence[str],
    config: LabConfig | None = None,
    *,
    output: Callable[[bytes], Awaitable[None] | None],
    progress: Callable[[images.Progress], None] | None = None,
) -> int:
    """Run a command as root in the lab and return its exit status (128 + the signal that ended it).

    ``output`` gets what the command writes, standard output and error together, byte for byte as it comes;
    its standard input is empty. The first call fetches a kernel, telling ``progress``. The environment
    variable ``AIOKVM_QEMU`` names another QEMU than ``qemu-system-x86_64``. Cancelling ends the machine.

    Raises ``ConfigError`` for a configuration that cannot work, ``ImageError`` if the kernel cannot be had,
    ``LabError`` if QEMU is missing or the machine ends without an exit status, ``TimeoutError``.
    """
    config = config or LabConfig()
    own = await anyio.to_thread.run_sync(_own_archive, command, config)
    if missing := needed():
        raise LabError(f"the lab needs packages that are not installed: apt-get install {' '.join(missing)}")
    kernel, busybox, modules = [
        await images.pull(name, progress=progress) for name in ("generic-elf", "busybox", "lab-modules")
    ]
    with tempfile.TemporaryDirectory(prefix="aiokvm-lab-") as folder:
        machine = _Machine(Path(folder), kernel, config)
        await anyio.to_thread.run_sync(machine.write_initramfs, busybox, modules, own)
        with anyio.fail_after(config.timeout):
            return await machine.run(output)


class _Machine:
    """One QEMU with its files in ``folder``."""

    def __init__(self, folder: Path, kernel: Path, config: LabConfig) -> None:
        self._kernel = kernel
        self._config = config
        self._initramfs = folder / "initramfs"
        self._console = folder / "console"
        self._status = folder / "status"
        self._stderr = folder / "stderr"

    def write_initramfs(self, busybox: Path, modules: Path, own: bytes) -> None:
        base = cpio.archive(
            [
                *map(cpio.directory, ("bin", "dev", "proc", "sys", "lower", "upper", "root")),
                cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
            ]
        )
        self._initramfs.write_bytes(cpio.join(base, modules.read_bytes(), own))

    async def run(self, output: Callable[[bytes], Awaitable[None] | None]) -> int:
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
        raise LabError(
            "\n".join([f"the lab's machine {how} before the command had ended; its last words:", *lines])
        )

    def _argv(self) -> list[str]:
        config = self._config
        # On one processor of the host: at a #VMEXIT of its emulated AMD-V, QEMU changes what interrupts are
        # pending by an instruction that is not atomic, and would lose one that another thread raises then.
        argv = [
            *("taskset", "-c", str(random.choice(sorted(os.sched_getaffinity(0))))),
            *(_qemu(), "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"),
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
        for tag, path in _writable(config):
            argv += ["-virtfs", _virtfs(path, tag)]
        if config.network:
            forwards = "".join(f",hostfwd={forward}" for forward in config.forwards)
            argv += ["-netdev", f"user,id=net,{_NETWORK}{forwards}", "-device", "virtio-net-pci,netdev=net"]
        return argv


def _own_archive(command: Sequence[str], config: LabConfig) -> bytes:
    """Return the part of the initramfs that differs from run to run; ``ConfigError`` if it cannot be made."""
    if config.cpus < 1:
        raise ConfigError(f"a machine needs 1 CPU at least, not {config.cpus}")
    if config.memory_bytes < MIN_MEMORY_BYTES:
        raise ConfigError(
            f"the lab needs {MIN_MEMORY_BYTES} bytes of memory at least, not {config.memory_bytes}"
        )
    writable = b"".join(
        b"writable %b %b\n" % (quote(tag), quote(str(path))) for tag, path in _writable(config)
    )
    return cpio.archive(
        [
            cpio.directory("lab"),
            cpio.file("init", INIT.read_bytes(), 0o755),
            cpio.file("lab/modules", "".join(f"{name}\n" for name in images.LAB_MODULES).encode()),
            cpio.file("lab/writable", writable),
            cpio.file("lab/command", _script(command, config)),
        ]
    )


def _script(command: Sequence[str], config: LabConfig) -> bytes:
    """Return the shell script that sets the command's surroundings and becomes the command."""
    workdir = (config.workdir or Path.cwd()).absolute()
    if not workdir.is_dir():
        raise ConfigError(f"the working directory {workdir} is not a directory")
    caller = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    lines = []
    for name, value in (_DEFAULT_ENV | caller | {"LAB": "1"} | dict(config.env)).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"{name!r} is not a name that an environment variable can have")
        lines.append(b"export %b=%b" % (name.encode(), quote(value)))
    lines.append(b"cd %b || exit 126" % quote(str(workdir)))
    lines.append(b"exec " + command_line(command))
    return b"\n".join(lines) + b"\n"


def _writable(config: LabConfig) -> list[tuple[str, Path]]:
    """Return mount tag and path of each writable directory, outer ones before those inside them."""
    paths = sorted({path.resolve() for path in config.writable})
    for path in paths:
        if path == Path("/"):
            raise ConfigError(
                "the root directory cannot be writable in the lab: name the directories that shall be"
            )
        if not path.is_dir():
            raise ConfigError(f"{path} cannot be writable in the lab: it is not a directory")
    return [(f"writable{index}", path) for index, path in enumerate(paths)]


def _qemu() -> str:
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
