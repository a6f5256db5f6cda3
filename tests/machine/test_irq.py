"""Interrupts of devices: edges by irqfd, levels, messages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import anyio.lowlevel
import pytest

from aiokvm import VM, ConfigError, Device, StateError
from aiokvm.kvm.constants import KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.machine.conftest import Guest

pytestmark = [pytest.mark.anyio, pytest.mark.kvm]

SPIN = b"\xeb\xfe"
# A guest in real mode that counts interrupts of GSI 5, by the PIC, at 0x2000.
COUNT = bytes.fromhex(
    "31 c0 8e d8"  # xor ax, ax; mov ds, ax
    "c7 06 94 00 40 10"  # mov word [0x25 * 4], 0x1040
    "c7 06 96 00 00 00"  # mov word [0x25 * 4 + 2], 0
    "b0 11 e6 20"  # mov al, 0x11; out 0x20, al: ICW1
    "b0 20 e6 21"  # mov al, 0x20; out 0x21, al: ICW2, vectors from 0x20
    "b0 04 e6 21"  # mov al, 4; out 0x21, al: ICW3
    "b0 01 e6 21"  # mov al, 1; out 0x21, al: ICW4
    "b0 df e6 21"  # mov al, 0xdf; out 0x21, al: all masked but 5
    "c6 06 01 20 01"  # mov byte [0x2001], 1: ready
    "fb f4"  # again: sti; hlt
    "eb fc"  # jmp again
).ljust(0x40, b"\0") + bytes.fromhex(
    "fe 06 00 20"  # 0x1040: inc byte [0x2000]
    "50 b0 20 e6 20 58"  # push ax; mov al, 0x20; out 0x20, al: EOI; pop ax
    "cf"  # iret
)


async def until(true: Callable[[], object]) -> None:
    while not true():
        await anyio.lowlevel.checkpoint()


def irr(vm: VM) -> int:
    """Requests of the master PIC."""
    return int(cast("Any", vm._life.hardware.vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER)).irr)


def lapic_irr(vm: VM) -> int:
    """The requests of vCPU 0's local APIC: a bit a vector (Intel SDM volume 3, section 11.8.4)."""
    regs = bytes(vm.vcpus[0].kvm_vcpu.get_lapic())
    words = [int.from_bytes(regs[at : at + 4], "little") for at in range(0x200, 0x280, 0x10)]
    return sum(word << 32 * i for i, word in enumerate(words))


async def test_pulses_reach_the_guest_one_by_one(guest: Guest) -> None:
    device = Device()
    async with guest(COUNT) as vm:
        vm.attach(device, pio=0x300, irq=5)
        assert device.irq.gsi == 5
        await until(lambda: vm.memory.read(0x2001, 1) == b"\x01")
        for count in range(1, 20):
            device.irq.pulse()
            await until(lambda count=count: vm.memory.read(0x2000, 1)[0] == count)  # type: ignore[misc]


async def test_a_pulse_is_requested_of_the_pic(guest: Guest) -> None:
    device = Device()
    async with guest(SPIN) as vm:
        vm.attach(device, pio=0x300, irq=5)
        await vm.pause()
        assert not irr(vm) & 1 << 5
        device.irq.pulse()
        # irqfd works on a kernel thread of its own.
        await until(lambda: irr(vm) & 1 << 5)


async def test_a_level_stays_until_it_is_driven_again(guest: Guest) -> None:
    device = Device()
    async with guest(SPIN) as vm:
        attachment = vm.attach(device, pio=0x300, irq=20)

        def level() -> bool:
            return bool(cast("Any", vm._life.hardware.vm.get_irqchip(KVM_IRQCHIP_IOAPIC)).irr & 1 << 20)

        await vm.pause()
        assert not level()
        device.irq.set(True)
        device.irq.set(True)
        assert level()
        device.irq.set(False)
        assert not level()
        device.irq.set(True)
        assert level()
        # Who leaves lowers its line.
        vm.detach(attachment)
        assert not level()


