"""A virtual machine, from its creation to its end."""

from __future__ import annotations

import enum
from contextlib import AsyncExitStack, suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

from aiokvm._core import lib
from aiokvm.aio import current_loop
from aiokvm.aio.owner import owned
from aiokvm.arguments import checked, shown
from aiokvm.errors import AiokvmError, ConfigError, KvmError, StateError
from aiokvm.machine import events
from aiokvm.machine.attachments import Attachment, Attachments, device_name
from aiokvm.machine.build import acpi_tables, boot_plan, build_hardware, load, poll_ns
from aiokvm.machine.config import POLL_NS, Config, RngConfig
from aiokvm.machine.device import Device, ErrorPolicy, ModeName, Placement, PolicyName, RegionMode
from aiokvm.machine.emulated import first_start, holds_kernel, warn_if_emulated
from aiokvm.machine.events import Exit, ExitReason
from aiokvm.machine.exits import Exits
from aiokvm.machine.failures import Failures

# Not when it is asked for: then there may be no descriptor left to read it with.
from aiokvm.machine.limits import check_memory, named
from aiokvm.machine.log import machine_logger
from aiokvm.machine.peripherals import Peripherals, port_names
from aiokvm.machine.peripherals import count as peripherals_count
from aiokvm.machine.platform import Platform
from aiokvm.machine.power import Power
from aiokvm.machine.vcpus import Vcpus
from aiokvm.machine.virtio import DRAIN_SECONDS, VirtioDevices, places
from aiokvm.size import parse_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from types import TracebackType
    from typing import Self

    from aiokvm import kvm
    from aiokvm.aio import Loop, Task
    from aiokvm.block import BlockBackend
    from aiokvm.boot import BootPlan, BootProtocol
    from aiokvm.hw.bus import BusDevice
    from aiokvm.machine.balloon import MemoryBalloon
    from aiokvm.machine.console import SerialConsole
    from aiokvm.machine.disks import Disk, Disks, VmDisk
    from aiokvm.machine.hardware import Hardware
    from aiokvm.machine.nets import Nets, VmNic
    from aiokvm.machine.ports import Consoles
    from aiokvm.machine.stats import VmStats
    from aiokvm.machine.trace import Trace
    from aiokvm.machine.vcpu import VirtualCpu
    from aiokvm.machine.virtio_host import VirtioAttachment
    from aiokvm.memory import GuestMemory
    from aiokvm.net import NetBackend, Nic
    from aiokvm.virtio.device import VirtioDevice

# A thread that a kick does not get out of KVM_RUN for so long is stuck in the kernel.
STUCK_SECONDS = 10.0
# How long the end waits for what devices run on the loop, when that was told to end, too.
DEVICES_SECONDS = 10.0


