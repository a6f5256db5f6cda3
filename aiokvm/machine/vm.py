"""A virtual machine as programs create and use it."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from itertools import islice
from typing import TYPE_CHECKING, Literal

from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked, shown
from aiokvm.errors import AiokvmError, ConfigError, StateError
from aiokvm.machine.build import acpi_tables, boot_plan, build_hardware, load
from aiokvm.machine.config import MAX_MEMORY_BYTES, POLL_NS, Config, RngConfig
from aiokvm.machine.device import Device, ErrorPolicy, ModeName, Placement, PolicyName, RegionMode
from aiokvm.machine.emulated import holds_kernel
from aiokvm.machine.life import Life, VmState

# Not when it is asked for: then there may be no descriptor left to read it with.
from aiokvm.machine.limits import check_memory, named
from aiokvm.machine.peripherals import count as peripherals_count
from aiokvm.machine.peripherals import port_names
from aiokvm.machine.virtio import places
from aiokvm.size import parse_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from types import TracebackType
    from typing import Self

    from aiokvm.aio import Loop
    from aiokvm.block import BlockBackend
    from aiokvm.boot import BootProtocol
    from aiokvm.machine import events
    from aiokvm.machine.attachments import Attachment
    from aiokvm.machine.balloon import MemoryBalloon
    from aiokvm.machine.console import SerialConsole
    from aiokvm.machine.disks import Disk, VmDisk
    from aiokvm.machine.events import Exit
    from aiokvm.machine.nets import VmNic
    from aiokvm.machine.ports import Consoles
    from aiokvm.machine.stats import VmStats
    from aiokvm.machine.trace import Trace
    from aiokvm.machine.vcpu import VirtualCpu
    from aiokvm.machine.virtio_host import VirtioAttachment
    from aiokvm.memory import GuestMemory
    from aiokvm.net import NetBackend, Nic
    from aiokvm.virtio.device import VirtioDevice


@owned
class VM:
    """A virtual machine inside the program; made by `VM.create`, used as an async context manager.

    All methods belong to the loop that created it, raise StateError on any other loop or thread, and are safe
    to cancel. Leaving the context ends the machine whatever state it is in, and gives back its threads,
    descriptors and memory.
    """

    def __init__(self, life: Life) -> None:
        self.name = life.name
        self._life = life

    @classmethod
    @checked
    async def create(
        cls,
        *,
        boot: BootProtocol,
        cpus: int = 1,
        memory: int | str = "512M",
        name: str = "",
        serial_ports: int = 2,
        hugepages: int | str | None = None,
        shared_memory: bool = False,
        overcommit: bool = False,
        on_reset: Literal["exit", "reboot"] = "exit",
        disks: Iterable[BlockBackend | Disk] = (),
        nets: Iterable[NetBackend | Nic] = (),
        devices: Iterable[Placement] = (),
        virtio: Iterable[VirtioDevice] = (),
        console: bool | str | Iterable[str] = False,
        rng: bool | RngConfig = False,
        balloon: bool = False,
        poll_ns: int = POLL_NS,
        log_unclaimed: bool = False,
    ) -> VM:
        """A machine that has everything in RAM and registers that it needs to start.

        ``boot`` says what runs in it: `boot.Linux` or `boot.Flat`. ``memory`` is in bytes, or with K, M, G or
        T. ``name`` is what its threads and log records carry; one is made up if it is empty. ``hugepages``
        ("2M" or "1G") takes the RAM from the host's reserved huge pages; ``shared_memory`` makes it a memfd,
        ``vm.memory.fd``, which another process can map. ``overcommit`` allows more ``memory`` than the host
        has. ``on_reset`` says what follows when the guest resets itself: the machine ends ("exit"), or it
        begins anew ("reboot"), its RAM as after power-on, its disks as they are. ``disks`` are what the guest
        has as virtio disks, in this order: `block.Raw` and other backends, as they are or as a `Disk`, which
        has options; they are opened here and closed with the machine. ``nets`` are its network adapters in
        the same way: a backend of `aiokvm.net`, as it is or as a `net.Nic`. ``devices`` are the program's
        own, as `Device.at` places them, ``virtio`` its virtio devices, as `attach_virtio` takes them.

        ``console`` gives the guest a virtio console: a terminal, hvc0, and a port of each name that is
        listed. ``rng`` gives it randomness of the host's, ``balloon`` lets it lend memory to the host.

        ``poll_ns`` is how long at most the loop and a vCPU poll for each other before they sleep: an exit
        costs least while they do, 0 spares the CPU time. ``log_unclaimed`` logs accesses to addresses where
        nothing is, ever more sparingly; each then waits for the loop.

        Raises ConfigError, BootError and KvmError, and leaves nothing behind. The ConfigError for a limit of
        the host that is too low names it, its value and what to do; `check_limits` tells before.
        """
        devices, disks, nets, virtio = tuple(devices), tuple(disks), tuple(nets), tuple(virtio)
        if isinstance(boot, type) or not (hasattr(boot, "files") and hasattr(boot, "plan")):
            raise ConfigError(f"boot={shown(boot)}: give boot.Linux(kernel, ...), or boot.Flat(image, ...)")
        config = Config(
            boot=boot,
            cpus=cpus,
            memory_bytes=parse_size(memory),
            name=name,
            serial_ports=serial_ports,
            hugepage_bytes=None if hugepages is None else parse_size(hugepages),
            shared_memory=shared_memory,
            overcommit=overcommit,
            on_reset=on_reset,
            poll_ns=poll_ns,
            console=port_names(console),
            rng=RngConfig() if rng is True else rng or None,
            balloon=balloon,
        )
        try:
            return await cls._create(config, disks, nets, devices, virtio, log_unclaimed)
        except (AiokvmError, OSError, RuntimeError) as error:
            raise named(error, f"cannot create machine {config.name}", config.cpus)  # noqa: B904

    @classmethod
    async def _create(
        cls,
        config: Config,
        disks: Sequence[BlockBackend | Disk],
        nets: Sequence[NetBackend | Nic],
        devices: Iterable[Placement],
        virtio: Sequence[VirtioDevice],
        log_unclaimed: bool,
    ) -> VM:
        if not config.overcommit:
            check_memory(config.memory_bytes)
        if config.memory_bytes > MAX_MEMORY_BYTES:
            raise ConfigError(
                f"memory is {config.memory_bytes >> 30} GiB: "
                f"a machine has at most {MAX_MEMORY_BYTES >> 30} GiB"
            )
        count = len(disks) + len(nets) + peripherals_count(config) + len(virtio)
        loop = current_loop()
        plans = [await boot_plan(loop, config, islice(places(config), count))]
        async with AsyncExitStack() as undo:
            hardware = await build_hardware(loop, config, undo)
            vm = cls(life := Life(config, loop, hardware))
            undo.push_async_callback(vm.aclose)
            await life.open(disks, nets, virtio, undo)
            for placement in devices:
                vm.attach(placement.device, **placement.where)
            life.exits.ask_unclaimed(log_unclaimed)
            life.boots_kernel = holds_kernel(plans[0])
            await load(loop, hardware, plans)
            undo.pop_all()
        return vm

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is GeneratorExit:
            try:
                current_loop()
            except (RuntimeError, ImportError):  # the latter while Python shuts down
                return  # The loop was given up, and the block with it: here nothing can be awaited.
        await self.aclose()

    def __repr__(self) -> str:
        return f"<VM {self.name} {self.state.value}, {len(self.vcpus)} vCPUs>"

    @property
    def _owner(self) -> Loop | None:
        return None if self.state is VmState.CLOSED else self._life.loop

    @property
    def state(self) -> VmState:
        """Where the machine is in its life."""
        return self._life.state

    @property
    def exit(self) -> Exit | None:
        """How the machine ended, or is ending; None before."""
        return self._life.exit

    @property
    def vcpus(self) -> tuple[VirtualCpu, ...]:
        """The vCPUs, by index."""
        return self._life.vcpus.all

    @property
    def memory(self) -> GuestMemory:
        """The guest's RAM."""
        return self._life.hardware.memory

    @property
    def serial(self) -> SerialConsole:
        """The first serial port: COM1, Linux's ttyS0."""
        return self._life.platform.consoles[0]

    @property
    def serial_ports(self) -> tuple[SerialConsole, ...]:
        """All serial ports."""
        return self._life.platform.consoles

    @property
    def disks(self) -> tuple[VmDisk, ...]:
        """The disks that it was created with."""
        disks = self._life.disks
        return disks.all if disks else ()

    @property
    def nets(self) -> tuple[VmNic, ...]:
        """The network adapters that it was created with."""
        nets = self._life.nets
        return nets.all if nets else ()

    @property
    def console(self) -> Consoles:
        """The ports of the virtio console, by name. Raises StateError if the machine was made without."""
        if self._life.peripherals.console is None:
            raise StateError(
                f"machine {self.name} has no virtio console: VM.create(console=...) gives it one"
            )
        return self._life.peripherals.console

    @property
    def balloon(self) -> MemoryBalloon:
        """The memory balloon. Raises StateError if the machine was made without."""
        if self._life.peripherals.balloon is None:
            raise StateError(f"machine {self.name} has no balloon: VM.create(balloon=True) gives it one")
        return self._life.peripherals.balloon

    def events(self) -> AsyncIterator[events.Event]:
        """What happens to the machine from now on; ends after `Exited`."""
        return self._life.hub.subscribe()

    @checked
    def attach(
        self,
        device: Device,
        *,
        pio: int | None = None,
        mmio: int | None = None,
        size: int = 1,
        irq: int | None = None,
        msi: tuple[int, int] | None = None,
        mode: RegionMode | ModeName = RegionMode.EXIT,
        offset: int = 0,
        on_error: ErrorPolicy | PolicyName = ErrorPolicy.KEEP,
    ) -> Attachment:
        """Give a device ``size`` bytes from port ``pio`` or from guest physical address ``mmio`` on.

        At any time in a machine's life; a device may be given several regions, one call each, and
        ``offset`` is where in the device this one begins. ``irq`` is an input of the interrupt controllers
        (a GSI), ``msi`` an address and data: one of them becomes ``device.irq``. ``mode`` says what a write
        does (`RegionMode`), ``on_error`` what follows when the device raises (`ErrorPolicy`).

        Raises DeviceError for a range that overlaps another or RAM, ConfigError for what cannot be,
        StateError when the machine has ended. Nothing has changed then.
        """
        self._life.require(VmState.CREATED, VmState.RUNNING, VmState.PAUSED)
        return self._life.attachments.attach(
            device,
            pio=pio,
            mmio=mmio,
            size=size,
            irq=irq,
            msi=msi,
            mode=mode,
            offset=offset,
            on_error=on_error,
        )

    @checked
    def detach(self, attachment: Attachment) -> None:
        """Take a region away: accesses to it find nothing from now on. DeviceError if it is not attached.

        A device loses its interrupt with the region that it was attached with, timers and task with the last.
        """
        self._life.exits.check_owner()
        self._life.attachments.detach(attachment)

    @checked
    def attach_virtio(self, device: VirtioDevice) -> VirtioAttachment:
        """Give the machine a virtio device, by virtio-mmio: before it starts, as guests look for it but once.

        It gets the next free place and GSI, and stands in the ACPI tables. Raises StateError once the machine
        has started, DeviceError for a device that is in a machine, ConfigError for what cannot be, and for
        a guest that is told of its devices by its command line: these have to be given to `VM.create`.
        """
        self._life.require(VmState.CREATED)
        if getattr(self._life.config.boot, "virtio_mmio_cmdline", False):
            raise ConfigError("with virtio_mmio_cmdline, virtio devices are given to VM.create: virtio=[...]")
        attachment = self._life.virtio.attach(device)
        # The RSDP has stayed where it was.
        tables = acpi_tables(self._life.config, self._life.virtio.places)
        self.memory.write(tables.gpa, tables.data)
        return attachment

    def stats(self) -> VmStats:
        """What the machine has done so far, in numbers. StateError when it is closed."""
        return self._life.stats()

    @checked
    def trace(self, write: Callable[[bytes], object]) -> Trace:
        """Record the exits that reach the loop, while the asynchronous context manager is entered.

        ``write`` gets the trace in chunks, one after the other, in a worker thread: a file's own will do.
        What it raises ends the trace, not the machine, and is raised when the context is left. If the guest
        is faster than ``write``, exits are left out and counted. ``aiokvm trace`` reads what comes of it.

        Accesses that no device claims are recorded, too; each then waits for the loop.
        """
        from aiokvm.machine.trace import Trace

        return Trace(self._life.loop, self._life.exits, self.name, write)

    async def start(self) -> None:
        """Run the guest. Raises StateError unless the machine is new, AiokvmError if no thread can be had."""
        await self._life.start()

    async def pause(self) -> None:
        """Have all vCPUs stand still, with what they had begun completed; no more than that if they do.

        A vCPU whose access a device has not answered stands still when it is answered. A pause that is
        cancelled has not happened. Raises StateError if the machine does not run, or ends meanwhile.
        """
        await self._life.pause()

    async def resume(self) -> None:
        """Let the vCPUs run again; no more than that if they do. Raises StateError if there is no guest."""
        await self._life.resume()

    async def reset(self) -> None:
        """Press the reset button: devices, CPUs and what is booted are as new; a paused machine stays so.

        What is booted is read again. RAM that it does not cover keeps its content, as on a PC. Raises
        BootError, ConfigError, and StateError if the machine has not started or ends meanwhile. A reset that
        is cancelled has happened wholly or not at all. If a virtio device's I/O does not come to an end, as
        that of a disk that is stuck in the kernel, the machine ends after
        `aiokvm.machine.virtio.DRAIN_SECONDS` with ERROR, and DeviceError is raised.
        """
        await self._life.reset()

    @checked
    async def stop(self, timeout: float = 30.0) -> Exit:
        """Press the power button and give the guest ``timeout`` seconds to turn itself off; then kill it.

        A machine that does not run is killed at once. Raises what `kill` raises.
        """
        if self.state is VmState.RUNNING and self.exit is None:
            self.power_button()
            with suppress(TimeoutError):
                return await self._life.loop.within(timeout, self.wait)
        return await self.kill()

    async def kill(self) -> Exit:
        """End the machine, whatever its guest does. The exit is KILLED unless it had ended by itself.

        If cancelled, the machine ends all the same. Raises AiokvmError if a thread is stuck in the kernel for
        `aiokvm.machine.life.STUCK_SECONDS`.
        """
        return await self._life.kill()

    async def wait(self) -> Exit:
        """How the machine ended, as soon as it has."""
        return await self._life.wait()

    def power_button(self) -> None:
        """Press the ACPI power button, for an operating system that listens to it. Raises StateError."""
        self._life.require(VmState.RUNNING, VmState.PAUSED)
        self._life.platform.pm.power_button()

    async def aclose(self) -> None:
        """End the machine and give everything back; what leaving the context does. Idempotent.

        It runs to its end before a cancellation gets through. Raises what `kill` raises.
        """
        await self._life.aclose()
