"""What the kernel provides for a machine: limits, wiring, RAM on both sides of the hole, and the reset."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio.to_thread
import pytest

from aiokvm import VM, ConfigError, Exit, ExitReason, GuestMemoryError, KvmError, boot, kvm
from aiokvm.boot.layout import PAGE_TABLES
from aiokvm.kvm import Cap, IoapicState, MpState, PicState
from aiokvm.kvm.constants import KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE
from aiokvm.machine import hardware
from aiokvm.machine.config import Config
from aiokvm.machine.hardware import Hardware, gsi_routing
from aiokvm.machine.vcpu_state import MSRS_OF_TIME, msr_indices

if TYPE_CHECKING:
    from tests.machine.conftest import Guest

pytestmark = pytest.mark.kvm

GIB = 1 << 30


def test_gsis_lead_where_a_pcs_interrupts_go() -> None:
    routes: dict[int, list[tuple[int, int]]] = {}
    for entry in gsi_routing():
        assert isinstance(entry.route, kvm.IrqRoutingIrqchip)
        routes.setdefault(entry.gsi, []).append((entry.route.irqchip, entry.route.pin))
    assert routes[0] == [(KVM_IRQCHIP_PIC_MASTER, 0), (KVM_IRQCHIP_IOAPIC, 2)]
    assert 2 not in routes
    assert routes[4] == [(KVM_IRQCHIP_PIC_MASTER, 4), (KVM_IRQCHIP_IOAPIC, 4)]
    assert routes[9] == [(KVM_IRQCHIP_PIC_SLAVE, 1), (KVM_IRQCHIP_IOAPIC, 9)]
    assert routes[16] == [(KVM_IRQCHIP_IOAPIC, 16)]
    assert sorted(routes) == [0, 1, *range(3, 24)]


@pytest.mark.anyio
async def test_more_vcpus_than_kvm_allows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_extension = kvm.System.check_extension

    def few_vcpus(self: kvm.System, cap: Cap) -> int:
        return 4 if cap == Cap.KVM_CAP_MAX_VCPUS else check_extension(self, cap)

    monkeypatch.setattr(kvm.System, "check_extension", few_vcpus)
    with pytest.raises(ConfigError, match="cpus is 5: KVM on this host allows at most 4"):
        await VM.create(boot=boot.Flat(b"\xf4"), memory="2M", cpus=5)


@pytest.mark.anyio
async def test_more_vcpus_than_this_host_allows_are_refused() -> None:
    with kvm.System() as system:
        most = system.check_extension(Cap.KVM_CAP_MAX_VCPUS)
    with pytest.raises(ConfigError, match=rf"{most + 1}"):
        await VM.create(boot=boot.Flat(b"\xf4"), memory="2M", cpus=most + 1)


def test_an_msr_that_a_host_lacks_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "MSR_MTRR_DEF_TYPE", 0xDEAD_BEEF)
    Hardware(Config(boot=boot.Flat(b"\xf4"), memory_bytes=2 << 20)).close()


# RAM above 4 GiB.


@pytest.mark.anyio
async def test_the_guest_reaches_all_of_five_gibibytes(guest: Guest) -> None:
    code = bytes.fromhex(
        "48 bb 00 00 00 00 01 00 00 00"  # mov rbx, 4 GiB
        "8b 03"  # mov eax, [rbx]
        "48 b9 fc ff ff 7f 01 00 00 00"  # mov rcx, 6 GiB - 4
        "03 01"  # add eax, [rcx]
        "89 01"  # mov [rcx], eax
        "bb fc ff ff bf"  # mov ebx, 3 GiB - 4
        "89 03"  # mov [rbx], eax
        "8b 43 04"  # mov eax, [rbx + 4]: the hole
        "e7 f4"  # out 0xf4, eax
        "f4"  # hlt
    )
    async with guest(code, mode="long", memory="5G", overcommit=True, start=False) as vm:
        memory = vm.memory
        # The loader maps 4 GiB; two more, in pages of 2 MiB.
        directories = 0x10000
        for i in range(2):
            table = directories + 0x1000 * i
            memory.write(PAGE_TABLES + 0x1000 + 8 * (4 + i), struct.pack("<Q", table | 3))
            base = (4 + i) * GIB
            memory.write(table, struct.pack("<512Q", *(base + (page << 21) | 0x83 for page in range(512))))
        memory.write(4 * GIB, struct.pack("<I", 0x1111_0000))
        memory.write(6 * GIB - 4, struct.pack("<I", 0x2222))
        await vm.start()
        assert await vm.wait() == Exit(ExitReason.DEBUG_EXIT, code=0xFFFF_FFFF)
        assert memory.read(6 * GIB - 4, 4) == memory.read(3 * GIB - 4, 4) == struct.pack("<I", 0x1111_2222)
        with pytest.raises(GuestMemoryError):
            memory.read(3 * GIB, 1)
        with pytest.raises(GuestMemoryError):
            memory.read(6 * GIB, 1)


# Reset.


def state(hardware: Hardware) -> dict[str, Any]:
    """All that a reset has to restore, but what counts time: hundreds of MSRs one by one, so in a thread."""
    found: dict[str, Any] = {}
    with kvm.System() as system:
        msrs = set(msr_indices(system, hardware.vcpus[0])) - MSRS_OF_TIME
    for chip in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC):
        found[f"irqchip {chip}"] = hardware.vm.get_irqchip(chip)
    for index, vcpu in enumerate(hardware.vcpus):
        found |= {
            f"{index} {what}": getattr(vcpu, f"get_{what}")()
            for what in ("regs", "sregs", "fpu", "debugregs", "vcpu_events", "mp_state", "lapic", "xsave")
        }
        for msr in msrs:
            try:
                found[f"{index} MSR {msr:#x}"] = vcpu.get_msrs([msr])
            except KvmError:
                continue
    pit = hardware.vm.get_pit2()
    channels = tuple(replace(channel, count_load_time=0) for channel in pit.channels)
    found["pit"] = replace(pit, channels=channels)
    return found


# 10 is one that the slave, as `disturb` leaves it, passes on to the master.
PULSED = (1, 4, 9, 10, 17)


def disturb(hardware: Hardware) -> None:
    for vcpu in hardware.vcpus:
        vcpu.set_mp_state(MpState.KVM_MP_STATE_HALTED)
        regs, sregs, fpu = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_fpu()
        vcpu.set_regs(replace(regs, rax=1, rsp=2, r15=3, rip=0x1234, rflags=0x202))
        vcpu.set_sregs(replace(sregs, cr2=0x1234, cr8=3, idt=replace(sregs.idt, base=0x5000, limit=0x77)))
        vcpu.set_fpu(replace(fpu, fcw=0x27F, mxcsr=0x1F00))
        vcpu.set_debugregs(replace(vcpu.get_debugregs(), db=(1, 2, 3, 4)))
        vcpu.set_vcpu_events(
            replace(vcpu.get_vcpu_events(), nmi=replace(vcpu.get_vcpu_events().nmi, masked=1))
        )
        lapic = bytearray(vcpu.get_lapic())
        lapic[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")  # SVR: enabled
        lapic[0x320:0x324] = (0x20030).to_bytes(4, "little")  # LVTT: periodic
        vcpu.set_lapic(bytes(lapic))
        # SYSENTER_CS and _ESP, STAR, MTRRdefType, the first MTRRs of each kind.
        for msr in (0x174, 0x175, 0xC000_0081, 0x2FF, 0x200, 0x250):
            vcpu.set_msrs([kvm.MsrEntry(msr, {0x2FF: 0x800, 0x200: 6, 0x250: 6}.get(msr, 0x33))])
    for chip in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE):
        pic = hardware.vm.get_irqchip(chip)
        assert isinstance(pic, PicState)
        hardware.vm.set_irqchip(chip, replace(pic, imr=0x5A, irq_base=0x70))
    for gsi in PULSED:
        hardware.vm.irq_line(gsi, True)
    pit = hardware.vm.get_pit2()
    first = replace(pit.channels[0], count=0x20, mode=2, rw_mode=3)
    hardware.vm.set_pit2(replace(pit, channels=(first, *pit.channels[1:])))


@pytest.mark.anyio
@pytest.mark.parametrize("cpus", [1, 3])
async def test_a_reset_restores_chips_and_vcpus(guest: Guest, cpus: int) -> None:
    async with guest(b"\xeb\xfe", cpus=cpus, start=False) as vm:
        hardware = vm._life.hardware
        fresh = await anyio.to_thread.run_sync(state, hardware)
        await vm.start()
        await vm.pause()
        disturb(hardware)
        for gsi in PULSED:
            hardware.vm.irq_line(gsi, False)
        disturbed = await anyio.to_thread.run_sync(state, hardware)
        assert all(
            disturbed[f"{i} {what}"] != fresh[f"{i} {what}"]
            for i in range(cpus)
            for what in ("regs", "lapic")
        )
        await vm.reset()
        now = await anyio.to_thread.run_sync(state, hardware)
        assert {key: (fresh[key], now[key]) for key in fresh if fresh[key] != now[key]} == {}


def test_the_timer_is_still_before_the_chips_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its next tick would be a pending interrupt of the new machine."""
    hardware = Hardware(Config(boot=boot.Flat(b"\xf4"), memory_bytes=2 << 20))
    modes: list[int] = []
    set_irqchip = kvm.Vm.set_irqchip

    def look_at_the_timer(self: kvm.Vm, chip_id: int, chip: PicState | IoapicState) -> None:
        modes.append(self.get_pit2().channels[0].mode)
        set_irqchip(self, chip_id, chip)

    disturb(hardware)
    assert hardware.vm.get_pit2().channels[0].mode == 2
    monkeypatch.setattr(kvm.Vm, "set_irqchip", look_at_the_timer)
    hardware.reset(())
    hardware.close()
    assert modes
    assert 2 not in modes


