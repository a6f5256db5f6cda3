"""A VM (KVM API, section 4, "vm ioctl")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm._core import ffi
from aiokvm.kvm.constants import (
    KVM_CREATE_DEVICE_TEST,
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_MSR_FILTER_DEFAULT_DENY,
    KVM_MSR_FILTER_MAX_RANGES,
)
from aiokvm.kvm.ioctl import AttributeHandle
from aiokvm.kvm.irq import InterruptIoctls
from aiokvm.kvm.memory import MemoryIoctls
from aiokvm.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aiokvm.kvm.stats import Stats
    from aiokvm.kvm.system import System
    from aiokvm.kvm.vm_structs import ClockData, MsrFilterRange


class Device(AttributeHandle):
    """A device in the kernel, made by ``Vm.create_device``: what it can do are its attributes."""


class Vm(MemoryIoctls, InterruptIoctls, AttributeHandle):
    """A VM, made by ``System.create_vm``. The kernel keeps it until its vCPUs are closed too."""

    def __init__(self, system: System, fd: int) -> None:
        super().__init__(fd)
        self.system = system
        self.vcpu_mmap_size = system.get_vcpu_mmap_size()

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """Create a vCPU; ``vcpu_id`` is its APIC id."""
        return Vcpu(self, vcpu_id, self.ioctl("KVM_CREATE_VCPU", vcpu_id))

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """Say which vCPU is the bootstrap processor (else 0); it precedes the first vCPU."""
        self.ioctl("KVM_SET_BOOT_CPU_ID", vcpu_id)

    def set_tss_addr(self, address: int) -> None:
        """Name three pages below 4 GiB that no slot touches; Intel hosts need them for real mode."""
        self.ioctl("KVM_SET_TSS_ADDR", address)

    def set_identity_map_addr(self, address: int) -> None:
        """Name a page below 4 GiB that no slot touches, with the same purpose; it precedes the first vCPU."""
        self.ioctl("KVM_SET_IDENTITY_MAP_ADDR", ffi.new("__u64 *", address))

    def get_clock(self) -> ClockData:
        """Return kvmclock, in ns, with the host's time and TSC at that moment where ``flags`` say so."""
        from aiokvm.kvm.vm_structs import ClockData

        return self._get("KVM_GET_CLOCK", ClockData)

    def set_clock(self, clock: ClockData) -> None:
        """Set kvmclock; with KVM_CLOCK_REALTIME it advances by what passed since ``realtime``."""
        self._set("KVM_SET_CLOCK", clock)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the TSC frequency of the vCPUs to come (KVM_CAP_VM_TSC_CONTROL)."""
        self.ioctl("KVM_SET_TSC_KHZ", khz)

    def get_tsc_khz(self) -> int:
        """Return the TSC frequency of the vCPUs to come, in kHz (KVM_CAP_VM_TSC_CONTROL)."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def ioeventfd(
        self,
        addr: int,
        fd: int,
        length: int = 0,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """Let a guest's write to ``addr`` signal the eventfd ``fd`` instead of causing an exit.

        ``length`` is 1, 2, 4 or 8 bytes, or 0 for a write of any length; with ``datamatch`` only that value
        counts. ``deassign`` undoes it and must name the same address, length and datamatch. It needs
        KVM_CAP_IOEVENTFD, and KVM_CAP_IOEVENTFD_ANY_LENGTH for length 0.
        """
        flags = 0
        if datamatch is not None:
            flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
        if pio:
            flags |= KVM_IOEVENTFD_FLAG_PIO
        if deassign:
            flags |= KVM_IOEVENTFD_FLAG_DEASSIGN
        arg = {"addr": addr, "fd": fd, "len": length, "datamatch": datamatch or 0, "flags": flags}
        self.ioctl("KVM_IOEVENTFD", ffi.new("struct kvm_ioeventfd *", arg))

    def create_device(self, device_type: int) -> Device:
        """Create a device of KVM_DEV_TYPE_* (KVM_CAP_DEVICE_CTRL)."""
        arg = ffi.new("struct kvm_create_device *", {"type": device_type})
        self.ioctl("KVM_CREATE_DEVICE", arg)
        return Device(arg.fd)

    def test_device(self, device_type: int) -> None:
        """Raise KvmError where ``create_device`` cannot make a device of that type."""
        arg = {"type": device_type, "flags": KVM_CREATE_DEVICE_TEST}
        self.ioctl("KVM_CREATE_DEVICE", ffi.new("struct kvm_create_device *", arg))

    def set_msr_filter(self, ranges: Sequence[MsrFilterRange], *, default_deny: bool = False) -> None:
        """Say which MSRs the guest may touch; no range and no ``default_deny`` lift the filter.

        It needs KVM_CAP_X86_MSR_FILTER. What is denied raises #GP in the guest, or causes an exit where
        KVM_CAP_X86_USER_SPACE_MSR is enabled.
        """
        if len(ranges) > KVM_MSR_FILTER_MAX_RANGES:
            raise ValueError(f"{len(ranges)} ranges; an MSR filter has {KVM_MSR_FILTER_MAX_RANGES} at most")
        bitmaps = []
        for part in ranges:
            # The kernel reads whole longs.
            bitmap = ffi.new("__u8[]", (part.nmsrs + 63) // 64 * 8)
            if len(part.bitmap) != (part.nmsrs + 7) // 8:
                raise ValueError(
                    f"a bitmap of {len(part.bitmap)} bytes for {part.nmsrs} MSRs from 0x{part.base:x}"
                )
            ffi.memmove(bitmap, part.bitmap, len(part.bitmap))
            bitmaps.append(bitmap)
        arg = {
            "flags": KVM_MSR_FILTER_DEFAULT_DENY if default_deny else 0,
            "ranges": [
                {"flags": part.flags, "nmsrs": part.nmsrs, "base": part.base, "bitmap": bitmap}
                for part, bitmap in zip(ranges, bitmaps, strict=True)
            ],
        }
        self.ioctl("KVM_X86_SET_MSR_FILTER", ffi.new("struct kvm_msr_filter *", arg))

    def set_pmu_event_filter(
        self, action: int, events: Iterable[int], *, fixed_counter_bitmap: int = 0, flags: int = 0
    ) -> None:
        """KVM_PMU_EVENT_ALLOW or _DENY performance events to the guest (KVM_CAP_PMU_EVENT_FILTER)."""
        numbers = list(events)
        arg = {
            "action": action,
            "nevents": len(numbers),
            "fixed_counter_bitmap": fixed_counter_bitmap,
            "flags": flags,
            "events": numbers,
        }
        self.ioctl("KVM_SET_PMU_EVENT_FILTER", ffi.new("struct kvm_pmu_event_filter *", arg))

    def get_stats(self) -> Stats:
        """Return the VM's statistics, open until closed (KVM_CAP_BINARY_STATS_FD)."""
        from aiokvm.kvm.stats import Stats

        return Stats(self.ioctl("KVM_GET_STATS_FD"))
