"""The virtio devices of one machine: where they lie, and by which GSIs they interrupt."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from aiokvm.boot.acpi import MAX_VIRTIO, VirtioMmio
from aiokvm.errors import ConfigError, DeviceError
from aiokvm.machine.device import Device, RegionMode
from aiokvm.machine.irq import GSIS
from aiokvm.machine.platform import CMOS_GSI, I8042_GSI, SCI_GSI, SERIAL_PORTS
from aiokvm.machine.turn import Slice

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiokvm import kvm
    from aiokvm.aio import Loop
    from aiokvm.machine.attachments import Attachment, Attachments
    from aiokvm.machine.config import Config
    from aiokvm.machine.exits import Exits
    from aiokvm.machine.failures import Failures
    from aiokvm.machine.virtio_host import VirtioAttachment
    from aiokvm.memory import GuestMemory
    from aiokvm.virtio.device import VirtioDevice

# In the PCI hole, which has nothing else.
VIRTIO_BASE = 0xD000_0000
VIRTIO_SIZE = 0x1000
SHARED_BASE = VIRTIO_BASE + MAX_VIRTIO * VIRTIO_SIZE
SHARED_END = 0xF000_0000
# How long a reset and the end wait for what devices have in flight: a slow disk's last writes.
DRAIN_SECONDS = 60.0

_TIMER_GSIS = (0, 2)


class Place(NamedTuple):
    """Where a device's registers lie, ``VIRTIO_SIZE`` bytes, and what it interrupts by."""

    base: int
    gsi: int


def places(config: Config) -> Iterator[Place]:
    """The places of a machine's virtio devices, one after the other; GSIs are shared when all are taken."""
    serial = [gsi for _, gsi in SERIAL_PORTS[: config.serial_ports]]
    taken = {*_TIMER_GSIS, I8042_GSI, CMOS_GSI, SCI_GSI, *serial}
    # Those that only an I/O APIC has are nobody's on a PC.
    free = [*range(16, GSIS), *(gsi for gsi in range(16) if gsi not in taken)]
    for index in range(MAX_VIRTIO):
        gsi = free[index] if index < len(free) else free[index % 8]
        yield Place(VIRTIO_BASE + index * VIRTIO_SIZE, gsi)


def described(taken: Iterable[Place]) -> tuple[VirtioMmio, ...]:
    """The devices at these places, for the ACPI tables."""
    taken = tuple(taken)
    users = Counter(place.gsi for place in taken)
    return tuple(VirtioMmio(base, VIRTIO_SIZE, gsi, shared=users[gsi] > 1) for base, gsi in taken)


class VirtioDevices:
    """All of one machine."""

    def __init__(
        self,
        loop: Loop,
        config: Config,
        exits: Exits,
        vm: kvm.Vm,
        memory: GuestMemory,
        attachments: Attachments,
        failures: Failures,
    ) -> None:
        self._loop = loop
        self._exits = exits
        self._vm = vm
        self._memory = memory
        self._attachments = attachments
        self._failures = failures
        self._places = places(config)
        self._next_shared = SHARED_BASE
        self._all: list[VirtioAttachment] = []

    def __iter__(self) -> Iterator[VirtioAttachment]:
        return iter(tuple(self._all))

    @property
    def places(self) -> tuple[Place, ...]:
        """Of the devices that are attached, in their order."""
        return tuple(Place(attachment.base, attachment.gsi) for attachment in self._all)

    def attach(self, device: VirtioDevice) -> VirtioAttachment:
        """As `VM.attach_virtio`; nothing has changed if it raises."""
        from aiokvm.machine.virtio_host import VirtioAttachment

        name = type(device).__name__
        if device._host is not None:
            raise DeviceError(f"{name} is attached to a machine already")
        place = self._free_place()
        shared: dict[int, Attachment] = {}
        try:
            for shmid, size in device.shared_memory.items():
                shared[shmid] = self._share(size)
            attachment = VirtioAttachment(
                device,
                base=place.base,
                gsi=place.gsi,
                loop=self._loop,
                exits=self._exits,
                vm=self._vm,
                memory=self._memory,
                shared={shmid: (pages.base, pages.memory) for shmid, pages in shared.items() if pages.memory},
                on_failed=partial(self._failures.on_failed, name),
                on_needs_reset=partial(self._failures.on_needs_reset, name),
            )
        except BaseException:
            for pages in shared.values():
                self._attachments.detach(pages)
            raise
        self._all.append(attachment)
        return attachment

    def start(self) -> None:
        """The machine runs: so do the devices' tasks."""
        for attachment in self._all:
            attachment.start()

    async def reset(self, seconds: float) -> None:
        """The machine is reset: returns when no device touches a buffer any more.

        Raises DeviceError, with devices that have not been reset, if that takes longer than ``seconds``.
        """
        if not self._all:
            return
        import anyio

        with anyio.move_on_after(seconds):
            for attachment in self._all:
                try:
                    await attachment.system_reset()
                except Exception as error:
                    self._failures.on_failed(type(attachment.device).__name__, "reset", error)
            return
        raise DeviceError(
            f"{type(attachment.device).__name__} at {attachment.base:#x} still has in flight what it had "
            f"{seconds:g} s before, when it was reset"
        )

    def stop(self) -> None:
        """The machine has ended. Idempotent."""
        for attachment in self._all:
            attachment.stop()

    async def finished(self) -> None:
        """Waits until nothing is in flight and the devices have given back what they hold.

        All at once: one that does not come to an end keeps no other from it.
        """
        if not self._all:
            return
        import anyio

        async with anyio.create_task_group() as tasks:
            for attachment in self._all:
                tasks.start_soon(attachment.finished)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        while self._all:
            self._all.pop().close()

    async def aclose(self) -> None:
        """The same, with turns for the loop: the kernel takes half a millisecond for each queue."""
        pace = Slice()
        while self._all:
            self._all.pop().close()
            if pace.is_over():
                await self._loop.turn()
                pace.begin()

    def _free_place(self) -> Place:
        for place in self._places:
            if self._exits.mmio.lookup(place.base) is None:
                return place
        raise ConfigError(f"a machine has at most {MAX_VIRTIO} virtio devices")

    def _share(self, size: int) -> Attachment:
        base = self._next_shared
        if size <= 0 or base + size > SHARED_END:
            raise ConfigError(f"shared memory of {size} bytes: there are {SHARED_END - base} left")
        attachment = self._attachments.attach(Device(), mmio=base, size=size, mode=RegionMode.MEMORY)
        self._next_shared += size
        return attachment
