"""Where interrupts go: the entries of KVM_SET_GSI_ROUTING (struct kvm_irq_routing_entry)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aiokvm.kvm.convert import Struct


@dataclass(frozen=True, slots=True)
class IrqRoutingIrqchip(Struct):
    """A gsi leads to a pin of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""

    member: ClassVar[str] = "irqchip"
    type: ClassVar[int] = 1
    irqchip: int
    pin: int


@dataclass(frozen=True, slots=True)
class IrqRoutingMsi(Struct):
    """A gsi sends a message."""

    member: ClassVar[str] = "msi"
    type: ClassVar[int] = 2
    address_lo: int
    address_hi: int = 0
    data: int = 0
    devid: int = 0


@dataclass(frozen=True, slots=True)
class IrqRoutingHvSint(Struct):
    """A gsi is a synthetic interrupt of Hyper-V."""

    member: ClassVar[str] = "hv_sint"
    type: ClassVar[int] = 4
    vcpu: int
    sint: int


@dataclass(frozen=True, slots=True)
class IrqRoutingXenEvtchn(Struct):
    """A gsi is an event channel of Xen."""

    member: ClassVar[str] = "xen_evtchn"
    type: ClassVar[int] = 5
    port: int
    vcpu: int
    priority: int = 0xFFFF_FFFF


IrqRoute = IrqRoutingIrqchip | IrqRoutingMsi | IrqRoutingHvSint | IrqRoutingXenEvtchn


@dataclass(frozen=True, slots=True)
class IrqRoutingEntry:
    """Where the interrupts of ``gsi`` go (struct kvm_irq_routing_entry)."""

    gsi: int
    route: IrqRoute
    flags: int = 0
