"""The state and the arguments of a VM, as the structures of linux/kvm.h and asm/kvm.h spell them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from aiokvm.kvm.convert import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class PicState(Struct):
    """One 8259A (struct kvm_pic_state)."""

    c_name: ClassVar[str] = "kvm_pic_state"
    last_irr: int = 0
    irr: int = 0
    imr: int = 0
    isr: int = 0
    priority_add: int = 0
    irq_base: int = 0
    read_reg_select: int = 0
    poll: int = 0
    special_mask: int = 0
    init_state: int = 0
    auto_eoi: int = 0
    rotate_on_auto_eoi: int = 0
    special_fully_nested_mode: int = 0
    init4: int = 0
    elcr: int = 0
    elcr_mask: int = 0


@dataclass(frozen=True, slots=True)
class IoapicState(Struct):
    """The I/O APIC (struct kvm_ioapic_state); ``redirtbl`` are its 24 entries of 64 bits (82093AA, 3.2.4)."""

    c_name: ClassVar[str] = "aiokvm_ioapic_state"
    base_address: int = 0xFEC0_0000
    ioregsel: int = 0
    id: int = 0
    irr: int = 0
    redirtbl: tuple[int, ...] = (1 << 16,) * 24


@dataclass(frozen=True, slots=True)
class PitChannelState(Struct):
    """A channel of the 8254 (struct kvm_pit_channel_state); ``count_load_time`` in ns of the host's clock."""

    c_name: ClassVar[str] = "kvm_pit_channel_state"
    count: int = 0
    latched_count: int = 0
    count_latched: int = 0
    status_latched: int = 0
    status: int = 0
    read_state: int = 0
    write_state: int = 0
    write_latch: int = 0
    rw_mode: int = 0
    mode: int = 0
    bcd: int = 0
    gate: int = 0
    count_load_time: int = 0


@dataclass(frozen=True, slots=True)
class PitState2(Struct):
    """The 8254 (struct kvm_pit_state2); ``flags`` of KVM_PIT_FLAGS_*."""

    c_name: ClassVar[str] = "kvm_pit_state2"
    channels: tuple[PitChannelState, ...] = (PitChannelState(),) * 3
    flags: int = 0


@dataclass(frozen=True, slots=True)
class ClockData(Struct):
    """kvmclock (struct kvm_clock_data): ``clock`` and ``realtime`` in ns, ``flags`` of KVM_CLOCK_*."""

    c_name: ClassVar[str] = "kvm_clock_data"
    clock: int
    flags: int = 0
    realtime: int = 0
    host_tsc: int = 0


@dataclass(frozen=True, slots=True)
class Msi(Struct):
    """A message signalled interrupt (struct kvm_msi)."""

    c_name: ClassVar[str] = "kvm_msi"
    address_lo: int
    address_hi: int = 0
    data: int = 0
    flags: int = 0
    devid: int = 0


@dataclass(frozen=True, slots=True)
class MsrFilterRange:
    """``nmsrs`` MSRs from ``base`` (struct kvm_msr_filter_range).

    ``flags`` of KVM_MSR_FILTER_READ and _WRITE name the accesses that ``bitmap`` is about: bit n of it,
    lowest bit first, allows MSR ``base + n`` where it is 1.
    """

    flags: int
    base: int
    nmsrs: int
    bitmap: bytes


@dataclass(frozen=True, slots=True)
class DirtyLog:
    """The pages of a slot that were written: bit n of ``bitmap``, lowest first, is page n."""

    slot: int
    bitmap: bytes

    def pages(self) -> Iterator[int]:
        """Yield the numbers of the dirty pages, counted from the slot's begin, in order."""
        for index, byte in enumerate(self.bitmap):
            while byte:
                low = byte & -byte
                yield index * 8 + low.bit_length() - 1
                byte ^= low


@dataclass(frozen=True, slots=True)
class DirtyGfn(Struct):
    """An entry of a dirty ring (struct kvm_dirty_gfn).

    ``slot`` has the address space in its upper 16 bits; ``offset`` is the page's number, counted from the
    slot's begin.
    """

    c_name: ClassVar[str] = "kvm_dirty_gfn"
    slot: int
    offset: int


@dataclass(frozen=True, slots=True)
class CoalescedMmio:
    """A write that KVM put aside (struct kvm_coalesced_mmio): ``data`` has as many bytes as were written."""

    phys_addr: int
    data: bytes
    pio: bool