@pytest.mark.anyio
async def test_the_others_wait_to_be_started_after_a_reset(guest: Guest) -> None:
    async with guest(b"\xeb\xfe", cpus=2, start=False) as vm:
        second = vm.vcpus[1]
        assert second.kvm_vcpu.get_mp_state() == MpState.KVM_MP_STATE_UNINITIALIZED
        second.kvm_vcpu.set_mp_state(MpState.KVM_MP_STATE_RUNNABLE)
        second.kvm_vcpu.set_sregs(vm.vcpus[0].kvm_vcpu.get_sregs())
        second.write_register("rip", 0x1000)
        await vm.start()
        await vm.reset()
        await vm.pause()
        assert second.kvm_vcpu.get_mp_state() == MpState.KVM_MP_STATE_UNINITIALIZED
        assert vm.vcpus[0].read_register("rip") == 0x1000


@pytest.mark.anyio
@pytest.mark.parametrize("shared", [False, True])
async def test_memory_is_shared_if_it_is_asked_for(guest: Guest, shared: bool) -> None:
    code = bytes.fromhex("c6 06 00 30 5a b0 00 e6 f4 f4")  # mov byte [0x3000], 0x5a; exit with 0
    async with guest(code, shared_memory=shared) as vm:
        assert await vm.wait() == Exit(ExitReason.DEBUG_EXIT, code=0)
        assert (vm.memory.fd is not None) == shared
        if vm.memory.fd is not None:
            assert os.pread(vm.memory.fd, 1, 0x3000) == b"\x5a"
