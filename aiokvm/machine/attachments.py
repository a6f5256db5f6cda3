"""The devices of the user's own in one machine: their regions, interrupts, doorbells, memory and tasks."""

from __future__ import annotations

import inspect
import os
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from aiokvm.errors import ConfigError, DeviceError, GuestMemoryError
from aiokvm.machine.device import Device, ErrorPolicy, ModeName, PolicyName, RegionMode
from aiokvm.machine.hardware import KERNEL_MMIO, KERNEL_PORTS
from aiokvm.machine.irq import GsiIrq, Irq, MsiIrq
from aiokvm.memory import PAGE_SIZE, SharedPages

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokvm import kvm
    from aiokvm.aio import Loop, Task
    from aiokvm.hw.bus import BusDevice
    from aiokvm.machine.exits import Exits
    from aiokvm.memory import GuestMemory


class Attachment:
    """A region of a device in a machine, for `VM.detach`; made by `VM.attach`.

    It has ``size`` bytes from ``base`` on, which is a port if ``pio`` is set and else a guest physical
    address. ``memory`` is the RAM of a MEMORY region, None in other modes. ``attached`` tells whether it is
    still in the machine.
    """

    def __init__(
        self, device: Device, mode: RegionMode, on_error: ErrorPolicy, base: int, size: int, pio: bool
    ) -> None:
        self.device = device
        self.mode = mode
        self.on_error = on_error
        self.base = base
        self.size = size
        self.pio = pio
        self.memory: memoryview | None = None
        self.attached = False
        self._bell: _Doorbell | None = None
        self._undo = ExitStack()

    def __repr__(self) -> str:
        bus = "pio" if self.pio else "mmio"
        return (
            f"<Attachment {type(self.device).__name__} {bus} {self.base:#x}-{self.base + self.size - 1:#x}>"
        )

    def _close(self) -> None:
        self.attached = False
        self._undo.close()


class _Window:
    """What a bus finds of a device: its offsets from ``first`` on."""

    def __init__(self, attachment: Attachment, first: int) -> None:
        device = attachment.device
        self.attachment = attachment
        if first == 0:
            # No call between an exit and its handler.
            self.read: Callable[[int, int], Any] = device.read
            self.write: Callable[[int, int, int], Any] = device.write
        else:
            self.read = lambda offset, size: device.read(first + offset, size)
            self.write = lambda offset, size, value: device.write(first + offset, size, value)
        for name in ("read_string", "write_string"):
            whole = getattr(device, name, None)
            if whole is not None:
                setattr(self, name, lambda offset, *rest, _whole=whole: _whole(first + offset, *rest))

    def reset(self) -> None:
        """The device is reset once, not by its windows."""


def _window(attachment: Attachment, first: int) -> BusDevice:
    # What its methods return may have to be awaited, which no device of a bus of ours needs.
    return cast("BusDevice", _Window(attachment, first))


