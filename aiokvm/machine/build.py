"""What comes before a machine: its plan, from files and settings, and its hardware."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from aiokvm.boot import acpi
from aiokvm.boot.layout import RESET_VECTOR
from aiokvm.boot.plan import GuestInfo, Segment, check_plan
from aiokvm.boot.resetvector import reset_vector
from aiokvm.hw.resetports import RESET_VECTOR_PORT
from aiokvm.machine.files import read_files
from aiokvm.machine.hardware import Hardware
from aiokvm.machine.platform import acpi_platform
from aiokvm.machine.virtio import VIRTIO_SIZE, described
from aiokvm.memory import ram_ranges

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AsyncExitStack

    from aiokvm.aio import Loop
    from aiokvm.boot import BootPlan
    from aiokvm.machine.config import Config
    from aiokvm.machine.virtio import Place

# A copy that takes a fraction of a millisecond.
PIECE_BYTES = 1 << 20


def poll_ns(config: Config) -> int:
    """How long the machine may poll."""
    # On one CPU whoever polls keeps the other from answering.
    return config.poll_ns if len(os.sched_getaffinity(0)) > 1 else 0


def acpi_tables(config: Config, virtio: Iterable[Place]) -> acpi.Tables:
    """The tables of a machine with virtio devices at these places."""
    return acpi.build(acpi_platform(config, described(virtio)), limit=RESET_VECTOR)


async def boot_plan(loop: Loop, config: Config, virtio: Iterable[Place] = ()) -> BootPlan:
    """What has to be in RAM and registers; nothing has been allocated for it."""
    virtio = tuple(virtio)
    tables = acpi_tables(config, virtio)
    files = await read_files(loop, config.boot.files(), config.memory_bytes)
    guest = GuestInfo(
        ram=ram_ranges(config.memory_bytes),
        rsdp=tables.rsdp,
        virtio_mmio=tuple((base, VIRTIO_SIZE, gsi) for base, gsi in virtio),
    )
    booted = config.boot.plan(files, guest)
    check_plan(booted, guest)
    vector = reset_vector(RESET_VECTOR_PORT)
    return replace(booted, segments=(*booted.segments, Segment(tables.gpa, tables.data), vector))


async def load(loop: Loop, hardware: Hardware, plans: list[BootPlan]) -> None:
    """Put what is booted into RAM and registers, a piece at a time: the loop has other machines.

    Takes the plan out of its list, which is the last that has it: a worker frees it, as that may take long.
    """
    for segment in plans[0].segments:
        await _put(loop, hardware, segment)
    del segment
    hardware.set_cpu_state(plans[0].cpu)
    await loop.in_thread(plans.clear)


async def _put(loop: Loop, hardware: Hardware, segment: Segment) -> None:
    data = memoryview(segment.data).cast("B")
    for start in range(0, len(data), PIECE_BYTES):
        hardware.memory.write(segment.gpa + start, data[start : start + PIECE_BYTES])
        await loop.turn()


async def build_hardware(loop: Loop, config: Config, undo: AsyncExitStack) -> Hardware:
    """The hardware, which takes the kernel a while; closed by ``undo``, also if this is cancelled."""

    async def make() -> Hardware:
        hardware = await loop.in_thread(partial(Hardware, config))
        undo.callback(hardware.close)
        return hardware

    return await loop.uncancelled(make)
