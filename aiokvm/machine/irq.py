"""A device's interrupt: a GSI, by irqfd or as a level, or a message."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from aiokvm.aio.owner import owned
from aiokvm.arguments import checked
from aiokvm.errors import ConfigError, StateError

if TYPE_CHECKING:
    from aiokvm import kvm
    from aiokvm.aio import Loop

# Inputs of the I/O APIC; the first 16 are also those of the PICs, whose cascade is no input.
GSIS = 24
_CASCADE = 2


class Irq:
    """A device's interrupt, `Device.irq`: an input of the interrupt controllers, or a message."""

    _owner: Loop | None = None

    gsi: int | None = None
    """The input (global system interrupt) that it drives; None for a message."""

    def pulse(self) -> None:
        """Interrupt once: an edge, or a message. Raises StateError when the device is detached."""
        raise NotImplementedError

    @checked
    def set(self, level: bool) -> None:
        """Drive the line high or low, where it stays until it is driven again; a detached one is low.

        Raises ConfigError for a message, which has no level, and StateError as `pulse` does.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """The interrupt controllers are as new: have them know of a line that is high."""

    def close(self) -> None:
        """Lower the line and give it back. Idempotent."""


@owned
class GsiIrq(Irq):
    """An input of the interrupt controllers. Pulses go by the irqfd ``fd``, which others may write, too."""

    def __init__(self, vm: kvm.Vm, gsi: int) -> None:
        if not 0 <= gsi < GSIS or gsi == _CASCADE:
            raise ConfigError(
                f"irq {gsi} is no input of the interrupt controllers: 0 to {GSIS - 1}, without 2"
            )
        self.gsi = gsi
        self._vm = vm
        self._level = False
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            vm.irqfd(self.fd, gsi)
        except BaseException:
            os.close(self.fd)
            raise

    def pulse(self) -> None:
        if self.fd < 0:
            raise StateError("the device is not attached any more")
        os.eventfd_write(self.fd, 1)

    @checked
    def set(self, level: bool) -> None:
        if self.fd < 0:
            raise StateError("the device is not attached any more")
        if level != self._level:
            self._level = level
            assert self.gsi is not None
            self._vm.irq_line(self.gsi, level)

    def reset(self) -> None:
        # KVM takes the line for what it was, and requests nothing if it is set to that once more.
        if self._level:
            self.set(False)
            self.set(True)

    def close(self) -> None:
        if self.fd >= 0:
            self.set(False)
            assert self.gsi is not None
            self._vm.irqfd(self.fd, self.gsi, deassign=True)
            os.close(self.fd)
            self.fd = -1


@owned
class MsiIrq(Irq):
    """A message: ``data`` written to ``address`` (Intel SDM volume 3, section 11.11)."""

    def __init__(self, vm: kvm.Vm, address: int, data: int) -> None:
        from aiokvm.kvm.vm_structs import Msi

        if not 0 <= address < 1 << 64 or not 0 <= data < 1 << 32:
            raise ConfigError(f"msi: address {address:#x} has 64 bits and data {data:#x} has 32")
        self._vm: kvm.Vm | None = vm
        self._msi = Msi(address & 0xFFFF_FFFF, address >> 32, data)

    def pulse(self) -> None:
        if self._vm is None:
            raise StateError("the device is not attached any more")
        self._vm.signal_msi(self._msi)

    @checked
    def set(self, level: bool) -> None:  # noqa: ARG002
        raise ConfigError("a message signalled interrupt has no level: use pulse()")

    def close(self) -> None:
        self._vm = None
