"""What a guest does to its machine's power: it turns it off, resets it, or breaks down; and what follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.errors import AiokvmError
from aiokvm.kvm import KvmExit
from aiokvm.kvm.constants import (
    KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
)
from aiokvm.machine.events import Exit, ExitReason
from aiokvm.machine.postmortem import describe, explain

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokvm import kvm
    from aiokvm.logs import SeldomLogger
    from aiokvm.machine.hardware import Hardware

# Where a PC begins, and where a guest's INIT to its boot processor leads: there is no firmware.
_TOP_OF_FIRMWARE = 0xFFFF_FFF0


class Power:
    """Tells the machine what follows from what its guest did.

    ``end`` ends it. ``reboot`` has it begin anew and is told what caused that; None if a reset ends it, too.
    Until `rebooted` is called, further causes are a part of the first.
    """

    def __init__(
        self,
        machine: str,
        hardware: Hardware,
        logger: SeldomLogger,
        end: Callable[[Exit], None],
        reboot: Callable[[str], None] | None,
    ) -> None:
        self._machine = machine
        self._hardware = hardware
        self._logger = logger.kind()
        self._end = end
        self._reboot = reboot
        self.is_rebooting = False
        """Whether the guest has reset the machine, which has not begun anew yet."""

    def rebooted(self) -> None:
        """The machine has begun anew."""
        self.is_rebooting = False

    # Told by the devices.

    def set_irq_line(self, gsi: int, level: bool) -> None:
        """A device drives its interrupt."""
        self._hardware.vm.irq_line(gsi, level)

    def on_shutdown(self) -> None:
        """The guest turned itself off."""
        self._end(Exit(ExitReason.SHUTDOWN))

    def on_reset_request(self, cause: str) -> None:
        """The guest asked for a reset, by ``cause``."""
        if self._reboot is None:
            self._end(Exit(ExitReason.RESET, detail=cause))
        elif not self.is_rebooting:
            self.is_rebooting = True
            self._reboot(cause)

    def on_debug_exit(self, code: int) -> None:
        """The guest wrote to the debug-exit port."""
        self._end(Exit(ExitReason.DEBUG_EXIT, code=code))

    # Told by the vCPUs.

    def on_exit(self, index: int, reason: int, error: int) -> None:
        """A vCPU's KVM_RUN came back with what no device can answer."""
        if self.is_rebooting:
            return
        vcpu = self._hardware.vcpus[index]
        who = f"vCPU {index}"
        if error:
            self._broken(ExitReason.ERROR, f"{who}: {explain(vcpu.run_state, reason, error)}", vcpu)
        elif reason == KvmExit.KVM_EXIT_SYSTEM_EVENT:
            self._on_system_event(f"{who}: ", vcpu)
        elif reason == KvmExit.KVM_EXIT_SHUTDOWN:
            detail = describe(f"{who}: triple fault", vcpu, self._hardware.memory)
            self._logger.error("%s: %s", self._machine, detail)
            self.on_reset_request(detail)
        elif reason == KvmExit.KVM_EXIT_INTERNAL_ERROR and _is_at_reset_vector(vcpu):
            # KVM cannot fetch an instruction where no memory is.
            self.on_reset_request(f"{who}: jump to the reset vector")
        else:
            self._broken(ExitReason.ERROR, f"{who}: {explain(vcpu.run_state, reason, error)}", vcpu)

    def _on_system_event(self, who: str, vcpu: kvm.Vcpu) -> None:
        kind = vcpu.run_state.system_event.type
        if kind == KVM_SYSTEM_EVENT_SHUTDOWN:
            self.on_shutdown()
        elif kind == KVM_SYSTEM_EVENT_RESET:
            self.on_reset_request(f"{who}KVM_SYSTEM_EVENT_RESET")
        elif kind == KVM_SYSTEM_EVENT_CRASH:
            self._broken(ExitReason.CRASH, f"{who}KVM_SYSTEM_EVENT_CRASH", vcpu)
        else:
            self._broken(ExitReason.ERROR, f"{who}system event {kind}, which is unknown here", vcpu)

    def _broken(self, reason: ExitReason, what: str, vcpu: kvm.Vcpu) -> None:
        detail = describe(what, vcpu, self._hardware.memory)
        self._logger.error("%s: %s", self._machine, detail)
        self._end(Exit(reason, detail=detail))


def _is_at_reset_vector(vcpu: kvm.Vcpu) -> bool:
    try:
        linear = vcpu.get_sregs().cs.base + vcpu.get_regs().rip
        found = vcpu.translate(linear & (1 << 64) - 1)
    except AiokvmError:
        return False
    return bool(found.valid) and found.physical_address == _TOP_OF_FIRMWARE
