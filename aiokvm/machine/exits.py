"""The way of an exit on the loop's side: mailbox, bus, reply.

The vCPU threads of the C core look an address up in the table that is published here, put what needs Python
into their mailbox and ring the doorbell. `Exits` takes what has come in one call, asks the device on the bus
and replies. What is not an access to a device is handed to the machine.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Protocol

from aiokvm._core import ffi, lib
from aiokvm.errors import AiokvmError, StateError
from aiokvm.hw.bus import MMIO_LIMIT, PIO_LIMIT, Bus, PostedWrites
from aiokvm.kvm import KvmExit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiokvm._core import Pointer
    from aiokvm.aio import Loop
    from aiokvm.hw.bus import BusDevice, Region

# As plain integers: an enum's members cost a look-up each, on every exit.
_KVM_EXIT_IO = int(KvmExit.KVM_EXIT_IO)
_KVM_EXIT_MMIO = int(KvmExit.KVM_EXIT_MMIO)

_LATCH = f"uint32_t[{lib.AIOKVM_FAST_OFFSETS}]"

# How many exits are answered before the loop gets to look at its other descriptors.
BATCH = 32


class Listener(Protocol):
    """Who is told what is not an access to a device."""

    def on_parked(self, index: int) -> None:
        """The vCPU stands still."""

    def on_stopped(self, index: int) -> None:
        """The vCPU's thread has ended."""

    def on_exit(self, index: int, reason: int, error: int) -> None:
        """KVM_RUN returned with an exit_reason that no device answers, or failed with errno ``error``.

        The vCPU runs on when this returns, unless it was told to stop.
        """


def check(result: int, what: str) -> int:
    """The result of a call into the core; a negative one is an errno, and raised."""
    if result >= 0:
        return result
    error = -result
    if error == _EOWNERDEAD:
        raise StateError(NOT_INHERITED)
    raise AiokvmError(f"{what}: {os.strerror(error)} (errno {error})")


_EOWNERDEAD = 130
NOT_INHERITED = "the machine belongs to the process that created it: a fork does not inherit it"


class _Latch:
    """What reads of a device's first offsets give without the loop."""

    def __init__(self, words: Pointer) -> None:
        self._words = words

    def __call__(self, offset: int, value: int | None) -> None:
        lib.aiokvm_latch_set(self._words, offset, -1 if value is None else value)


