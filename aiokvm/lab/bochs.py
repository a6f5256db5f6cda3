"""The lab's machine on Bochs, which emulates a CPU with VT-x."""

from __future__ import annotations

import os
import tty
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from aiokvm.errors import ImageError, LabError
from aiokvm.images.initramfs import elf
from aiokvm.images.process import run
from aiokvm.lab.config import base_archive
from aiokvm.lab.emulator import CONSOLE, beside, died, emulate
from aiokvm.lab.files import intel_files, write_squashfs
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokvm.lab.config import LabConfig

VGA_BIOS = Path("/usr/share/seabios/vgabios-stdvga.bin")
GRUB = Path("/usr/lib/grub/i386-pc")
# Bochs does not tell a reset from a power-on: what restarts the machine is to end in a triple fault, and that
# ends the program.
_CMDLINE = "console=ttyS0,115200 quiet panic=-1 reboot=t mitigations=off"
_GRUB = f"linux /boot/vmlinuz {_CMDLINE}\ninitrd /boot/initramfs\nboot\n"
# A host of 1000 MHz that is always on time: its clock counts instructions, and stands still for nothing else.
_CONFIG = """\
config_interface: textconfig
display_library: nogui
cpu: model=corei7_skylake_x, count=1, ips=1000000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none, time0=utc
memory: guest={memory}, host={host}
romimage: file=bios
vgaromimage: file=vgabios
boot: cdrom
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, mode=flat, path=files
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=cdrom, path=boot.iso, status=inserted
com1: enabled=1, mode=file, dev={console}
com2: enabled=1, mode=term, dev={terminal}
port_e9_hack: enabled=1
log: log
panic: action=fatal
error: action=ignore
info: action=ignore
"""
# Copies standard input to I/O port 0xe9, of which Bochs writes every byte to its standard output.
_PORT = bytes.fromhex(
    "b8ad000000 bfe9000000 6a01 5e 6a01 5a 0f05"  # ioperm(0xe9, 1, 1)
    "4881ec00100000"  # sub rsp, 4096
    "31c0 31ff 4889e6 ba00100000 0f05"  # read(0, rsp, 4096)
    "85c0 7e0e"  # test eax, eax; jle exit
    "89c1 4889e6 bae9000000 f36e"  # ecx, rsi, edx; rep outsb
    "ebe0"  # jmp read
    "6a3c 58 31ff 0f05"  # exit: exit(0)
)
_CHUNK_BYTES = 1024  # of input at once: the guest's serial port holds some more
_HOST_MB = 2048  # the most that Bochs keeps in its own memory; what is beyond goes into a file
_MORE = b"more"
_STATUS = b"status "
_LATE_S = 1.0


class Machine:
    """One Bochs with its files in ``folder``."""

    def __init__(self, folder: Path, program: Path, config: LabConfig) -> None:
        self._folder = folder
        self._program = program
        self._config = config
        self._status: int | None = None
        self._told = anyio.Event()

    def write_cd(self, bios: Path, kernel: Path, busybox: Path, modules: Path, own: bytes) -> None:
        """Write what the machine starts from; `prepare` makes a CD of it."""
        folder = self._folder
        (folder / "bios").symlink_to(bios)
        (folder / "vgabios").symlink_to(VGA_BIOS)
        boot = folder / "cd" / "boot"
        (boot / "grub").mkdir(parents=True)
        (boot / "grub" / "grub.cfg").write_text(_GRUB)
        (boot / "vmlinuz").write_bytes(kernel.read_bytes())
        port = cpio.archive([cpio.directory("lab"), cpio.file("lab/port", elf(_PORT, "amd64"), 0o755)])
        archives = (base_archive(busybox), modules.read_bytes(), port, own)
        (boot / "initramfs").write_bytes(cpio.join(*archives))

    async def prepare(self) -> None:
        """Make the CD, and the disk of the host's files. Raises ``ConfigError``, ``LabError``."""
        folder = self._folder
        workdir = self._config.workdir or Path.cwd()
        await write_squashfs(folder / "files", intel_files(workdir, self._config.include))
        try:
            await run(
                ["grub-mkrescue", "-d", str(GRUB), "-o", str(folder / "boot.iso"), str(folder / "cd")],
                env={"TMPDIR": str(folder)},
            )
        except ImageError as error:
            raise LabError(f"cannot make the CD that the Intel lab starts from: {error}") from error

    async def run(
        self,
        output: Callable[[bytes], Awaitable[None] | None],
        read_input: Callable[[int], Awaitable[bytes]],
    ) -> int:
        """Start it, pass output and input on until it ends, and return the command's exit status."""
        memory = self._config.memory_bytes >> 20
        with ExitStack() as stack:
            master, slave = os.openpty()
            stack.callback(os.close, slave)
            stack.callback(os.close, master)
            tty.setraw(slave)
            os.set_blocking(master, False)
            (self._folder / "config").write_text(
                _CONFIG.format(
                    memory=memory, host=min(memory, _HOST_MB), console=CONSOLE, terminal=os.ttyname(slave)
                )
            )
            async with beside(partial(self._serve, master, read_input)):
                argv = [str(self._program), "-q", "-f", "config"]
                status = await emulate(argv, self._folder, _AfterNul(output))
                # What was written to a terminal can be read there a little later.
                with anyio.move_on_after(_LATE_S):
                    await self._told.wait()
        if self._status is not None:
            return self._status
        raise died(f"ended with Bochs' status {status}", self._folder)

    async def _serve(self, terminal: int, read_input: Callable[[int], Awaitable[bytes]]) -> None:
        """Do what the lines say that the guest writes to its second serial port."""
        said = b""
        async with anyio.create_task_group() as tasks:
            while True:
                await anyio.wait_readable(terminal)
                said += os.read(terminal, _CHUNK_BYTES)
                *lines, said = said.split(b"\n")
                for line in lines:
                    status = line.removeprefix(_STATUS)
                    if line == _MORE:
                        # Beside: the status may come while there is nothing to read.
                        tasks.start_soon(self._send, terminal, read_input)
                    elif status != line and status.isdigit():
                        self._status = int(status)
                        self._told.set()

    async def _send(self, terminal: int, read_input: Callable[[int], Awaitable[bytes]]) -> None:
        """Send some input with its length before it, 0 at its end."""
        data = await read_input(_CHUNK_BYTES)
        rest = memoryview(b"%d\n%b" % (len(data), data))
        while rest:
            await anyio.wait_writable(terminal)
            with suppress(BlockingIOError):
                rest = rest[os.write(terminal, rest) :]


class _AfterNul:
    """Passes on what comes after the first byte that is zero."""

    def __init__(self, output: Callable[[bytes], Awaitable[None] | None]) -> None:
        self._output = output
        self._open = False

    def __call__(self, data: bytes) -> Awaitable[None] | None:
        if not self._open:
            _, found, data = data.partition(b"\0")
            self._open = bool(found)
        return self._output(data) if data else None
