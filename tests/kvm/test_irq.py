from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import (
    Cap,
    IoapicState,
    IrqRoutingEntry,
    IrqRoutingHvSint,
    IrqRoutingIrqchip,
    IrqRoutingMsi,
    KvmExit,
    Msi,
    PicState,
    Vcpu,
    Vm,
)
from aiokvm.kvm.constants import (
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kvm.conftest import Guest

pytestmark = pytest.mark.kvm

VECTOR = 0x31


@pytest.fixture
def eventfds() -> Iterator[tuple[int, int]]:
    fds = tuple(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
    yield fds[0], fds[1]
    for fd in fds:
        os.close(fd)


def enable_lapic(vcpu: Vcpu) -> None:
    """Set the software enable bit of the spurious vector register (Intel SDM, volume 3, 11.9)."""
    state = bytearray(vcpu.get_lapic())
    state[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
    vcpu.set_lapic(bytes(state))


def requested(vcpu: Vcpu) -> list[int]:
    """The vectors in the local APIC's interrupt request register."""
    state = vcpu.get_lapic()
    words = [int.from_bytes(state[0x200 + 16 * n : 0x204 + 16 * n], "little") for n in range(8)]
    return [vector for vector in range(256) if words[vector // 32] >> vector % 32 & 1]


def test_pic(chips: Vm) -> None:
    for chip in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE):
        state = chips.get_irqchip(chip)
        assert isinstance(state, PicState)
        changed = replace(state, imr=0xA5, irq_base=0x20)
        chips.set_irqchip(chip, changed)
        assert chips.get_irqchip(chip) == changed


def test_ioapic(chips: Vm) -> None:
    state = chips.get_irqchip(KVM_IRQCHIP_IOAPIC)
    assert isinstance(state, IoapicState)
    assert state.base_address == 0xFEC00000
    assert state.redirtbl == (1 << 16,) * 24
    changed = replace(state, redirtbl=(1 << 16 | 0x55, *state.redirtbl[1:]))
    chips.set_irqchip(KVM_IRQCHIP_IOAPIC, changed)
    assert chips.get_irqchip(KVM_IRQCHIP_IOAPIC) == changed


def test_a_chip_takes_its_own_state_only(chips: Vm) -> None:
    with pytest.raises(ValueError, match="chip_id 2 does not go with PicState"):
        chips.set_irqchip(KVM_IRQCHIP_IOAPIC, PicState())
    with pytest.raises(ValueError, match="chip_id 0 does not go with IoapicState"):
        chips.set_irqchip(KVM_IRQCHIP_PIC_MASTER, IoapicState())


def test_pit(chips: Vm) -> None:
    state = chips.get_pit2()
    changed = replace(state, flags=KVM_PIT_FLAGS_SPEAKER_DATA_ON)
    chips.set_pit2(changed)
    assert chips.get_pit2().flags == KVM_PIT_FLAGS_SPEAKER_DATA_ON
    assert chips.get_pit2().channels[1].count == state.channels[1].count
    chips.reinject_control(False)


def test_without_chips(vm: Vm) -> None:
    for use in (
        lambda: vm.irq_line(4, 1),
        lambda: vm.get_irqchip(0),
        lambda: vm.set_irqchip(0, PicState()),
        vm.get_pit2,
    ):
        with pytest.raises(KvmError, match="create_"):
            use()


def test_irqchip_comes_before_the_vcpus(vm: Vm, vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="before the first vCPU"):
        vm.create_irqchip()


def test_irq_line(chips: Vm) -> None:
    chips.irq_line(4, True)
    state = chips.get_irqchip(KVM_IRQCHIP_PIC_MASTER)
    assert isinstance(state, PicState)
    assert state.last_irr == 1 << 4
    chips.irq_line(4, False)
    state = chips.get_irqchip(KVM_IRQCHIP_PIC_MASTER)
    assert isinstance(state, PicState)
    assert (state.last_irr, state.irr) == (0, 1 << 4)


def test_irq_line_status(chips: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_IRQ_INJECT_STATUS)
    assert chips.irq_line_status(4, 1) == 1
    chips.irq_line_status(4, 0)
    assert chips.irq_line_status(4, 1) == 0


def test_msi(chips: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_SIGNAL_MSI)
    with chips.create_vcpu(0) as vcpu:
        enable_lapic(vcpu)
        assert chips.signal_msi(Msi(0xFEE00000, data=VECTOR)) == 1
        assert requested(vcpu) == [VECTOR]


def test_routing(chips: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_IRQ_ROUTING)
    chips.set_gsi_routing(
        [
            IrqRoutingEntry(4, IrqRoutingIrqchip(KVM_IRQCHIP_PIC_MASTER, 6)),
            IrqRoutingEntry(30, IrqRoutingMsi(0xFEE00000, data=VECTOR)),
        ]
    )
    with chips.create_vcpu(0) as vcpu:
        enable_lapic(vcpu)
        chips.irq_line(30, 1)
        assert requested(vcpu) == [VECTOR]
        chips.irq_line(4, 1)
        state = chips.get_irqchip(KVM_IRQCHIP_PIC_MASTER)
        assert isinstance(state, PicState)
        assert state.irr == 1 << 6
    with pytest.raises(KvmError, match="KVM_SET_GSI_ROUTING"):
        chips.set_gsi_routing([IrqRoutingEntry(1 << 20, IrqRoutingMsi(0))])
    with pytest.raises(KvmError, match="KVM_SET_GSI_ROUTING"):
        chips.set_gsi_routing([IrqRoutingEntry(4, IrqRoutingIrqchip(KVM_IRQCHIP_IOAPIC, 99))])


def test_routes_have_the_types_of_the_uapi() -> None:
    assert (IrqRoutingIrqchip.type, IrqRoutingMsi.type, IrqRoutingHvSint.type) == (1, 2, 4)


def test_irqfd(chips: Vm, guest: Callable[..., Guest], eventfds: tuple[int, int]) -> None:
    trigger, resample = eventfds
    # sti; 1: hlt; jmp 1b; the handler of vector 5: mov al, 0x20; out 0x20, al; out 0x50, al
    g = guest(bytes.fromhex("fb f4 ebfd"))
    g.memory[0x2000:0x2006] = bytes.fromhex("b020 e620 e650")
    g.memory[4 * 5 : 4 * 5 + 4] = b"\x00\x20\x00\x00"
    chips.irqfd(trigger, 5, resample_fd=resample)
    os.eventfd_write(trigger, 1)
    assert g.run() == KvmExit.KVM_EXIT_IO
    assert (g.vcpu.run_state.io.port, g.vcpu.run_state.io.data) == (0x50, b"\x20")
    assert os.eventfd_read(resample) == 1
    with pytest.raises(KvmError, match="raises a gsi of this VM already"):
        chips.irqfd(trigger, 6)
    chips.irqfd(trigger, 5, deassign=True)
    chips.irqfd(trigger, 6)


def test_irqfd_needs_an_eventfd(chips: Vm) -> None:
    with open("/dev/null", "rb") as null, pytest.raises(KvmError, match="no eventfd"):
        chips.irqfd(null.fileno(), 5)
