"""What a command in the lab is given: its configuration, and the initramfs that follows from it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aiokvm import images
from aiokvm.arguments import checked_init
from aiokvm.errors import ConfigError
from aiokvm.images.initramfs import command_line, quote
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

INIT = Path(__file__).with_name("init")
MACHINES = {"amd": INIT.with_name("machine-qemu"), "intel": INIT.with_name("machine-bochs")}
"""What `INIT` does in ways that depend on the emulator."""

# Less than this does not hold the kernel, the initramfs and its copy.
MIN_MEMORY_BYTES = 256 << 20
# With the cache's place: what has been fetched need not be fetched there, where there may be no network.
_PASSED_ON = ("HOME", "PATH", "LANG", "TERM", "AIOKVM_CACHE", "XDG_CACHE_HOME")
_DEFAULT_ENV = {
    "HOME": "/root",
    "TERM": "dumb",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}


@checked_init
@dataclass(frozen=True)
class LabConfig:
    """How a command runs in the lab.

    ``cpu`` is "amd" (AMD-V, by QEMU) or "intel" (VT-x, by Bochs, which is compiled the first time), ``kvm``
    are parameters of the module kvm_amd or kvm_intel, such as ``{"ept": "0"}``. All ``cpus`` are emulated by
    one of the host's (docs/hosts.md). ``timeout`` is in seconds from the start of the machine. ``writable``
    are directories of the host that writes go through to; all other writes are gone at the end. ``workdir``
    is the current directory if None. ``env`` is added to ``HOME``, ``PATH``, ``LANG``, ``TERM``,
    ``AIOKVM_CACHE`` and ``XDG_CACHE_HOME`` of the caller and ``LAB=1``. ``network`` lets the lab reach what
    the host reaches, by QEMU's NAT; ``forwards`` lead ports of the host to the lab's, each as QEMU's
    ``hostfwd`` has it.

    The Intel lab has one CPU, no network, nothing writable, and not all of the host's files: those of
    `intel_files`, and ``include``.
    """

    memory_bytes: int = 3 << 30
    cpus: int = 1
    timeout: float | None = None
    writable: tuple[Path, ...] = ()
    workdir: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    network: bool = False
    forwards: tuple[str, ...] = ()
    cpu: Literal["amd", "intel"] = "amd"
    kvm: Mapping[str, str] = field(default_factory=dict)
    include: tuple[Path, ...] = ()


def own_archive(command: Sequence[str], config: LabConfig) -> bytes:
    """Return the part of the initramfs that differs from run to run; ``ConfigError`` if it cannot be made."""
    if config.cpus < 1:
        raise ConfigError(f"a machine needs 1 CPU at least, not {config.cpus}")
    if config.memory_bytes < MIN_MEMORY_BYTES:
        raise ConfigError(
            f"the lab needs {MIN_MEMORY_BYTES} bytes of memory at least, not {config.memory_bytes}"
        )
    if config.cpu == "intel":
        _check_intel(config)
    mounts = b"".join(b"writable %b %b\n" % (quote(tag), quote(str(path))) for tag, path in writable(config))
    return cpio.archive(
        [
            cpio.directory("lab"),
            cpio.file("init", INIT.read_bytes(), 0o755),
            cpio.file("lab/machine", MACHINES[config.cpu].read_bytes()),
            cpio.file("lab/modules", _modules(config)),
            cpio.file("lab/writable", mounts),
            cpio.file("lab/command", _script(command, config)),
        ]
    )


def base_archive(busybox: Path) -> bytes:
    """Return the part of the initramfs that is the same in every run."""
    return cpio.archive(
        [
            *map(cpio.directory, ("bin", "dev", "proc", "sys", "lower", "upper", "root")),
            cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
        ]
    )


def _check_intel(config: LabConfig) -> None:
    """Refuse what the Intel lab has not."""
    if config.cpus != 1:
        raise ConfigError(f"the Intel lab has 1 CPU, not {config.cpus}")
    if config.network or config.forwards:
        raise ConfigError("the Intel lab has no network")
    if config.writable:
        raise ConfigError(
            f"the Intel lab cannot write to {config.writable[0]}: it has copies of the host's files"
        )


def _modules(config: LabConfig) -> bytes:
    """Return the modules to load, each with its parameters."""
    for name, value in config.kvm.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not re.fullmatch(r"[A-Za-z0-9,_.-]+", value):
            raise ConfigError(f"{name}={value} is no parameter that a module can have, such as ept=0")
    vendor = f"kvm-{config.cpu}"
    names = images.LAB_MODULES if config.cpu == "amd" else images.INTEL_LAB_MODULES
    options = "".join(f" {name}={value}" for name, value in config.kvm.items())
    return "".join(f"{name}{options if name == vendor else ''}\n" for name in names).encode()


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


def writable(config: LabConfig) -> list[tuple[str, Path]]:
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