class Exits:
    """The exits of one machine.

    ``pio`` and ``mmio`` are its buses; a change to them takes effect with `publish`.
    """

    def __init__(self, loop: Loop, listener: Listener, name: str) -> None:
        code = ffi.new("int *")
        core = lib.aiokvm_machine_new(code)
        if not core:
            raise AiokvmError(f"cannot create machine {name}: {os.strerror(code[0])} (errno {code[0]})")
        self.core = core
        self.pio = Bus(PIO_LIMIT)
        self.mmio = Bus(MMIO_LIMIT)
        self._devices: dict[tuple[int, int], BusDevice] = {}
        # What the vCPU threads read belongs to cffi objects: they must live as long as the machine.
        self._latches: dict[PostedWrites, Pointer] = {}
        self._vcpus: Sequence[Pointer] = ()
        self._listener = listener
        self._loop = loop
        self._logger = logging.LoggerAdapter(logging.getLogger(__name__), {"machine": name})
        self._news = ffi.new("struct aiokvm_news[]", BATCH)
        self._open = True
        self._watch = loop.watch(lib.aiokvm_machine_doorbell(core), self._take)

    def publish(self) -> None:
        """Tell the vCPU threads which addresses the buses claim."""
        self._devices = {}
        for number, bus in ((lib.AIOKVM_BUS_PIO, self.pio), (lib.AIOKVM_BUS_MMIO, self.mmio)):
            regions: list[Region] = list(bus)
            table = ffi.new("struct aiokvm_region[]", len(regions))
            for entry, region in zip(table, regions, strict=True):
                device = region.device
                entry.base, entry.size, entry.id = region.base, region.size, region.id
                if isinstance(device, PostedWrites):
                    entry.posted = sum(1 << offset for offset in device.posted_offsets)
                    entry.latch = self._latches.setdefault(device, ffi.new(_LATCH))
                    device.connect_latch(_Latch(entry.latch))
                self._devices[number, region.id] = device
            check(lib.aiokvm_machine_publish(self.core, number, table, len(regions)), "publishing the bus")

    def serve(self, vcpus: Sequence[Pointer]) -> None:
        """The core's vCPUs, by index."""
        self._vcpus = vcpus

    def check_owner(self) -> None:
        """Raises StateError in a child of fork, which shares descriptors with its parent, the loop's too."""
        if self._open and not lib.aiokvm_machine_alive(self.core):
            raise StateError(NOT_INHERITED)

    def close(self) -> None:
        """No vCPU thread may be left. Idempotent."""
        if self._open:
            self._open = False
            self._watch.cancel()
            lib.aiokvm_machine_free(self.core)

    def _take(self) -> None:
        if not self._open:
            return
        news = self._news
        count = check(lib.aiokvm_machine_take(self.core, news, BATCH), "taking exits")
        for i in range(count):
            item = news[i]
            state = item.state
            if state == lib.AIOKVM_VCPU_EXIT:
                self._on_exit(item)
            elif state == lib.AIOKVM_POSTED:
                self._on_posted(item)
            elif state == lib.AIOKVM_VCPU_PARKED:
                self._listener.on_parked(item.vcpu)
            elif state == lib.AIOKVM_VCPU_STOPPED:
                self._listener.on_stopped(item.vcpu)

    def _on_exit(self, item: Pointer) -> None:
        vcpu = self._vcpus[item.vcpu]
        seq, reason, error = item.seq, item.reason, item.error
        if error or reason not in (_KVM_EXIT_IO, _KVM_EXIT_MMIO):
            self._listener.on_exit(item.vcpu, reason, error)
            lib.aiokvm_vcpu_skip(vcpu, seq)
            return
        device = self._devices.get((item.bus, item.region))
        offset, size = item.offset, item.size
        ones = (1 << 8 * size) - 1
        if device is None:
            # It was detached while the exit was on its way.
            lib.aiokvm_vcpu_reply(vcpu, seq, ones)
        elif item.count != 1:
            self._string(device, vcpu, item)
        elif item.is_write:
            try:
                device.write(offset, size, item.value)
            except Exception:
                self._failed(device, "write", offset, size)
            lib.aiokvm_vcpu_skip(vcpu, seq)
        else:
            value = ones
            try:
                value = device.read(offset, size) & ones
            except Exception:
                self._failed(device, "read", offset, size)
            lib.aiokvm_vcpu_reply(vcpu, seq, value)

    def _on_posted(self, item: Pointer) -> None:
        device = self._devices.get((item.bus, item.region))
        if not isinstance(device, PostedWrites):
            return  # detached meanwhile
        first, count, offset = item.value, item.count, item.offset
        data = ffi.buffer(lib.aiokvm_machine_posted(self.core) + first, count)
        try:
            device.write_posted(offset, bytes(data))
        except Exception:
            self._failed(device, "posted write", offset, count)

    def _string(self, device: BusDevice, vcpu: Pointer, item: Pointer) -> None:
        """Rep ins or outs: count accesses to one address."""
        seq, offset, size = item.seq, item.offset, item.size
        ones = (1 << 8 * size) - 1
        data = memoryview(ffi.buffer(lib.aiokvm_vcpu_data(vcpu), size * item.count)).cast("B")
        try:
            if not item.is_write:
                data[:] = b"\xff" * len(data)
            for start in range(0, len(data), size):
                if item.is_write:
                    device.write(offset, size, int.from_bytes(data[start : start + size], "little"))
                else:
                    data[start : start + size] = (device.read(offset, size) & ones).to_bytes(size, "little")
        except Exception:
            self._failed(device, "string access", offset, size)
        lib.aiokvm_vcpu_skip(vcpu, seq)

    def _failed(self, device: BusDevice, access: str, offset: int, size: int) -> None:
        self._logger.exception(
            "%s: %s of %d bytes at offset %#x failed", type(device).__name__, access, size, offset
        )
