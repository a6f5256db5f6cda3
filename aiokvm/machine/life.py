"""The life of a machine: its parts, the states that they go through together, and its end."""

from __future__ import annotations

import enum
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from aiokvm._core import lib
from aiokvm.errors import AiokvmError, KvmError, StateError
from aiokvm.hw.bus import device_name
from aiokvm.machine import events
from aiokvm.machine.attachments import Attachment, Attachments
from aiokvm.machine.build import boot_plan, load, poll_ns
from aiokvm.machine.device import ErrorPolicy
from aiokvm.machine.emulated import first_start, warn_if_emulated
from aiokvm.machine.events import Exit, ExitReason
from aiokvm.machine.exits import Exits
from aiokvm.machine.failures import Failures

# Not when it is asked for: then there may be no descriptor left to read it with.
from aiokvm.machine.limits import named
from aiokvm.machine.log import machine_logger
from aiokvm.machine.peripherals import Peripherals
from aiokvm.machine.platform import Platform
from aiokvm.machine.power import Power
from aiokvm.machine.turn import Slice
from aiokvm.machine.vcpus import Vcpus
from aiokvm.machine.virtio import DRAIN_SECONDS, VirtioDevices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AsyncExitStack

    from aiokvm import kvm
    from aiokvm.aio import Loop, Task
    from aiokvm.block import BlockBackend
    from aiokvm.boot import BootPlan
    from aiokvm.hw.bus import BusDevice
    from aiokvm.machine.config import Config
    from aiokvm.machine.disks import Disk, Disks
    from aiokvm.machine.hardware import Hardware
    from aiokvm.machine.nets import Nets
    from aiokvm.machine.stats import VmStats
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


