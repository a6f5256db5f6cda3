"""The lab: a command run in a throwaway machine that has a real kvm_amd, on any host and without privileges.

QEMU's TCG emulates a CPU with AMD-V; Debian's generic kernel runs on it, loads kvm_amd and sees the host's
root file system through 9p, under an overlay that takes the writes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from aiokvm import images
from aiokvm.errors import LabError
from aiokvm.lab import qemu
from aiokvm.lab.config import LabConfig, own_archive

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["LabConfig", "needed", "run"]


def needed() -> list[str]:
    """Return the Debian packages that the lab needs and the machine lacks."""
    firmware = [Path(folder, "bios-256k.bin") for folder in ("/usr/share/seabios", "/usr/share/qemu")]
    present = {
        "qemu-system-x86": shutil.which(qemu.program()) is not None,
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
    own = await anyio.to_thread.run_sync(own_archive, command, config)
    if missing := needed():
        raise LabError(f"the lab needs packages that are not installed: apt-get install {' '.join(missing)}")
    kernel, busybox, modules = [
        await images.pull(name, progress=progress) for name in ("generic-elf", "busybox", "lab-modules")
    ]
    with tempfile.TemporaryDirectory(prefix="aiokvm-lab-") as folder:
        machine = qemu.Machine(Path(folder), kernel, config)
        await anyio.to_thread.run_sync(machine.write_initramfs, busybox, modules, own)
        with anyio.fail_after(config.timeout):
            return await machine.run(output)