class Attachments:
    """All of one machine. ``on_failed`` is told what a device raised, and in what access."""

    def __init__(
        self,
        loop: Loop,
        exits: Exits,
        vm: kvm.Vm,
        memory: GuestMemory,
        on_failed: Callable[[Attachment, str, Exception], None],
    ) -> None:
        self._loop = loop
        self._exits = exits
        self._vm = vm
        self._memory = memory
        self._on_failed = on_failed
        self._all: list[Attachment] = []
        # By identity: a device may compare as it likes.
        self._tasks: dict[int, Task] = {}
        # All that have not ended, the doorbells' included.
        self._alive: set[Task] = set()
        self._next_slot = len(memory.regions)
        self._free_slots: list[int] = []
        self._running = False

    def __iter__(self) -> Any:
        return iter(tuple(self._all))

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
        """As `VM.attach`; nothing has changed if it raises."""
        try:
            mode, on_error = RegionMode(mode), ErrorPolicy(on_error)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if (pio is None) == (mmio is None):
            raise ConfigError("a region lies on ports or in memory: give either pio or mmio")
        if irq is not None and msi is not None:
            raise ConfigError("a device has one interrupt: give either irq or msi")
        if offset < 0:
            raise ConfigError(f"offset {offset} is before the device's first")
        base = pio if pio is not None else mmio
        assert base is not None
        new = all(other.device is not device for other in self._all)
        if new and device._loop is not None:
            raise DeviceError(f"{type(device).__name__} is attached to another machine")
        attachment = Attachment(device, mode, on_error, base, size, pio is not None)
        with ExitStack() as undo:
            if mode is RegionMode.MEMORY:
                self._share_memory(attachment, undo)
            else:
                self._claim(attachment, offset, undo)
            if mode is RegionMode.DOORBELL:
                self._install_doorbell(attachment, offset, undo)
            if irq is not None or msi is not None:
                if getattr(device, "irq", None) is not None:
                    raise ConfigError(f"{type(device).__name__} has an interrupt already")
                line: Irq = GsiIrq(self._vm, irq) if irq is not None else MsiIrq(self._vm, *(msi or (0, 0)))
                line._owner = self._loop
                device.irq = line
                undo.callback(delattr, device, "irq")
                undo.callback(line.close)
            attachment._undo = undo.pop_all()
        self._all.append(attachment)
        attachment.attached = True
        if new:
            device._loop = self._loop
            device.memory = self._memory
            device._timers = set()
            device._failed = partial(self._device_failed, device)
            if self._running:
                self._run(device)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Take a region away; the device's task and timers end with its last."""
        if attachment not in self._all:
            raise DeviceError(f"{attachment!r} is not attached to this machine")
        self._all.remove(attachment)
        attachment._close()
        device = attachment.device
        if all(other.device is not device for other in self._all):
            self._leave(device)

    def start(self) -> None:
        """The machine runs: so do the devices' tasks."""
        self._running = True
        for device in self._devices():
            self._run(device)

    def reset(self) -> None:
        """The machine is reset; its interrupt controllers have been."""
        for attachment in self._all:
            if attachment._bell:
                attachment._bell.forget()
        for device in self._devices():
            try:
                device.reset()
            except Exception as error:
                self._device_failed(device, "reset", error)
            irq = getattr(device, "irq", None)
            if isinstance(irq, Irq):
                irq.reset()

    def stop(self) -> None:
        """The machine has ended: tasks are cancelled, timers gone. Idempotent."""
        self._running = False
        for device in self._devices():
            for timer in tuple(device._timers or ()):
                timer.cancel()
            self._cancel(device)
        for attachment in tuple(self._all):
            if attachment._bell:
                attachment._bell.end()

    async def finished(self) -> None:
        """Waits for the tasks that were cancelled."""
        for task in tuple(self._alive):
            await task.wait()

    def close(self) -> None:
        """Give everything back. Idempotent."""
        while self._all:
            self.detach(self._all[-1])

    def failed(self, window: BusDevice, access: str, error: Exception) -> bool:
        """A region of a bus failed; whether it is one of a device of the user's own."""
        if not isinstance(window, _Window):
            return False
        self._on_failed(window.attachment, access, error)
        return True

    def _devices(self) -> list[Device]:
        return list({id(attachment.device): attachment.device for attachment in self._all}.values())

    def _device_failed(self, device: Device, access: str, error: Exception) -> None:
        """Not in an access to one of its regions."""
        for attachment in self._all:
            if attachment.device is device:
                self._on_failed(attachment, access, error)
                return
        # It has been detached meanwhile.
        raise error

    def _claim(self, attachment: Attachment, offset: int, undo: ExitStack) -> None:
        device = attachment.device
        posted = attachment.mode is RegionMode.POSTED
        for name in ("write", "write_string"):
            if not posted or not inspect.iscoroutinefunction(getattr(device, name, None)):
                continue
            raise ConfigError(
                f"{type(device).__name__}.{name} is a coroutine: what is posted is applied at once, "
                "in order, and needs a plain function"
            )
        bus = self._exits.pio if attachment.pio else self._exits.mmio
        _refuse_kernel(attachment)
        if not attachment.pio:
            self._refuse_ram(attachment)
        region = bus.attach(_window(attachment, offset), attachment.base, attachment.size, posted=posted)
        undo.callback(self._exits.withdraw, bus, region)
        self._exits.publish()

    def _refuse_ram(self, attachment: Attachment) -> None:
        end = attachment.base + attachment.size
        ranges = [(ram.gpa, ram.size) for ram in self._memory.regions]
        ranges += [(other.base, other.size) for other in self._all if other.mode is RegionMode.MEMORY]
        for base, size in ranges:
            if attachment.base < base + size and base < end:
                place = f"{base:#x}-{base + size - 1:#x}"
                raise DeviceError(f"{attachment!r} overlaps memory at {place}; choose another address")

    def _share_memory(self, attachment: Attachment, undo: ExitStack) -> None:
        if attachment.pio:
            raise ConfigError("memory lies in memory: give mmio, not pio")
        if attachment.base % PAGE_SIZE or attachment.size % PAGE_SIZE or attachment.size <= 0:
            raise ConfigError(f"memory that is shared begins and ends at multiples of {PAGE_SIZE}")
        _refuse_kernel(attachment)
        self._refuse_ram(attachment)
        # The bus knows the range, so that no other region gets it; no access of the guest arrives there.
        region = self._exits.mmio.attach(_window(attachment, 0), attachment.base, attachment.size)
        undo.callback(self._exits.withdraw, self._exits.mmio, region)
        try:
            pages = SharedPages(attachment.size)
        except OSError as error:
            raise GuestMemoryError(f"cannot share {attachment.size} bytes: {error.strerror}") from error
        slot = self._free_slots.pop() if self._free_slots else self._next_slot
        self._next_slot = max(self._next_slot, slot + 1)
        undo.callback(self._free_slots.append, slot)
        self._vm.set_user_memory_region(slot, attachment.base, attachment.size, pages.host_address)
        # The view keeps the pages until nobody looks at them.
        undo.callback(self._vm.set_user_memory_region, slot, attachment.base, 0, pages.host_address)
        attachment.memory = pages.bytes

    def _install_doorbell(self, attachment: Attachment, offset: int, undo: ExitStack) -> None:
        base, size, pio = attachment.base, attachment.size, attachment.pio
        if size not in (1, 2, 4, 8):
            raise ConfigError(f"a doorbell is written with 1, 2, 4 or 8 bytes, not {size}")
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        undo.callback(os.close, fd)
        self._vm.ioeventfd(base, fd, size, pio=pio)
        undo.callback(lambda: self._vm.ioeventfd(base, fd, size, pio=pio, deassign=True))
        attachment._bell = _Doorbell(self._loop, self._spawn, attachment, offset, fd, self._on_failed)
        undo.callback(attachment._bell.close)

    def _run(self, device: Device) -> None:
        # A device that has not defined one needs no task.
        if type(device).run is Device.run or id(device) in self._tasks:
            return

        async def run() -> None:
            try:
                await device.run()
            except Exception as error:
                self._device_failed(device, "run", error)

        self._tasks[id(device)] = self._spawn(run, f"{type(device).__name__}.run")

    def _spawn(self, work: Callable[[], Awaitable[None]], name: str) -> Task:
        async def run() -> None:
            try:
                await work()
            finally:
                self._alive.discard(task)

        task = self._loop.spawn(run, name)
        self._alive.add(task)
        return task

    def _cancel(self, device: Device) -> None:
        task = self._tasks.pop(id(device), None)
        if task is not None:
            task.cancel()

    def _leave(self, device: Device) -> None:
        for timer in tuple(device._timers or ()):
            timer.cancel()
        self._cancel(device)
        device._loop = None
        vars(device).pop("memory", None)
        device._timers = None
        device._failed = None


