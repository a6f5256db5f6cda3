"""``aiokvm run``: a Linux machine on this terminal."""

from __future__ import annotations

import json
import logging
import os
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import IO, TYPE_CHECKING, Literal, Protocol

import anyio
import click
from anyio import to_thread

import aiokvm
from aiokvm import VM, AiokvmError, ConfigError, Exit, ExitReason, SerialClosedError
from aiokvm.aio import current_loop
from aiokvm.cli import common, disks, nets
from aiokvm.cli.console import Console, InitWatch, Output, follow_size, raw_terminal, takes_input
from aiokvm.cli.typed import WindowSize
from aiokvm.machine.build import boot_plan
from aiokvm.machine.config import Config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from aiokvm.block import DiskOption
    from aiokvm.cli.common import Interrupts
    from aiokvm.cli.console import File
    from aiokvm.cli.nets import Forward, NetOption
    from aiokvm.images import Image

CMDLINE = "console=ttyS0 panic=-1 quiet loglevel=3"
KERNEL = "cloud"
# How long a guest may take to turn itself off at a signal.
_GRACE_S = 5.0
# How long the last output of a guest that was killed may take.
_DRAIN_S = 1.0

_STATUS = {
    ExitReason.SHUTDOWN: 0,
    ExitReason.RESET: common.STATUS_RESET,
    ExitReason.CRASH: common.STATUS_CRASH,
    ExitReason.ERROR: common.STATUS_KVM_ERROR,
    ExitReason.KILLED: common.STATUS_INTERRUPTED,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command, as given."""

    kernel: str | None
    initrd: str | None
    append: str
    cpus: int
    memory: int
    name: str
    as_json: bool
    timeout: float | None
    lab: Literal["auto", "always", "never"]
    log: Path | None
    trace: Path | None
    command: tuple[str, ...]
    disks: tuple[DiskOption, ...] = ()
    nets: tuple[NetOption, ...] = ()
    forwards: tuple[Forward, ...] = ()
    pcap: Path | None = None
    rng: bool = False
    balloon: bool = False
    overcommit: bool = False
    reboot: bool = False
    framed: bool = False

    @property
    def cmdline(self) -> str:
        """The kernel's command line."""
        return " ".join(filter(None, (CMDLINE, disks.root(self.disks, self.append), self.appended)))

    @property
    def appended(self) -> str:
        """What follows, with the size of this terminal: a serial port cannot tell it."""
        if not os.isatty(0) or self.command or "aiokvm.tty=" in self.append:
            return self.append
        cols, rows = os.get_terminal_size(0)
        return f"{self.append} aiokvm.tty={rows}x{cols}".strip() if cols and rows else self.append


@dataclass
class Report:
    """What ``--json`` prints. ``reason`` is a value of `ExitReason`, None if no machine ended."""

    name: str | None = None
    kernel: str | None = None
    lab: bool = False
    reason: str | None = None
    code: int | None = None
    detail: str = ""
    status: int = common.STATUS_FAILED
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of a step."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(perf_counter() - start, 3)

    def ended(self, exit: Exit) -> None:  # noqa: A002
        """Take over how the machine ended."""
        self.reason, self.code = exit.reason.value, exit.code
        self.detail = exit.detail or self.detail


class Machine(Protocol):
    """Where the guest runs."""

    async def run(self, console: Console) -> int:
        """Run it to its end and return the exit status; being cancelled ends it, too."""

    async def send(self, data: bytes) -> None:
        """Type something."""

    async def resize(self, rows: int, cols: int) -> None:
        """The terminal has another size."""


_EPILOG = """\b
aiokvm run                                  a shell; poweroff -f ends it
aiokvm run -c 2 -m 1G -- nproc              one command
aiokvm run --kernel ./bzImage --initrd initramfs -- dmesg
aiokvm run --kernel ./bzImage --initrd ./rootfs.cpio --append "root=/dev/ram0"
aiokvm run --disk debian.img                boot from a disk: aiokvm images build debian
aiokvm run --net user -p 8080:80            a NAT, and localhost:8080 is the guest's port 80
aiokvm run --json --timeout 30 -- sh -c 'exit 3' 2>/dev/null

\b
Exit status:
  0        the guest shut down
  0-255    the command's, or what the guest wrote to port 0xf4
  75       the guest reset the machine, which a panic does, too, and a triple fault
  124      the timeout
  125      aiokvm failed; standard error says why
  130      Ctrl-]
  134      the guest said that it crashed
  135      KVM could not run the guest any further
  128 + N  ended by signal N
"""


@click.command(context_settings={"allow_interspersed_args": False}, epilog=_EPILOG)
@click.option("--kernel", metavar="K", help=f"A bzImage or vmlinux, or the name of an image.  [{KERNEL}]")
@click.option("--initrd", metavar="I", help="An initramfs, or the name of an image.  [the kernel's own]")
@click.option(
    "--disk",
    "disks",
    metavar="PATH[,ro][,format=F]",
    type=disks.parse,
    multiple=True,
    help="A virtio disk: raw, or as its name or F says (qcow2, vmdk, vdi, vhdx); or an NBD URI. Repeat it.",
)
@click.option(
    "--net",
    "nets",
    metavar="user|tap:NAME|stream:PATH",
    type=nets.parse,
    multiple=True,
    help="A network adapter: behind a NAT, at a TAP device, at passt's or QEMU's socket. Repeat it.",
)
@click.option(
    "-p",
    "--publish",
    "forwards",
    metavar="[ADDR:]PORT:PORT[/udp]",
    type=nets.parse_forward,
    multiple=True,
    help="Lead a port of this host (of 127.0.0.1 unless ADDR says) to one of the guest, with --net user.",
)
@click.option(
    "--pcap",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Record the packets of all adapters, as pcapng.",
)
@click.option("--rng", is_flag=True, help="Give the guest the host's randomness.")
@click.option("--balloon", is_flag=True, help="Let the guest report memory that it does not use.")
@click.option("--reboot", is_flag=True, help="Boot again when the guest resets the machine.")
@click.option("--overcommit", is_flag=True, help="Allow more RAM than this host has.")
@click.option("--append", metavar="S", default="", help=f'What follows "{CMDLINE}" on the command line.')
@click.option("-c", "--cpus", type=click.IntRange(min=1), default=1, show_default=True, help="vCPUs.")
@click.option("-m", "--memory", type=common.size, default="512M", show_default=True, help="RAM.")
@click.option("--name", default="", help="What the machine's threads and messages are called.")
@click.option("--json", "as_json", is_flag=True, help="Print a report at the end; console to stderr.")
@click.option(
    "--timeout",
    metavar="S",
    type=common.seconds,
    help="Kill the machine that many seconds after its start.",
)
@click.option(
    "--lab",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Run in the lab, an emulated machine with a KVM: where this one's cannot run Linux, or always.",
)
@click.option(
    "--log",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the console's output to a file, too.",
)
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Record what the guest does at devices; aiokvm trace FILE shows it.",
)
@click.option("--framed", is_flag=True, hidden=True)  # standard input is as `typed.Frames` takes it apart
@click.argument("command", metavar="[-- CMD [ARG]...]", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(ctx: click.Context, /, **given: object) -> None:
    """Boot Linux on this terminal.

    With no kernel named, Debian's cloud kernel and a busybox initramfs: fetched once, then cached. See
    `aiokvm images list` for the others. With a disk, the kernel and initramfs that were built with it, if it
    was by `aiokvm images build`, and the system on the first disk, unless --append has another root=. With a
    command, the guest runs it instead of a shell or that system, its output is all that goes to standard
    output, and its exit status is aiokvm's.

    On a terminal every key goes to the guest; Ctrl-] kills the machine and leaves. Other input is passed on
    as it comes; its end does not end the machine. SIGTERM, SIGINT and SIGHUP press the power button, 5
    seconds or a second signal later they kill.
    """
    options = Options(**given)  # type: ignore[arg-type]
    report = Report(name=options.name or None)
    # Standard error has the console if all output is one; warnings are part of the report then.
    warnings = common.Warnings(logging.WARNING, on_stderr=not options.framed)
    logging.getLogger("aiokvm").addHandler(warnings)
    check_command(options)
    nets.check(options.nets, options.forwards, options.pcap)

    async def work(interrupts: Interrupts) -> int:
        try:
            return await _run(options, report, interrupts, warnings)
        except BrokenPipeError:
            raise
        except (AiokvmError, OSError) as error:
            report.detail = common.describe(error)
            if options.framed:  # Who has started this one says so: here all output is one.
                return common.STATUS_FAILED
            raise

    try:
        report.status = common.execute(work)
    finally:
        logging.getLogger("aiokvm").removeHandler(warnings)
    if options.as_json:
        click.echo(json.dumps(asdict(report)))
    elif report.status == common.STATUS_TIMEOUT:
        common.say(report.detail)
    elif report.reason == ExitReason.RESET.value:
        # The registers of a triple fault have been logged.
        common.say(f"the guest has asked for a reset: {report.detail.partition(';')[0]}")
    ctx.exit(report.status)


def check_command(options: Options) -> None:
    """Raise a usage error for a command that the initramfs cannot be told."""
    if not options.command:
        return
    if options.initrd is None and options.kernel and _is_misspelt(options.kernel):
        return  # That there is no such kernel is what has to be said.
    if not _takes_command(options):
        from aiokvm import images

        ours = ", ".join(image.name for image in images.catalogue() if image.kind == "initramfs")
        given = f"--initrd {options.initrd}" if options.initrd else "a kernel of your own without --initrd"
        raise click.UsageError(f"{given} cannot be told a command: only these initramfs images can: {ours}")


def _takes_command(options: Options) -> bool:
    """Tell whether the initramfs is one of ours."""
    initrd = _initramfs_name(options)
    if initrd is None:
        return False
    if (built := disks.built(options.disks)) and Path(initrd).absolute() == built.initrd:
        return True
    image = _image(initrd)
    return image is not None and image.kind == "initramfs"


def _initramfs_name(options: Options) -> str | None:
    """Return the initrd as given, else the name of the one that belongs to the kernel, else None."""
    if options.initrd is not None:
        return options.initrd
    if options.kernel is None and (built := disks.built(options.disks)):
        return str(built.initrd)
    kernel = _image(options.kernel or KERNEL)
    return kernel.initramfs or None if kernel else None


def _image(name: str) -> Image | None:
    """Return the image of that name; None if there is none, so that it is a path."""
    # A path needs no catalogue, which takes long to import in the lab.
    if os.sep in name:
        return None
    from aiokvm import images

    return next((image for image in images.catalogue() if image.name == name), None)


async def _run(options: Options, report: Report, interrupts: Interrupts, warnings: common.Warnings) -> int:
    # Before anything is fetched, and before a lab that would need as much is started.
    if not options.overcommit:
        aiokvm.check_memory(options.memory)
    disks.check(options.disks)
    why_lab = _why_lab(options)
    report.lab = why_lab is not None
    if report.lab:
        disks.lab_directories(options.disks)
        nets.lab_forwards(options.nets, options.forwards)
    async with AsyncExitStack() as stack:
        with report.step("fetch"):
            built = disks.built(options.disks) if options.kernel is None else None
            kernel = built.kernel if built else await _file(options.kernel or KERNEL, "kernel", "elf")
            report.kernel = str(kernel)
            name = _initramfs_name(options)
            initrd = None if name is None else await _file(name, "initramfs")
            if options.command:
                assert initrd is not None
                data = await to_thread.run_sync(_with_command, initrd, options.command)
                initrd = await stack.enter_async_context(_temporary(data))
        linux = aiokvm.boot.Linux(kernel, initrd, options.cmdline)
        if report.lab:
            description = Config(
                boot=linux, cpus=options.cpus, memory_bytes=options.memory, name=options.name
            )
            await boot_plan(current_loop(), description)  # for what it raises
        trace = _writer(stack.enter_context(options.trace.open("wb"))) if options.trace else None
        machine: Machine
        if report.lab:
            if why_lab:
                common.say(f"{why_lab}: running in the lab, an emulated machine (--lab never forbids it)")
            if options.pcap:
                # Where it is copied to at the end.
                options.pcap.open("wb").close()
            from aiokvm.cli.inlab import InLab

            machine = InLab(options, kernel, initrd, report)
        else:
            machine = Here(options, linux, report, interrupts, trace)
        log = None
        if options.log:
            import aiofiles  # type: ignore[import-untyped]

            log = await stack.enter_async_context(aiofiles.open(options.log, "wb", buffering=0))
        return await _attend(machine, options, log, _takes_command(options), warnings)


def _path(name: str, kinds: tuple[str, ...]) -> Path:
    """Return the absolute path. Raises ConfigError if it looks like a misspelt image."""
    if _is_misspelt(name):
        from aiokvm import images

        names = ", ".join(image.name for image in images.catalogue() if image.kind in kinds)
        raise ConfigError(f"{name} is neither a file nor one of the images {names}")
    return Path(name).absolute()


def _is_misspelt(name: str) -> bool:
    """Tell whether it looks like the name of an image, and is neither that of one nor a file."""
    return os.sep not in name and _image(name) is None and not Path(name).exists()


async def _file(name: str, *kinds: str) -> Path:
    """Return the path of what is named, an image of one of ``kinds`` after fetching it."""
    image = _image(name)
    if image is None:
        return _path(name, kinds)
    if image.kind not in kinds:
        raise ConfigError(f"the image {name} ({image.summary}) is no {kinds[0]}")
    from aiokvm import images
    from aiokvm.cli.progress import Fetching

    with Fetching() as progress:
        return await images.pull(name, progress=progress)


@asynccontextmanager
async def _temporary(data: bytes) -> AsyncIterator[Path]:
    from aiokvm.process import temporary_folder

    async with temporary_folder() as folder:
        path = folder.path / "initrd"
        await to_thread.run_sync(path.write_bytes, data)
        yield path


def _with_command(initrd: Path, command: tuple[str, ...]) -> bytes:
    """Return the initramfs with what makes its init run the command."""
    from aiokvm import images

    archive = images.command_archive(command)
    data = initrd.read_bytes()
    # Linux looks for the next archive where it is aligned to 4 bytes.
    return data + bytes(-len(data) % 4) + archive


def _writer(file: IO[bytes]) -> Callable[[bytes], object]:
    """Return what writes a chunk, so that it is in the file even if this process is killed."""

    def write(chunk: bytes) -> None:
        file.write(chunk)
        file.flush()

    return write


def _why_lab(options: Options) -> str | None:
    """Return why the machine is to run in the lab, in words unless that was asked for; None: it runs here."""
    if options.lab != "auto":
        return "" if options.lab == "always" else None
    from aiokvm.cli.host import why_lab

    return why_lab() or None


class Here:
    """The machine in this process."""

    def __init__(
        self,
        options: Options,
        linux: aiokvm.boot.Linux,
        report: Report,
        interrupts: Interrupts,
        trace: Callable[[bytes], object] | None,
    ) -> None:
        self._options = options
        self._linux = linux
        self._report = report
        self._interrupts = interrupts
        self._trace = trace
        self._vm: VM | None = None
        self._window = WindowSize()

    async def run(self, console: Console) -> int:
        options, report = self._options, self._report
        with report.step("create"):
            vm = await VM.create(
                boot=self._linux,
                cpus=options.cpus,
                memory=options.memory,
                name=options.name,
                disks=[disks.backend(option) for option in options.disks],
                nets=nets.backends(options.nets, options.forwards, options.pcap),
                rng=options.rng,
                balloon=options.balloon,
                overcommit=options.overcommit,
                on_reset="reboot" if options.reboot else "exit",
            )
        report.name = vm.name
        try:
            async with vm, AsyncExitStack() as stack:
                self._vm = vm
                if self._trace is not None:
                    await stack.enter_async_context(vm.trace(self._trace))
                with report.step("run"):
                    return await self._run(vm, console)
        finally:
            self._interrupts.gently = None
            if vm.exit:
                report.ended(vm.exit)

    async def _run(self, vm: VM, console: Console) -> int:
        await vm.start()
        console.open()
        self._interrupts.gently = lambda: vm.stop(_GRACE_S)
        timeout = self._options.timeout
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._window.tell, vm.serial_ports[1])
            with anyio.move_on_after(timeout) as scope:
                await _show_all(vm, console)
            tasks.cancel_scope.cancel()
        if scope.cancelled_caught:
            await vm.kill()
            with anyio.move_on_after(_DRAIN_S):
                await _show_all(vm, console)
            self._report.detail = f"the machine did not end within {timeout:g} s"
            return common.STATUS_TIMEOUT
        end = await vm.wait()
        return _STATUS[end.reason] if end.code is None else end.code & 0xFF

    async def send(self, data: bytes) -> None:
        if self._vm:
            with suppress(SerialClosedError):
                await self._vm.serial.send(data)

    async def resize(self, rows: int, cols: int) -> None:
        self._window.set(rows, cols)