class Life:
    """What is behind a `VM`, whose methods of the same names say what is raised.

    ``exit`` is how the machine ended, or is ending; None before.
    """

    def __init__(self, config: Config, loop: Loop, hardware: Hardware) -> None:
        self.name = config.name
        self.config = config
        self.loop = loop
        self.state = VmState.CREATED
        self.exit: Exit | None = None
        self.logger = machine_logger(config.name)
        self.hub = events.EventHub(loop)
        self.boots_kernel = False
        """Whether so much is put into RAM that it may be a kernel."""
        # What a machine does not have, its program need not load.
        self.disks: Disks | None = None
        self.nets: Nets | None = None
        self._changing = loop.lock()
        self._ended = loop.event()
        self._closed = loop.event()
        self._closing = False
        self._kept_told = False
        self._failures = Failures(config.name, self.logger, self.hub)
        self._kvm_stats: kvm.Stats | None = None
        self._rebooting: Task | None = None
        self.hardware = hardware
        undo: list[Callable[[], None]] = []
        try:
            self.exits = Exits(loop, self, config.name, poll_ns(config))
            undo.append(self.exits.close)
            reboot = self._reboot if config.on_reset == "reboot" else None
            self._power = Power(config.name, hardware, self.logger, self._end, reboot)
            self.platform = Platform(loop, self._power, config, hardware.memory, self.exits.pio)
            undo.append(self.platform.close)
            self.exits.publish()
            self.vcpus = Vcpus(loop, self.exits, hardware.vcpus, config.name)
            undo.append(self.vcpus.close)
            self.attachments = Attachments(
                loop, self.exits, hardware.vm, hardware.memory, self._on_device_failed
            )
            undo.append(self.attachments.close)
            self.virtio = VirtioDevices(
                loop,
                config,
                self.exits,
                hardware.vm,
                hardware.memory,
                self.attachments,
                self._failures,
            )
            undo.append(self.virtio.close)
            self.peripherals = Peripherals(loop, config, hardware.memory, self.logger)
        except BaseException:
            for step in reversed(undo):
                step()
            raise

    async def open(
        self,
        disks: Sequence[BlockBackend | Disk],
        nets: Sequence[NetBackend | Nic],
        virtio: Iterable[VirtioDevice],
        undo: AsyncExitStack,
    ) -> None:
        """Open disks and networks; attach their devices, the machine's own, and ``virtio``, in this order."""
        devices: list[VirtioDevice] = []
        if disks:
            from aiokvm.machine.disks import Disks

            self.disks = Disks(self.loop, self.name, self.hub, self.logger, self.pause)
            await self.disks.open(disks, undo)
            devices += (disk.device for disk in self.disks.all)
        if nets:
            from aiokvm.machine.nets import Nets

            self.nets = Nets(self.loop, self.name, self.hub, self.logger)
            await self.nets.open(nets, undo)
            devices += (nic.device for nic in self.nets.all)
        # One with many queues takes a millisecond.
        pace = Slice()
        for device in (*devices, *self.peripherals.devices, *virtio):
            if pace.is_over():
                await self.loop.turn()
                pace.begin()
            self.virtio.attach(device)

    def require(self, *states: VmState) -> None:
        """Raise StateError unless the machine is in one of these, and its end has not begun."""
        self.exits.check_owner()
        if self.exit is not None and self.state is not VmState.CLOSED:
            raise StateError(f"machine {self.name} has ended: {self.exit.reason.value}")
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise StateError(f"machine {self.name} is {self.state.value}; this needs one that is {wanted}")

    def stats(self) -> VmStats:
        """What the machine has done so far."""
        from aiokvm.machine.stats import collect

        if self.state is VmState.CLOSED:
            raise StateError(f"machine {self.name} is closed")
        self.exits.check_owner()
        if self._kvm_stats is None:
            try:
                self._kvm_stats = self.hardware.vm.get_stats()
            except KvmError:
                self._kvm_stats = None
        return collect(self.vcpus.all, self.exits, self._failures, self._kvm_stats)

    # From state to state.

    async def start(self) -> None:
        """Run the guest."""
        await self.loop.turn()
        if self.boots_kernel and not first_start.locked():
            await self.loop.in_thread(warn_if_emulated)
        self.require(VmState.CREATED)
        self.state = VmState.RUNNING
        try:
            self.vcpus.start()
        except Exception as error:
            told = named(error, f"cannot start machine {self.name}", len(self.vcpus.all))
            self._end(Exit(ExitReason.ERROR, detail=str(told)))
            raise told  # noqa: B904
        self.attachments.start()
        self.virtio.start()
        self.vcpus.go()
        self.hub.emit(events.Started(self.name))

    async def pause(self) -> None:
        """Have all vCPUs stand still."""
        async with self._changing:
            if self.state is not VmState.PAUSED:
                await self._park()
                self.state = VmState.PAUSED
                self.hub.emit(events.Paused(self.name))

    async def resume(self) -> None:
        """Let them run again."""
        async with self._changing:
            if self.state is not VmState.RUNNING:
                self.require(VmState.PAUSED)
                self._unpark()
                if self.disks:
                    self.disks.retry()
                self.hub.emit(events.Resumed(self.name))

    async def reset(self, cause: str = "", *, power_cycle: bool = False) -> None:
        """Begin anew. ``cause`` is what the guest did to that end. A power cycle empties RAM, too."""
        plans = [await boot_plan(self.loop, self.config, self.virtio.places)]
        zero = None if power_cycle else plans[0].zero
        async with self._changing:
            self.require(VmState.RUNNING, VmState.PAUSED)
            was_running = self.state is VmState.RUNNING
            if was_running:
                await self._park()
                self.state = VmState.PAUSED
            await self.loop.uncancelled(lambda: self._reset(plans, zero, cause, then_run=was_running))

    async def kill(self) -> Exit:
        """End the machine, whatever its guest does."""
        self.exits.check_owner()
        self._end(Exit(ExitReason.KILLED))
        with suppress(TimeoutError):
            return await self.loop.within(STUCK_SECONDS, self.wait)
        stuck = min(self.vcpus.threads)
        raise AiokvmError(
            f"machine {self.name}: {len(self.vcpus.threads)} vCPU threads, vCPU {stuck}'s "
            f"(thread {self.vcpus.all[stuck].tid}) among them, have not left KVM_RUN in {STUCK_SECONDS:g} s: "
            "they are stuck in the kernel, see /proc/TID/stack; the machine's memory is not freed"
        )

    async def wait(self) -> Exit:
        """How the machine ended, as soon as it has."""
        self.exits.check_owner()
        await self._ended.wait()
        assert self.exit is not None
        return self.exit

    async def aclose(self) -> None:
        """End the machine and give everything back. Idempotent."""
        await self.loop.uncancelled(self._close)

    # Told by the exits and by the devices, on the loop.

    def on_parked(self, index: int) -> None:
        """A vCPU stands still."""
        self.vcpus.on_parked(index)

    def on_stopped(self, index: int) -> None:
        """A vCPU's thread has ended."""
        if self.exit is None:
            # Nobody here has asked for it: the interpreter ends, whose loop is in a daemon thread.
            return
        if self.vcpus.on_stopped(index):
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
        if not self.attachments.failed(device, access, error):
            self._failures.on_failed(device_name(device), access, error)

    def _on_device_failed(self, attachment: Attachment, access: str, error: Exception) -> None:
        name = type(attachment.device).__name__
        self._failures.on_failed(name, access, error)
        if attachment.on_error is ErrorPolicy.STOP_MACHINE:
            self._end(Exit(ExitReason.ERROR, detail=f"{name}: {access}: {error!r}"))
        elif attachment.on_error is ErrorPolicy.STOP_DEVICE:
            for other in self.attachments:
                if other.device is attachment.device:
                    self.attachments.detach(other)

    # The machine's own.

    def _reboot(self, cause: str) -> None:
        """The guest has reset the machine."""
        # At once: what follows a reset is not executed.
        self.vcpus.hold()
        self._rebooting = self.loop.spawn(partial(self._reboot_by, cause), f"{self.name}: reboot")

    async def _reboot_by(self, cause: str) -> None:
        try:
            await self.reset(cause, power_cycle=True)
        except StateError:
            pass  # it has ended meanwhile
        except Exception as error:
            self._end(Exit(ExitReason.ERROR, detail=f"reset failed: {error}"))
        finally:
            self._power.rebooted()

    async def _reset(
        self, plans: list[BootPlan], zero: Iterable[tuple[int, int]] | None, cause: str, *, then_run: bool
    ) -> None:
        try:
            # First: it ends what still writes to the guest's memory.
            await self.virtio.reset(DRAIN_SECONDS)
            kept = await self.loop.in_thread(partial(self.hardware.reset, zero))
            self.platform.reset()
            self.peripherals.reset()
            self.attachments.reset()
            await load(self.loop, self.hardware, plans)
        except BaseException as error:
            self._end(Exit(ExitReason.ERROR, detail=f"reset failed: {error}"))
            raise
        if kept and not self._kept_told:
            # Once: a guest may reset as often as it likes.
            self._kept_told = True
            names = ", ".join(f"{index:#x}" for index in kept)
            self.logger.warning("%s: a reset cannot change MSRs back on this host: %s", self.name, names)
        # It may have been ended while the loop had others to serve.
        self.require(VmState.PAUSED)
        self.hub.emit(events.WasReset(self.name, cause))
        # Before the guest runs, for it may reset itself at once.
        self._power.rebooted()
        if then_run:
            self._unpark()

    async def _park(self) -> None:
        self.require(VmState.RUNNING)
        try:
            await self.vcpus.pause()
            self.require(VmState.RUNNING)
        except BaseException:
            if self.exit is None:
                self._unpark()
            raise

    def _unpark(self) -> None:
        self.state = VmState.RUNNING
        # What follows a guest's reset is not executed, whoever pauses and resumes until it begins anew.
        if not self._power.is_rebooting:
            self.vcpus.resume()

    def _end(self, exit: Exit) -> None:  # noqa: A002
        """The machine ends; the first reason stands."""
        if self.exit is not None:
            return
        self.exit = exit
        self.exits.cancel()
        self.attachments.stop()
        if self.disks:
            self.disks.stop()
        if self.nets:
            self.nets.stop()
        self.virtio.stop()
        if not self.vcpus.stop():
            self._on_ended()

    def _on_ended(self) -> None:
        self.state = VmState.STOPPED
        self.platform.close()
        self.peripherals.close()
        assert self.exit is not None
        self.hub.emit(events.Exited(self.name, self.exit))
        self.hub.close()
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
                await self.virtio.aclose()
                self.attachments.close()
                if self._kvm_stats:
                    self._kvm_stats.close()
                self.vcpus.close()
                self.exits.close()
                # Freeing gigabytes takes the kernel a while.
                await self.loop.in_thread(self.hardware.close)
        finally:
            self.state = VmState.CLOSED
            self._closed.set()

    async def _devices_finished(self) -> None:
        async def handlers() -> None:
            await self.exits.finished()
            await self.attachments.finished()

        try:
            await self.loop.within(DEVICES_SECONDS, handlers)
        except TimeoutError:
            self.logger.error(
                "%s: what a device runs has been cancelled and does not end in %g s: it is left to itself",
                self.name,
                DEVICES_SECONDS,
            )
        try:
            await self.loop.within(DRAIN_SECONDS, self.virtio.finished)
        except TimeoutError:
            self.logger.error(
                "%s: what virtio devices have in flight does not end in %g s: it is left to itself",
                self.name,
                DRAIN_SECONDS,
            )
