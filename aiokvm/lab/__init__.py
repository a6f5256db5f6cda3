"""The lab: a command run in a throwaway machine that has a real KVM, on any host and without privileges.

QEMU's TCG emulates a CPU with AMD-V; Debian's generic kernel runs on it, loads kvm_amd and sees the host's
root file system through 9p, under an overlay that takes the writes. Bochs emulates a CPU with VT-x; Debian's
cloud kernel runs on it, loads kvm_intel and has copies of the host's files.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread

from aiokvm import images
from aiokvm.arguments import checked
from aiokvm.errors import LabError
from aiokvm.lab import bochs, qemu
from aiokvm.lab.config import LabConfig, own_archive
from aiokvm.process import temporary_folder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["LabConfig", "needed", "run"]


@checked
def needed(cpu: Literal["amd", "intel"] = "amd") -> list[str]:
    """Return the Debian packages that the lab with that CPU needs and the machine lacks."""
    present = {
        "apt": shutil.which("apt-get") is not None,
        "dpkg": shutil.which("dpkg-deb") is not None,
    }
    if cpu == "amd":
        firmware = [Path(folder, "bios-256k.bin") for folder in ("/usr/share/seabios", "/usr/share/qemu")]
        present |= {
            "qemu-system-x86": shutil.which(qemu.program()) is not None,
            # A QEMU of the user's own brings its firmware.
            "seabios": "AIOKVM_QEMU" in os.environ or any(path.is_file() for path in firmware),
            "util-linux": shutil.which("taskset") is not None,
        }
    else:
        compiler = images.path("bochs") is not None or bool(shutil.which("g++") and shutil.which("make"))
        present |= {
            "build-essential": compiler,
            "grub-common": shutil.which("grub-mkrescue") is not None,
            "grub-pc-bin": bochs.GRUB.is_dir(),
            "seabios": bochs.VGA_BIOS.is_file(),
            "squashfs-tools": shutil.which("mksquashfs") is not None,
            "xorriso": shutil.which("xorriso") is not None,
        }
    return [package for package, there in present.items() if not there]


@checked
async def run(
    command: Sequence[str],
    config: LabConfig | None = None,
    *,
    output: Callable[[bytes], Awaitable[None] | None],
    read_input: Callable[[int], Awaitable[bytes]] | None = None,
    progress: Callable[[images.Progress], None] | None = None,
) -> int:
    """Run a command as root in the lab and return its exit status (128 + the signal that ended it).

    ``output`` gets what the command writes, standard output and error together, byte for byte as it comes;
    ``read_input`` is asked for some of its standard input, so many bytes at most, and gives none at the end;
    without it there is none. The first call fetches a kernel, telling ``progress``. The environment variable
    ``AIOKVM_QEMU`` names another QEMU than ``qemu-system-x86_64``. Cancelling ends the machine.

    Raises ``ConfigError`` for a configuration that cannot work, ``ImageError`` if the kernel or the emulator
    cannot be had, ``LabError`` if a package is missing or the machine ends without an exit status,
    ``TimeoutError``.
    """
    config = config or LabConfig()
    own = await anyio.to_thread.run_sync(own_archive, command, config)
    if missing := needed(config.cpu):
        raise LabError(f"the lab needs packages that are not installed: apt-get install {' '.join(missing)}")

    async def pull(*names: str) -> list[Path]:
        return [await images.pull(name, progress=progress) for name in names]

    async with temporary_folder() as temporary:
        folder = temporary.path
        machine: qemu.Machine | bochs.Machine
        if config.cpu == "amd":
            kernel, busybox, modules = await pull("generic-elf", "busybox", "lab-modules")
            machine = qemu.Machine(folder, kernel, config)
            await anyio.to_thread.run_sync(machine.write_initramfs, busybox, modules, own)
        else:
            program, bios, kernel, busybox, modules = await pull(
                "bochs", "bochs-bios", "cloud", "busybox", "intel-lab-modules"
            )
            machine = bochs.Machine(folder, program, config)
            await anyio.to_thread.run_sync(machine.write_cd, bios, kernel, busybox, modules, own)
            await machine.prepare()
        with anyio.fail_after(config.timeout):
            return await machine.run(output, read_input or _no_input)


async def _no_input(_: int) -> bytes:
    return b""
