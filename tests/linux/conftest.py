"""Real Linux guests. The kernels are Debian's; the initramfs is the project's own."""

from __future__ import annotations

import random
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aiokvm import VM, boot, images
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    LinuxBooter = Callable[..., AbstractAsyncContextManager["Guest"]]

# A boot takes 5 s in a quiet lab. This is for one whose processors are shared.
BOOT_S = 240.0
COMMAND_S = 120.0
# A byte of output takes 0.25 ms in a quiet lab, one of input 1.5 ms.
BLOB_BYTES = 20_000

# A shell that neither echoes nor edits, and tells the status of each line that it was given.
SHELL = (
    rb"""exec sh -c 'stty -echo -onlcr; while printf "\001%d\n" $?; IFS= read -r x; do eval "$x"; done'"""
    b"\n"
)

# What a kernel says when something is wrong, for its grep.
_TROUBLE = (
    "WARNING: |BUG: |Oops|Firmware Bug|BIOS bug|ACPI (Error|Warning|BIOS)|stalls? on|stuck for|nobody cared|"
    "protection fault|unchecked MSR|lost interrupt"
)
# With any monitor: what TCG says of XSAVE in CPUID leaf 0xd is not what its XCR0 allows, and KVM passes it
# on. Warnings are followed by a trace, which says nothing more to a test. On a Skylake a kernel warns of
# what such a processor lets leak, too.
_HARMLESS = "fpu__init_system_xstate|RETBleed"


class Guest:
    """A machine with Linux in it; ``log`` is its console until the shell came."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self.log = ""

    async def boot(self) -> None:
        """Wait for the shell, and make it one that does not echo."""
        log = await self.vm.serial.expect(b"aiokvm: init ", BOOT_S)
        log += await self.vm.serial.expect(b"# ", COMMAND_S)
        self.log = log.decode(errors="replace").replace("\r\n", "\n")
        await self.vm.serial.send(SHELL)
        await self.vm.serial.expect(b"\0010\n", COMMAND_S)

    async def run(self, command: str, timeout: float = COMMAND_S) -> str:
        """What a line of shell writes to the console, without the last newline; its status has to be 0."""
        await self.vm.serial.send(command.encode() + b"\n")
        return await self.finished(timeout)

    async def finished(self, timeout: float = COMMAND_S) -> str:
        """What the line of shell that is running still writes."""
        output = await self.vm.serial.expect(re.compile(rb"\001\d+\n"), timeout)
        text, _, status = output.decode().rpartition("\001")
        assert status == "0\n", f"the guest's command ended with status {status}: {text}"
        return text.removesuffix("\n")

    async def troubles(self) -> list[str]:
        """The lines of the kernel's log that tell of something wrong."""
        lines = await self.run(f"dmesg | grep -E '{_TROUBLE}' | grep -vE '{_HARMLESS}'; true")
        return lines.splitlines()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One loop; booting is tested on all of them."""
    return "asyncio"


async def image(name: str) -> Path:
    """The path of an image; it was verified when it was fetched."""
    return images.path(name) or await images.pull(name)


@asynccontextmanager
async def _boot_linux(
    kernel: str | Path = "cloud",
    *,
    initrd: Path | None = None,
    cmdline: str = "console=ttyS0 quiet panic=-1",
    cpus: int = 1,
    memory: int | str = "512M",
    **devices: Any,
) -> AsyncIterator[Guest]:
    name = kernel if isinstance(kernel, str) else "cloud-elf"
    linux = boot.Linux(
        await image(name) if isinstance(kernel, str) else kernel,
        initrd or await image(images.find(name).initramfs),
        cmdline,
    )
    async with await VM.create(boot=linux, cpus=cpus, memory=memory, **devices) as vm:
        await vm.start()
        guest = Guest(vm)
        await guest.boot()
        yield guest


@pytest.fixture(scope="session")
def boot_linux() -> LinuxBooter:
    """Boots a kernel (an image's name, or the path of an ELF vmlinux of the cloud kernel) to its shell."""
    return _boot_linux


@pytest.fixture(scope="session")
def blob() -> bytes:
    """Bytes that no one would guess."""
    return random.Random(1).randbytes(BLOB_BYTES)


@pytest.fixture(scope="module")
async def guest(blob: bytes, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    """One guest with two vCPUs and ``/blob``, for a module's tests that leave it as it was."""
    initrd = tmp_path_factory.mktemp("linux") / "initrd"
    archive = cpio.archive([cpio.file("blob", blob)])
    initrd.write_bytes(cpio.join((await image("initramfs")).read_bytes(), archive))
    async with _boot_linux(initrd=initrd, cpus=2) as guest:
        yield guest
