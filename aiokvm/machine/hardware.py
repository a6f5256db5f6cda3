"""The part of a machine that the kernel provides: its VM, RAM, interrupt controllers, timer and vCPUs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from aiokvm import kvm
from aiokvm.errors import ConfigError, KvmError
from aiokvm.kvm.constants import (
    KVM_CAP_GET_TSC_KHZ,
    KVM_CAP_MAX_VCPUS,
    KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_X2APIC_API,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS,
)
from aiokvm.machine.cpuid import cpuid
from aiokvm.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiokvm.boot.cpu import CpuState
    from aiokvm.machine.config import Config

T = TypeVar("T")

# Three pages for VT-x to run real mode in, and one for its identity map: below the firmware's area at the end
# of 4 GiB, where a PC has no RAM (Documentation/virt/kvm/api.rst, KVM_SET_TSS_ADDR).
TSS_ADDRESS = 0xFFFB_D000
IDENTITY_MAP_ADDRESS = 0xFFFB_C000

# What KVM serves itself: no access there reaches a device. Port or gpa, bytes, whose.
KERNEL_PORTS = (
    (0x20, 2, "the first PIC"),
    (0x40, 4, "the PIT"),
    (0x61, 1, "the PIT's speaker"),
    (0xA0, 2, "the second PIC"),
    (0x4D0, 2, "the PICs' trigger modes"),
)
KERNEL_MMIO = (
    (0xFEC0_0000, 0x100, "the I/O APIC"),
    (0xFEE0_0000, 0x1000, "the local APIC"),
    (IDENTITY_MAP_ADDRESS, 0x4000, "pages of KVM's own"),
)

# APIC ids of 8 bits, less the one that means all: more need those of x2APIC, which KVM has to be told of.
XAPIC_IDS = 255

# Intel SDM volume 3, section 11.5.1: local vector table; delivery modes ExtINT and NMI.
APIC_LVT0 = 0x350
APIC_LVT1 = 0x360
APIC_MODE_NMI = 4 << 8
APIC_MODE_EXTINT = 7 << 8

# Intel SDM volume 3, section 12.11: MTRRs enabled, the default memory type write-back.
MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLED_WRITE_BACK = 1 << 11 | 6

# The slave PIC hangs on the master's input 2: no GSI leads there.
_CASCADE = 2

_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


class Hardware:
    """Built whole, or not at all.

    ``vcpus`` are by index, which is also the APIC id. Raises ConfigError for what this host cannot give, and
    KvmError for what KVM refuses.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        with ExitStack() as stack:
            system = stack.enter_context(kvm.System())
            _check_limits(system, config)
            self.memory = GuestMemory(
                config.memory_bytes,
                config.hugepage_bytes,
                shared=config.shared_memory,
                overcommit=config.overcommit,
            )
            stack.callback(self.memory.close)
            # KVM and devices have addresses in it: it stays until then, though a program may close it before.
            self._regions = self.memory.regions
            self.vm = stack.enter_context(_create_vm(system, config, self.memory))
            self.vcpus = tuple(stack.enter_context(vcpu) for vcpu in _create_vcpus(system, self.vm, config))
            system.close()
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Give everything back to the kernel. No vCPU thread may be left. Idempotent."""
        self._stack.close()
        self._regions = ()

    def set_cpu_state(self, state: CpuState) -> None:
        """The boot processor's registers that a boot protocol asks for."""
        _set_cpu_state(self.vcpus[0], state)

    def reset(self, zero: Iterable[tuple[int, int]] | None) -> tuple[int, ...]:
        """Chips, clock and vCPUs are as they were when they were created, and RAM reads as zeros.

        Of RAM only what ``zero`` says, (gpa, size in bytes), unless that is None. Returns the MSRs that the
        guest has changed and KVM does not change back. Takes the kernel a while.
        """
        from aiokvm.machine import vcpu_state

        if zero is None:
            self.memory.clear()
        for gpa, size in zero or ():
            self.memory.fill(gpa, size)
        refused: dict[int, None] = {}
        # KVM has no reset of a vCPU, so take the state of one that was just made.
        with kvm.System() as system, _create_vm(system, self._config, None) as vm:
            # First, for a timer that still runs interrupts.
            self.vm.set_pit2(vm.get_pit2())
            # The slave first: the master takes what that has pending.
            for chip in (KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_IOAPIC):
                self.vm.set_irqchip(chip, vm.get_irqchip(chip))
            msrs: tuple[int, ...] = ()
            fresh = _create_vcpus(system, vm, self._config)
            for vcpu, pristine in zip(self.vcpus, fresh, strict=True):
                with pristine:
                    # The same for all.
                    msrs = msrs or vcpu_state.msr_indices(system, pristine)
                    state = vcpu_state.save(pristine, msrs)
                refused |= dict.fromkeys(vcpu_state.restore(vcpu, state))
            # Last, as the TSC is a part of it.
            self.vm.set_clock(replace(vm.get_clock(), flags=0))
        return tuple(refused)