class VmState(enum.Enum):
    """Where a machine is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    CLOSED = "closed"


@owned
class VM:
    """A virtual machine inside the program; made by `VM.create`, used as an async context manager.

    All methods belong to the loop that created it, raise StateError on any other loop or thread, and are safe
    to cancel. Leaving the context ends the machine whatever state it is in, and gives back its threads,
    descriptors and memory.
    """

    def __init__(self, config: Config, loop: Loop, hardware: Hardware) -> None:
        self.name = config.name
        self.exit: Exit | None = None
        """How the machine ended, or is ending; None before."""
        self._config = config
        self._loop = loop
        self._state = VmState.CREATED
        self._logger = machine_logger(config.name)
        self._hub = events.EventHub(loop)
        self._changing = loop.lock()
        self._ended = loop.event()
        self._closed = loop.event()
        self._closing = False
        self._kept_told = False
        self._boots_kernel = False
        self._failures = Failures(config.name, self._logger, self._hub)
        # What a machine does not have, its program need not load.
        self._disks: Disks | None = None
        self._nets: Nets | None = None
        self._kvm_stats: kvm.Stats | None = None
        self._rebooting: Task | None = None
        self._hardware = hardware
        undo: list[Callable[[], None]] = []
        try:
            self._exits = Exits(loop, self, config.name, poll_ns(config))
            undo.append(self._exits.close)
            reboot = self._reboot if config.on_reset == "reboot" else None
            self._power = Power(config.name, hardware, self._logger, self._end, reboot)
            self._platform = Platform(loop, self._power, config, self._hardware.memory, self._exits.pio)
            undo.append(self._platform.close)
            self._exits.publish()
            self._vcpus = Vcpus(loop, self._exits, hardware.vcpus, config.name)
            undo.append(self._vcpus.close)
            self._attachments = Attachments(
                loop, self._exits, hardware.vm, hardware.memory, self._on_device_failed
            )
            undo.append(self._attachments.close)
            self._virtio = VirtioDevices(
                loop,
                config,
                self._exits,
                hardware.vm,
                hardware.memory,
                self._attachments,
                self._failures,
            )
            undo.append(self._virtio.close)
            self._peripherals = Peripherals(loop, config, hardware.memory, self._logger)
        except BaseException:
            for step in reversed(undo):
                step()
            raise

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
        count = len(disks) + len(nets) + peripherals_count(config) + len(virtio)
        loop = current_loop()
        plans = [await boot_plan(loop, config, islice(places(config), count))]
        async with AsyncExitStack() as undo:
            hardware = await build_hardware(loop, config, undo)
            vm = cls(config, loop, hardware)
            undo.push_async_callback(vm.aclose)
            if disks:
                from aiokvm.machine.disks import Disks

                vm._disks = Disks(loop, config.name, vm._hub, vm._logger, vm.pause)
                await vm._disks.open(disks, undo)
            if nets:
                from aiokvm.machine.nets import Nets

                vm._nets = Nets(loop, config.name, vm._hub, vm._logger)
                await vm._nets.open(nets, undo)
            disk_devices = (disk.device for disk in vm.disks)
            net_devices = (nic.device for nic in vm.nets)
            for device in (*disk_devices, *net_devices, *vm._peripherals.devices, *virtio):
                vm._virtio.attach(device)
            for placement in devices:
                vm.attach(placement.device, **placement.where)
            vm._exits.ask_unclaimed(log_unclaimed)
            vm._boots_kernel = holds_kernel(plans[0])
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
        return f"<VM {self.name} {self._state.value}, {len(self.vcpus)} vCPUs>"

    @property
    def _owner(self) -> Loop | None:
        return None if self._state is VmState.CLOSED else self._loop

    @property
    def state(self) -> VmState:
        """Where the machine is in its life."""
        return self._state

    @property
    def vcpus(self) -> tuple[VirtualCpu, ...]:
        """The vCPUs, by index."""
        return self._vcpus.all

    @property
    def memory(self) -> GuestMemory:
        """The guest's RAM."""
        return self._hardware.memory

    @property
    def serial(self) -> SerialConsole:
        """The first serial port: COM1, Linux's ttyS0."""
        return self._platform.consoles[0]

    @property
    def serial_ports(self) -> tuple[SerialConsole, ...]:
        """All serial ports."""
        return self._platform.consoles

    @property
    def disks(self) -> tuple[VmDisk, ...]:
        """The disks that it was created with."""
        return self._disks.all if self._disks else ()

    @property
    def nets(self) -> tuple[VmNic, ...]:
        """The network adapters that it was created with."""
        return self._nets.all if self._nets else ()

    @property
    def console(self) -> Consoles:
        """The ports of the virtio console, by name. Raises StateError if the machine was made without."""
        if self._peripherals.console is None:
            raise StateError(
                f"machine {self.name} has no virtio console: VM.create(console=...) gives it one"
            )
        return self._peripherals.console

    @property
    def balloon(self) -> MemoryBalloon:
        """The memory balloon. Raises StateError if the machine was made without."""
        if self._peripherals.balloon is None:
            raise StateError(f"machine {self.name} has no balloon: VM.create(balloon=True) gives it one")
        return self._peripherals.balloon

    def events(self) -> AsyncIterator[events.Event]:
        """What happens to the machine from now on; ends after `Exited`."""
        return self._hub.subscribe()

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
        self._require(VmState.CREATED, VmState.RUNNING, VmState.PAUSED)
        return self._attachments.attach(
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
        self._exits.check_owner()
        self._attachments.detach(attachment)

    @checked
    def attach_virtio(self, device: VirtioDevice) -> VirtioAttachment:
        """Give the machine a virtio device, by virtio-mmio: before it starts, as guests look for it but once.

        It gets the next free place and GSI, and stands in the ACPI tables. Raises StateError once the machine
        has started, DeviceError for a device that is in a machine, ConfigError for what cannot be, and for
        a guest that is told of its devices by its command line: these have to be given to `VM.create`.
        """
        self._require(VmState.CREATED)
        if getattr(self._config.boot, "virtio_mmio_cmdline", False):
            raise ConfigError("with virtio_mmio_cmdline, virtio devices are given to VM.create: virtio=[...]")
        attachment = self._virtio.attach(device)
        # The RSDP has stayed where it was.
        tables = acpi_tables(self._config, self._virtio.places)
        self.memory.write(tables.gpa, tables.data)
        return attachment

    def stats(self) -> VmStats:
        """What the machine has done so far, in numbers. StateError when it is closed."""
        from aiokvm.machine.stats import collect

        if self._state is VmState.CLOSED:
            raise StateError(f"machine {self.name} is closed")
        self._exits.check_owner()
        if self._kvm_stats is None:
            try:
                self._kvm_stats = self._hardware.vm.get_stats()
            except KvmError:
                self._kvm_stats = None
        return collect(self.vcpus, self._exits, self._failures, self._kvm_stats)

    @checked
    def trace(self, write: Callable[[bytes], object]) -> Trace:
        """Record the exits that reach the loop, while the asynchronous context manager is entered.

        ``write`` gets the trace in chunks, one after the other, in a worker thread: a file's own will do.
        What it raises ends the trace, not the machine, and is raised when the context is left. If the guest
        is faster than ``write``, exits are left out and counted. ``aiokvm trace`` reads what comes of it.

        Accesses that no device claims are recorded, too; each then waits for the loop.
        """
        from aiokvm.machine.trace import Trace

        return Trace(self._loop, self._exits, self.name, write)

    async def start(self) -> None:
        """Run the guest. Raises StateError unless the machine is new, AiokvmError if no thread can be had."""
        await self._loop.turn()
        if self._boots_kernel and not first_start.locked():
            await self._loop.in_thread(warn_if_emulated)
        self._require(VmState.CREATED)
        self._state = VmState.RUNNING
        try:
            self._vcpus.start()
        except Exception as error:
            told = named(error, f"cannot start machine {self.name}", len(self.vcpus))
            self._end(Exit(ExitReason.ERROR, detail=str(told)))
            raise told  # noqa: B904
        self._attachments.start()
        self._virtio.start()
        self._vcpus.go()
        self._hub.emit(events.Started(self.name))

    async def pause(self) -> None:
        """Have all vCPUs stand still, with what they had begun completed; no more than that if they do.

        A vCPU whose access a device has not answered stands still when it is answered. A pause that is
        cancelled has not happened. Raises StateError if the machine does not run, or ends meanwhile.
        """
        async with self._changing:
            if self._state is not VmState.PAUSED:
                await self._park()
                self._state = VmState.PAUSED
                self._hub.emit(events.Paused(self.name))

    async def resume(self) -> None:
        """Let the vCPUs run again; no more than that if they do. Raises StateError if there is no guest."""
        async with self._changing:
            if self._state is not VmState.RUNNING:
                self._require(VmState.PAUSED)
                self._unpark()
                if self._disks:
                    self._disks.retry()
                self._hub.emit(events.Resumed(self.name))

    async def reset(self) -> None:
        """Press the reset button: devices, CPUs and what is booted are as new; a paused machine stays so.

        What is booted is read again. RAM that it does not cover keeps its content, as on a PC. Raises
        BootError, ConfigError, and StateError if the machine has not started or ends meanwhile. A reset that
        is cancelled has happened wholly or not at all. If a virtio device's I/O does not come to an end, as
        that of a disk that is stuck in the kernel, the machine ends after
        `aiokvm.machine.virtio.DRAIN_SECONDS` with ERROR, and DeviceError is raised.
        """
        await self._reset_by("", power_cycle=False)

    @checked
    async def stop(self, timeout: float = 30.0) -> Exit:
        """Press the power button and give the guest ``timeout`` seconds to turn itself off; then kill it.

        A machine that does not run is killed at once. Raises what `kill` raises.
        """
        if self._state is VmState.RUNNING and self.exit is None:
            self.power_button()
            with suppress(TimeoutError):
                return await self._loop.within(timeout, self.wait)
        return await self.kill()

    async def kill(self) -> Exit:
        """End the machine, whatever its guest does. The exit is KILLED unless it had ended by itself.

        If cancelled, the machine ends all the same. Raises AiokvmError if a thread is stuck in the kernel for
        `STUCK_SECONDS`.
        """
        self._exits.check_owner()
        self._end(Exit(ExitReason.KILLED))
        with suppress(TimeoutError):
            return await self._loop.within(STUCK_SECONDS, self.wait)
        stuck = min(self._vcpus.threads)
        raise AiokvmError(
            f"machine {self.name}: {len(self._vcpus.threads)} vCPU threads, vCPU {stuck}'s "
            f"(thread {self.vcpus[stuck].tid}) among them, have not left KVM_RUN in {STUCK_SECONDS:g} s: "
            "they are stuck in the kernel, see /proc/TID/stack; the machine's memory is not freed"
        )

    async def wait(self) -> Exit:
        """How the machine ended, as soon as it has."""
        self._exits.check_owner()
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    def power_button(self) -> None:
        """Press the ACPI power button, for an operating system that listens to it. Raises StateError."""
        self._require(VmState.RUNNING, VmState.PAUSED)
        self._platform.pm.power_button()

    async def aclose(self) -> None:
        """End the machine and give everything back; what leaving the context does. Idempotent.

        It runs to its end before a cancellation gets through. Raises what `kill` raises.
        """
        await self._loop.uncancelled(self._close)

    # Told by the exits and by the devices, on the loop.

    def on_parked(self, index: int) -> None:
        """A vCPU stands still."""
        self._vcpus.on_parked(index)

    def on_stopped(self, index: int) -> None:
        """A vCPU's thread has ended."""
        if self.exit is None:
            # Nobody here has asked for it: the interpreter ends, whose loop is in a daemon thread.
            return
        if self._vcpus.on_stopped(index):
            self._on_ended()

    def on_exit(self, index: int, reason: int, error: int) -> None:
        """A vCPU's KVM_RUN came back with what no device can answer."""
        if self.exit is None:
            self._power.on_exit(index, reason, error)

    def on_unclaimed(self, index: int, bus: int, address: int, size: int, value: int | None) -> None:
        """A vCPU found nothing where it read, or wrote ``value``."""
        what = f"read of {size} bytes" if value is None else f"write of {value:#x} ({size} bytes)"
        where = "port" if bus == lib.AIOKVM_BUS_PIO else "address"
        self._failures.on_unclaimed(f"vCPU {index}: {what} at {where} {address:#x}")

    def on_failed(self, device: BusDevice, access: str, error: Exception) -> None:
        """A device raised."""
        if not self._attachments.failed(device, access, error):
            self._failures.on_failed(device_name(device), access, error)

    # The machine's own.

    def _on_device_failed(self, attachment: Attachment, access: str, error: Exception) -> None:
        name = type(attachment.device).__name__
        self._failures.on_failed(name, access, error)
        if attachment.on_error is ErrorPolicy.STOP_MACHINE:
            self._end(Exit(ExitReason.ERROR, detail=f"{name}: {access}: {error!r}"))
        elif attachment.on_error is ErrorPolicy.STOP_DEVICE:
            for other in self._attachments:
                if other.device is attachment.device:
                    self._attachments.detach(other)

    def _require(self, *states: VmState) -> None:
        self._exits.check_owner()
        if self.exit is not None and self._state is not VmState.CLOSED:
            raise StateError(f"machine {self.name} has ended: {self.exit.reason.value}")
        if self._state not in states:
            wanted = " or ".join(state.value for state in states)
            raise StateError(f"machine {self.name} is {self._state.value}; this needs one that is {wanted}")

    def _reboot(self, cause: str) -> None:
        """The guest has reset the machine."""
        # At once: what follows a reset is not executed.
        self._vcpus.hold()
        self._rebooting = self._loop.spawn(partial(self._reboot_by, cause), f"{self.name}: reboot")

    async def _reboot_by(self, cause: str) -> None:
        try:
            await self._reset_by(cause, power_cycle=True)
        except StateError:
            pass  # it has ended meanwhile
        except Exception as error:
            self._end(Exit(ExitReason.ERROR, detail=f"reset failed: {error}"))
        finally:
            self._power.rebooted()

    async def _reset_by(self, cause: str, *, power_cycle: bool) -> None:
        plans = [await boot_plan(self._loop, self._config, self._virtio.places)]
        zero = None if power_cycle else plans[0].zero
        async with self._changing:
            self._require(VmState.RUNNING, VmState.PAUSED)
            was_running = self._state is VmState.RUNNING
            if was_running:
                await self._park()
                self._state = VmState.PAUSED
            await self._loop.uncancelled(lambda: self._reset(plans, zero, cause, then_run=was_running))

    async def _reset(
        self, plans: list[BootPlan], zero: Iterable[tuple[int, int]] | None, cause: str, *, then_run: bool
    ) -> None:
        try:
            # First: it ends what still writes to the guest's memory.
            await self._virtio.reset(DRAIN_SECONDS)
            kept = await self._loop.in_thread(partial(self._hardware.reset, zero))
            self._platform.reset()
            self._peripherals.reset()
            self._attachments.reset()
            await load(self._loop, self._hardware, plans)
        except BaseException as error:
            self._end(Exit(ExitReason.ERROR, detail=f"reset failed: {error}"))
            raise
        if kept and not self._kept_told:
            # Once: a guest may reset as often as it likes.
            self._kept_told = True
            names = ", ".join(f"{index:#x}" for index in kept)
            self._logger.warning("%s: a reset cannot change MSRs back on this host: %s", self.name, names)
        # It may have been ended while the loop had others to serve.
        self._require(VmState.PAUSED)
        self._hub.emit(events.WasReset(self.name, cause))
        # Before the guest runs, for it may reset itself at once.
        self._power.rebooted()
        if then_run:
            self._unpark()

    async def _park(self) -> None:
        self._require(VmState.RUNNING)
        try:
            await self._vcpus.pause()
            self._require(VmState.RUNNING)
        except BaseException:
            if self.exit is None:
                self._unpark()
            raise

    def _unpark(self) -> None:
        self._state = VmState.RUNNING
        # What follows a guest's reset is not executed, whoever pauses and resumes until it begins anew.
        if not self._power.is_rebooting:
            self._vcpus.resume()

    def _end(self, exit: Exit) -> None:  # noqa: A002
        """The machine ends; the first reason stands."""
        if self.exit is not None:
            return
        self.exit = exit
        self._exits.cancel()
        self._attachments.stop()
        if self._disks:
            self._disks.stop()
        if self._nets:
            self._nets.stop()
        self._virtio.stop()
        if not self._vcpus.stop():
            self._on_ended()

    def _on_ended(self) -> None:
        self._state = VmState.STOPPED
        self._platform.close()
        self._peripherals.close()
        assert self.exit is not None
        self._hub.emit(events.Exited(self.name, self.exit))
        self._hub.close()
        self._ended.set()

    async def _close(self) -> None:
        if self._closing:
            await self._closed.wait()
            return
        self._closing = True
        try:
            await self.kill()
            if self._rebooting:
                self._rebooting.cancel()
                await self._rebooting.wait()
            # A reset under way writes to what is freed here, until it sees that the machine has ended.
            async with self._changing:
                await self._devices_finished()
                self._virtio.close()
                self._attachments.close()
                if self._kvm_stats:
                    self._kvm_stats.close()
                self._vcpus.close()
                self._exits.close()
                # Freeing gigabytes takes the kernel a while.
                await self._loop.in_thread(self._hardware.close)
        finally:
            self._state = VmState.CLOSED
            self._closed.set()

    async def _devices_finished(self) -> None:
        async def handlers() -> None:
            await self._exits.finished()
            await self._attachments.finished()

        try:
            await self._loop.within(DEVICES_SECONDS, handlers)
        except TimeoutError:
            self._logger.error(
                "%s: what a device runs has been cancelled and does not end in %g s: it is left to itself",
                self.name,
                DEVICES_SECONDS,
            )
        try:
            await self._loop.within(DRAIN_SECONDS, self._virtio.finished)
        except TimeoutError:
            self._logger.error(
                "%s: what virtio devices have in flight does not end in %g s: it is left to itself",
                self.name,
                DRAIN_SECONDS,
            )