async def _show_all(vm: VM, console: Console) -> None:
    while data := await vm.serial.read():
        await console.show(data)
    await console.end()


async def _attend(
    machine: Machine,
    options: Options,
    log: File | None,
    ours: bool,
    warnings: common.Warnings,
) -> int:
    """Run the machine with this process's console, and return the exit status."""
    is_terminal = os.isatty(0) and takes_input(0)
    left = False
    status = common.STATUS_BROKEN_PIPE
    with ExitStack() as stack:
        boot_output = stack.enter_context(closing(Output(2)))
        output = stack.enter_context(closing(Output(2 if options.as_json else 1)))
        watch = None
        if ours:
            undo = bool(options.command) and not os.isatty(2 if options.as_json else 1)
            watch = InitWatch(command=bool(options.command), undo_onlcr=undo)
        console = Console(0, output, boot_output, log, watch, machine.resize if options.framed else None)
        if is_terminal:
            if not options.command:
                common.say("Ctrl-] leaves")
            stack.enter_context(raw_terminal(0))
            warnings.raw = True
            stack.callback(setattr, warnings, "raw", False)

        async def keyboard() -> None:
            nonlocal left
            left = await console.keyboard(machine.send)
            if left:
                tasks.cancel_scope.cancel()

        with suppress(BrokenPipeError), common.ungrouped():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(keyboard)
                if is_terminal:
                    tasks.start_soon(follow_size, 0, machine.resize)
                status = await machine.run(console)
                tasks.cancel_scope.cancel()
    if left:
        common.say("left; the machine is killed")
    return common.STATUS_INTERRUPTED if left else status
