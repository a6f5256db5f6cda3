"""A VM's interrupts: the in-kernel controllers and timer, gsi routing, irqfd, MSI (KVM API, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiokvm._core import ffi
from aiokvm.kvm.constants import KVM_IRQCHIP_IOAPIC, KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE
from aiokvm.kvm.convert import from_c, to_c, to_initializer
from aiokvm.kvm.ioctl import Handle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiokvm.kvm.routing import IrqRoutingEntry
    from aiokvm.kvm.vm_structs import IoapicState, Msi, PicState, PitState2


class InterruptIoctls(Handle):
    """The requests of a VM that concern its interrupts."""

    def create_irqchip(self) -> None:
        """Create two 8259A, an I/O APIC and local APICs for the vCPUs to come; it precedes the first vCPU."""
        self.ioctl("KVM_CREATE_IRQCHIP")

    def get_irqchip(self, chip_id: int) -> PicState | IoapicState:
        """Return the state of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        from aiokvm.kvm.vm_structs import IoapicState, PicState

        chip = ffi.new("struct kvm_irqchip *", {"chip_id": chip_id})
        self.ioctl("KVM_GET_IRQCHIP", chip)
        if chip_id == KVM_IRQCHIP_IOAPIC:
            return from_c(IoapicState, ffi.cast(f"struct {IoapicState.c_name} *", ffi.addressof(chip.chip)))
        return from_c(PicState, chip.chip.pic)

    def set_irqchip(self, chip_id: int, state: PicState | IoapicState) -> None:
        """Set the state of an interrupt controller."""
        from aiokvm.kvm.vm_structs import IoapicState

        if isinstance(state, IoapicState) != (chip_id == KVM_IRQCHIP_IOAPIC):
            raise ValueError(f"chip_id {chip_id} does not go with {type(state).__name__}")
        chip = ffi.new("struct kvm_irqchip *", {"chip_id": chip_id})
        c = to_c(state)
        ffi.memmove(ffi.addressof(chip.chip), c, ffi.sizeof(c[0]))
        self.ioctl("KVM_SET_IRQCHIP", chip)

    def create_pit2(self, flags: int = 0) -> None:
        """Create an 8254; ``flags`` of KVM_PIT_SPEAKER_DUMMY. It needs ``create_irqchip``."""
        self.ioctl("KVM_CREATE_PIT2", ffi.new("struct kvm_pit_config *", {"flags": flags}))

    def get_pit2(self) -> PitState2:
        """Return the 8254's state."""
        from aiokvm.kvm.vm_structs import PitState2

        return self._get("KVM_GET_PIT2", PitState2)

    def set_pit2(self, state: PitState2) -> None:
        """Set the 8254's state."""
        self._set("KVM_SET_PIT2", state)

    def reinject_control(self, pit_reinject: bool) -> None:
        """Say whether the PIT's ticks that the guest missed are made up for."""
        arg = ffi.new("struct kvm_reinject_control *", {"pit_reinject": pit_reinject})
        self.ioctl("KVM_REINJECT_CONTROL", arg)

    def irq_line(self, gsi: int, level: bool | int) -> None:
        """Set the level of an interrupt line (KVM_IRQ_LINE)."""
        arg = ffi.new("struct kvm_irq_level *")
        arg.irq = gsi
        arg.level = level
        self.ioctl("KVM_IRQ_LINE", arg)

    def irq_line_status(self, gsi: int, level: bool | int) -> int:
        """Set a line's level; return how many CPUs got it, 0 where one waits already, -1 where masked."""
        arg = ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": level})
        self.ioctl("KVM_IRQ_LINE_STATUS", arg)
        return int(arg.status)

    def set_gsi_routing(self, entries: Iterable[IrqRoutingEntry]) -> None:
        """Replace the whole routing table (KVM_CAP_IRQ_ROUTING)."""
        table: list[dict[str, Any]] = [
            {
                "gsi": entry.gsi,
                "type": entry.route.type,
                "flags": entry.flags,
                "u": {entry.route.member: to_initializer(entry.route)},
            }
            for entry in entries
        ]
        self.ioctl(
            "KVM_SET_GSI_ROUTING", ffi.new("struct kvm_irq_routing *", {"nr": len(table), "entries": table})
        )

    def irqfd(self, fd: int, gsi: int, *, resample_fd: int | None = None, deassign: bool = False) -> None:
        """Let a write to the eventfd ``fd`` raise ``gsi`` (KVM_CAP_IRQFD).

        With ``resample_fd`` the line is level triggered: it falls when the guest ends the interrupt, and that
        eventfd is signalled (KVM_CAP_IRQFD_RESAMPLE).
        """
        flags = KVM_IRQFD_FLAG_DEASSIGN if deassign else 0
        if resample_fd is not None:
            flags |= KVM_IRQFD_FLAG_RESAMPLE
        arg = {"fd": fd, "gsi": gsi, "flags": flags, "resamplefd": resample_fd or 0}
        self.ioctl("KVM_IRQFD", ffi.new("struct kvm_irqfd *", arg))

    def signal_msi(self, msi: Msi) -> int:
        """Send a message; return how many CPUs got it, 0 where the guest blocks it (KVM_CAP_SIGNAL_MSI)."""
        return self._set("KVM_SIGNAL_MSI", msi)