def _check_limits(system: kvm.System, config: Config) -> None:
    most = system.check_extension(KVM_CAP_MAX_VCPUS)
    if config.cpus > most:
        raise ConfigError(f"cpus is {config.cpus}: KVM on this host allows at most {most}")


def _create_vm(system: kvm.System, config: Config, memory: GuestMemory | None) -> kvm.Vm:
    """A VM with its RAM, if it is given any, and the chips that live in the kernel."""
    vm = system.create_vm()
    try:
        # Before the chips: in a VM whose buses have changed, the kernel takes milliseconds for a region.
        for slot, region in enumerate(memory.regions if memory else ()):
            vm.set_user_memory_region(slot, region.gpa, region.size, region.host_address)
        vm.set_tss_addr(TSS_ADDRESS)
        vm.set_identity_map_addr(IDENTITY_MAP_ADDRESS)
        if config.cpus > XAPIC_IDS:
            ids = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
            vm.enable_cap(KVM_CAP_X2APIC_API, ids)
        vm.create_irqchip()
        # The dummy speaker answers port 0x61, whose refresh bit old kernels calibrate delays with.
        vm.create_pit2(KVM_PIT_SPEAKER_DUMMY)
        vm.set_gsi_routing(gsi_routing())
    except BaseException:
        vm.close()
        raise
    return vm


def gsi_routing() -> list[kvm.IrqRoutingEntry]:
    """Where a GSI leads: PIC and I/O APIC as on a PC, which has the timer on the I/O APIC's pin 2."""
    pins = [(gsi, KVM_IRQCHIP_PIC_MASTER if gsi < 8 else KVM_IRQCHIP_PIC_SLAVE, gsi % 8) for gsi in range(16)]
    pins += [(gsi, KVM_IRQCHIP_IOAPIC, gsi or 2) for gsi in range(24)]
    return [
        kvm.IrqRoutingEntry(gsi, kvm.IrqRoutingIrqchip(chip, pin))
        for gsi, chip, pin in pins
        if gsi != _CASCADE
    ]


def _create_vcpus(system: kvm.System, vm: kvm.Vm, config: Config) -> Iterable[kvm.Vcpu]:
    supported = system.get_supported_cpuid()
    timer = bool(system.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
    for index in range(config.cpus):
        vcpu = vm.create_vcpu(index)
        try:
            tsc_khz = vcpu.get_tsc_khz() if system.check_extension(KVM_CAP_GET_TSC_KHZ) else 0
            vcpu.set_cpuid2(
                cpuid(supported, index=index, cpus=config.cpus, tsc_khz=tsc_khz, tsc_deadline_timer=timer)
            )
            _set_up_apic(vcpu)
            _set_msr(vcpu, MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)
        except BaseException:
            vcpu.close()
            raise
        yield vcpu


def _set_up_apic(vcpu: kvm.Vcpu) -> None:
    """Virtual wire mode, as firmware leaves it: PIC on LINT0, NMI on LINT1 (MP specification, 3.6.2.2)."""
    lapic = bytearray(vcpu.get_lapic())
    for register, mode in ((APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)):
        lapic[register : register + 4] = mode.to_bytes(4, "little")
    vcpu.set_lapic(bytes(lapic))


def _set_msr(vcpu: kvm.Vcpu, index: int, value: int) -> None:
    try:
        vcpu.set_msrs([kvm.MsrEntry(index, value)])
    except KvmError:
        # Hosts differ in which MSRs a guest has; none that aiokvm sets is needed to run.
        return


def _set_cpu_state(vcpu: kvm.Vcpu, state: CpuState) -> None:
    """The registers that a boot protocol asks for."""
    sregs = vcpu.get_sregs()
    changes: dict[str, Any] = {name: getattr(state, name) for name in ("cr0", "cr3", "cr4", "efer")}
    changes |= {name: _like(kvm.Segment, getattr(state, name)) for name in _SEGMENTS}
    changes |= {name: _like(kvm.DTable, getattr(state, name)) for name in ("gdt", "idt")}
    vcpu.set_sregs(replace(sregs, **changes))
    vcpu.set_regs(kvm.Regs(**{field.name: getattr(state, field.name) for field in fields(kvm.Regs)}))


def _like(struct: type[T], value: Any) -> T:
    """A structure with the fields of ``value``, which are a part of its own."""
    # As asdict, which would copy every number deeply.
    return struct(**{field.name: getattr(value, field.name) for field in fields(value)})