def _refuse_kernel(attachment: Attachment) -> None:
    end = attachment.base + attachment.size
    for base, size, whose in KERNEL_PORTS if attachment.pio else KERNEL_MMIO:
        if attachment.base < base + size and base < end:
            raise DeviceError(
                f"{attachment!r} overlaps {base:#x}-{base + size - 1:#x} of {whose}, "
                "which KVM serves itself; choose another address"
            )


class _Doorbell:
    """An eventfd that the guest's writes count up, and the handler that it calls."""

    def __init__(
        self,
        loop: Loop,
        spawn: Callable[[Callable[[], Awaitable[None]], str], Task],
        attachment: Attachment,
        offset: int,
        fd: int,
        on_failed: Callable[[Attachment, str, Exception], None],
    ) -> None:
        self._spawn = spawn
        self._attachment = attachment
        self._offset = offset
        self._fd = fd
        self._on_failed = on_failed
        self._task: Task | None = None
        # What the task has not begun to await.
        self._work: Awaitable[None] | None = None
        self._again = 0
        self._open = True
        self._watch = loop.watch(fd, self._on_rung)

    def forget(self) -> None:
        """What the guest wrote before it was reset is nobody's any more."""
        self._again = 0
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def end(self) -> None:
        """The machine has ended: what the guest wrote before that is the last. Idempotent."""
        if self._open:
            self._on_rung()
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._open = False
        self._watch.cancel()
        if self._task:
            self._task.cancel()
        if self._work is not None and hasattr(self._work, "close"):
            self._work.close()
            self._work = None

    def _on_rung(self) -> None:
        try:
            self._again += os.eventfd_read(self._fd)
        except BlockingIOError:
            return
        if self._task is None:
            self._call()

    def _call(self) -> None:
        count, self._again = self._again, 0
        try:
            work = self._attachment.device.doorbell(self._offset, count)
        except Exception as error:
            self._on_failed(self._attachment, "doorbell", error)
            return
        if work is not None:
            self._work = work
            self._task = self._spawn(self._finish, "aiokvm doorbell")

    async def _finish(self) -> None:
        work, self._work = self._work, None
        if work is None:
            return  # closed before it began
        try:
            await work
        except Exception as error:
            self._on_failed(self._attachment, "doorbell", error)
        self._task = None
        if self._again and self._open:
            self._call()