@pytest.mark.parametrize("is_lowered", [False, True])
async def test_a_level_is_after_a_reset_what_its_device_makes_it(guest: Guest, is_lowered: bool) -> None:
    class Driver(Device):
        def reset(self) -> None:
            if is_lowered:
                self.irq.set(False)

    device = Driver()
    async with guest(SPIN) as vm:
        vm.attach(device, pio=0x300, irq=20)
        await vm.pause()
        device.irq.set(True)
        await vm.reset()
        chip = cast("Any", vm._life.hardware.vm.get_irqchip(KVM_IRQCHIP_IOAPIC))
        assert bool(chip.irr & 1 << 20) is not is_lowered


async def test_messages_reach_the_local_apic(guest: Guest) -> None:
    # A message is taken by an APIC that is enabled.
    code = bytes.fromhex(
        "bb 00 00 e0 fe"  # mov ebx, 0xfee00000: the local APIC
        "c7 83 f0 00 00 00 ff 01 00 00"  # mov dword [ebx + 0xf0], 0x1ff: SVR, enabled
        "c6 05 00 20 00 00 01"  # mov byte [0x2000], 1
        "eb fe"  # jmp .
    )
    device = Device()
    async with guest(code, mode="protected") as vm:
        vm.attach(device, pio=0x300, msi=(0xFEE0_0000, 0x41))
        assert device.irq.gsi is None
        await until(lambda: vm.memory.read(0x2000, 1) == b"\x01")
        await vm.pause()
        assert not lapic_irr(vm) >> 0x41 & 1
        device.irq.pulse()
        assert lapic_irr(vm) >> 0x41 & 1
        with pytest.raises(ConfigError, match="a message signalled interrupt has no level: use pulse"):
            device.irq.set(True)


@pytest.mark.parametrize("where", [{"irq": 5}, {"msi": (0xFEE0_0000, 0x41)}])
@pytest.mark.parametrize("end", ["detach", "leave"])
async def test_an_interrupt_ends_with_its_attachment(guest: Guest, where: dict[str, Any], end: str) -> None:
    device = Device()
    before = sorted(os.listdir("/proc/self/fd"))
    async with guest(SPIN) as vm:
        during = sorted(os.listdir("/proc/self/fd"))
        attachment = vm.attach(device, pio=0x300, **where)
        irq = device.irq
        if end == "detach":
            vm.detach(attachment)
            assert sorted(os.listdir("/proc/self/fd")) == during
    with pytest.raises(StateError, match="not attached any more"):
        irq.pulse()
    if "irq" in where:
        with pytest.raises(StateError, match="not attached any more"):
            irq.set(True)
    irq.close()
    assert not hasattr(device, "irq")
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1


async def test_devices_may_share_an_input_for_their_pulses(guest: Guest) -> None:
    one, two = Device(), Device()
    async with guest(COUNT) as vm:
        vm.attach(one, pio=0x300, irq=5)
        attachment = vm.attach(two, pio=0x310, irq=5)
        await until(lambda: vm.memory.read(0x2001, 1) == b"\x01")
        one.irq.pulse()
        await until(lambda: vm.memory.read(0x2000, 1)[0] == 1)
        two.irq.pulse()
        await until(lambda: vm.memory.read(0x2000, 1)[0] == 2)
        vm.detach(attachment)
        one.irq.pulse()
        await until(lambda: vm.memory.read(0x2000, 1)[0] == 3)


@pytest.mark.parametrize("gsi", [-1, 2, 24, 1 << 40])
async def test_what_is_no_input_is_refused(guest: Guest, gsi: int) -> None:
    device = Device()
    async with guest(SPIN) as vm:
        with pytest.raises(ConfigError, match=f"irq {gsi} is no input of the interrupt controllers: 0 to 23"):
            vm.attach(device, pio=0x300, irq=gsi)
