"""A machine that was reset has nothing left of what its guest did to processors and chips: all is compared.

In the lab, for there are XSAVE, protection keys and SVM.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aiokvm import VM, Device, KvmError, boot, kvm
from aiokvm.kvm import Cap, Xcr
from aiokvm.kvm.constants import KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.linux, pytest.mark.anyio]

SOURCE = Path(__file__).parents[1] / "guests" / "changes_all.S"
LIMIT_S = 120.0

# Beside those that KVM lists: MTRRs, machine check, DEBUGCTL, KVM's own, and AMD's SYSCFG, HWCR and OSVW.
RANGES = (
    *(range(0xFE, 0xFF), range(0x179, 0x17C), range(0x1D9, 0x1DA), range(0x200, 0x300), range(0x400, 0x480)),
    *(range(0x4B56_4D00, 0x4B56_4E00), range(0xC001_0010, 0xC001_0016), range(0xC001_0140, 0xC001_0142)),
)
# They count time: the TSC; of Hyper-V's interface the vCPU's run time and the reference counter.
OF_TIME = {0x10, 0x4000_0010, 0x4000_0020}
# What the guest changes, so that the test is known to see it.
CHANGED = {
    *("regs", "sregs", "xsave", "debugregs", "lapic", "fpu"),
    *(f"MSR {msr:#x}" for msr in (0x2FF, 0x200, 0x201, 0x277, 0x250, 0x268, 0x174, 0x175, 0x176, 0x3B)),
    *(f"MSR {msr:#x}" for msr in (0xC000_0081, 0xC000_0082, 0xC000_0084, 0xC000_0102)),
    *(f"MSR {msr:#x}" for msr in (0xC000_0103, 0xC001_0117, 0x400)),
    *(f"MSR {msr:#x}" for msr in (0x4B56_4D01, 0x4B56_4D03, 0x4B56_4D04)),
    *("irqchip 0", "irqchip 2", "pit"),
}


def vcpu_state(vcpu: kvm.Vcpu, msrs: list[int]) -> Iterator[tuple[str, Any]]:
    has = vcpu.vm.check_extension
    yield "mp_state", vcpu.get_mp_state()
    for what in ("regs", "sregs", "fpu", "debugregs", "lapic", "vcpu_events"):
        yield what, getattr(vcpu, f"get_{what}")()
    for what, cap in (
        ("sregs2", Cap.KVM_CAP_SREGS2),
        ("xsave2", Cap.KVM_CAP_XSAVE2),
        ("xsave", Cap.KVM_CAP_XSAVE),
        ("xcrs", Cap.KVM_CAP_XCRS),
        ("nested_state", Cap.KVM_CAP_NESTED_STATE),
    ):
        if has(cap):
            yield what, getattr(vcpu, f"get_{what}")()
    for entry in vcpu.get_msrs(msrs):
        yield f"MSR {entry.index:#x}", hex(entry.data)


def msrs_of(vm: VM) -> list[int]:
    """Those that KVM gives of the machine's vCPUs."""
    with kvm.System() as system:
        listed = system.get_msr_index_list()
    found = []
    for msr in sorted({*listed, *(msr for part in RANGES for msr in part)} - OF_TIME):
        try:
            vm._life.hardware.vcpus[0].get_msrs([msr])
        except KvmError:
            continue
        found.append(msr)
    return found


def state(vm: VM, msrs: list[int]) -> dict[str, Any]:
    """All that KVM tells of a machine, but what counts time."""
    hardware = vm._life.hardware
    found: dict[str, Any] = {}
    for vcpu in hardware.vcpus:
        prefix = f"vCPU {vcpu.id} " if vcpu.id else ""
        found |= {prefix + what: value for what, value in vcpu_state(vcpu, msrs)}
    for chip in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC):
        found[f"irqchip {chip}"] = hardware.vm.get_irqchip(chip)
    pit = hardware.vm.get_pit2()
    # When the count was loaded is a time.
    channels = tuple(replace(channel, count_load_time=0) for channel in pit.channels)
    found["pit"] = replace(pit, channels=channels)
    return found


def has_xsave(vm: VM) -> bool:
    leaf = next(entry for entry in vm._life.hardware.vcpus[0].get_cpuid2() if entry.function == 1)
    return bool(leaf.ecx >> 26 & 1)


class Told(Device):
    """Where the guest says that it has done all."""

    def __init__(self) -> None:
        self.heard = anyio.Event()

    def write(self, offset: int, size: int, value: int) -> None:
        self.heard.set()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "changes_all"
    link = "-Wl,--build-id=none,--oformat=binary,-Ttext=0x1000,-e,start"
    subprocess.run(["cc", "-m32", "-nostdlib", "-static", link, "-o", path, SOURCE], check=True)
    return path


@pytest.mark.parametrize("cpus", [1, 2])
async def test_a_machine_that_was_reset_is_as_a_new_one(cpus: int, image: Path) -> None:
    told = Told()
    flat = boot.Flat(image, mode="protected")
    with anyio.fail_after(LIMIT_S):
        async with await VM.create(boot=flat, memory="64M", cpus=cpus, devices=[told.at(pio=0xF1)]) as vm:
            msrs = msrs_of(vm)
            fresh = state(vm, msrs)
            clock = vm._life.hardware.vm.get_clock().clock
            for _ in range(2):
                told.heard = anyio.Event()
                if vm.state.value == "created":
                    await vm.start()
                else:
                    await vm.resume()
                with anyio.move_on_after(LIMIT_S / 4):
                    await told.heard.wait()
                assert vm.exit is None
                await vm.pause()
                for vcpu in vm._life.hardware.vcpus if has_xsave(vm) else ():
                    # The guest has done so, but QEMU's emulation tells KVM nothing of its XSETBV.
                    vcpu.set_xcrs((Xcr(0, 3),))
                guests = state(vm, msrs)
                changed = CHANGED | ({"xcrs"} if has_xsave(vm) else set())
                same = {what for what in changed if guests.get(what) == fresh.get(what)}
                assert not same, f"the guest did not change {same}: {vm.exit}"
                await vm.reset()
                now = state(vm, msrs)
                left = {what: (fresh[what], now[what]) for what in fresh if fresh[what] != now[what]}
                assert left == {}
                assert now.keys() == fresh.keys()
                # The clock counts time: it began anew, with what making the VM took.
                assert vm._life.hardware.vm.get_clock().clock < clock + 60 * 10**9
