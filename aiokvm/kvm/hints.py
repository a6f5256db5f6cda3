"""What to do about a failed ioctl, where that is known."""

from __future__ import annotations

import errno

_GENERAL = {
    errno.ENOTTY: "this kernel's KVM does not know the request, or the file is no KVM; see check_extension",
    errno.EIO: "a VM belongs to the process that created it: a child of fork() cannot use it",
    errno.ENOMEM: "the kernel has no memory left for it",
    errno.EMFILE: "raise the limit of open files (ulimit -n, RLIMIT_NOFILE) or close other machines",
    errno.ENFILE: "the system is out of file handles (sysctl fs.file-max)",
}

_REGION = {
    errno.EEXIST: "the guest physical range overlaps another slot",
    errno.EINVAL: (
        "addresses and size must be multiples of 4096, the slot below check_extension(KVM_CAP_NR_MEMSLOTS), "
        "the flags known; a slot's size and host address cannot change, delete it first (size 0)"
    ),
}

_SREGS = "the control registers contradict each other, or the guest's CPUID lacks one of their bits"

_NO_IRQCHIP = "the VM has no in-kernel interrupt controller: call create_irqchip first"

_HINTS: dict[str, dict[int, str]] = {
    "open": {
        errno.ENOENT: (
            "load the module (modprobe kvm_intel or kvm_amd); inside a VM, enable nested virtualization"
        ),
        errno.EACCES: "add the user to the device's group (usermod -aG kvm USER) and log in again",
        errno.EPERM: "the container or sandbox forbids the device: allow /dev/kvm (--device /dev/kvm)",
        errno.ENXIO: "the device node is there but no module serves it: modprobe kvm_intel or kvm_amd",
        errno.ENODEV: "the device node is there but no module serves it: modprobe kvm_intel or kvm_amd",
    },
    "KVM_CREATE_VM": {
        errno.EBUSY: "another hypervisor holds the processor's virtualization: stop it",
        errno.EINTR: "signals kept interrupting it",
        errno.EINVAL: "this KVM does not know the VM type; see check_extension(KVM_CAP_VM_TYPES)",
        errno.EOPNOTSUPP: "the processor's virtualization is switched off in the firmware",
        errno.EIO: "the processor's virtualization could not be switched on; is it disabled in the firmware?",
    },
    "KVM_CREATE_VCPU": {
        errno.EEXIST: "a vCPU with this id exists",
        errno.EINVAL: (
            "the id must be below check_extension(KVM_CAP_MAX_VCPU_ID), "
            "the number of vCPUs at most check_extension(KVM_CAP_MAX_VCPUS)"
        ),
    },
    "KVM_SET_USER_MEMORY_REGION": _REGION,
    "KVM_SET_USER_MEMORY_REGION2": _REGION,
    "KVM_GET_DIRTY_LOG": {
        errno.ENOENT: "the slot does not exist or was not set with KVM_MEM_LOG_DIRTY_PAGES",
        errno.ENXIO: "the dirty ring is enabled: harvest Vcpu.dirty_ring instead",
    },
    "KVM_CLEAR_DIRTY_LOG": {
        errno.ENOENT: "the slot does not exist or was not set with KVM_MEM_LOG_DIRTY_PAGES",
        errno.EINVAL: (
            "first_page must be a multiple of 64, and num_pages too unless the range ends with the slot; "
            "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 must be enabled"
        ),
        errno.ENXIO: "the dirty ring is enabled: call reset_dirty_rings instead",
    },
    "KVM_RESET_DIRTY_RINGS": {errno.EINVAL: "the dirty ring is not enabled: call enable_dirty_ring first"},
    "KVM_CREATE_IRQCHIP": {
        errno.EEXIST: "the VM has its interrupt controllers already",
        errno.EINVAL: "it must come before the first vCPU",
    },
    "KVM_CREATE_PIT2": {
        errno.EEXIST: "the VM has its PIT already",
        errno.ENOENT: _NO_IRQCHIP,
    },
    "KVM_GET_PIT2": {errno.ENXIO: "the VM has no in-kernel PIT: call create_pit2 first"},
    "KVM_SET_PIT2": {errno.ENXIO: "the VM has no in-kernel PIT: call create_pit2 first"},
    "KVM_REINJECT_CONTROL": {errno.ENXIO: "the VM has no in-kernel PIT: call create_pit2 first"},
    "KVM_GET_IRQCHIP": {errno.ENXIO: _NO_IRQCHIP, errno.EINVAL: "chip_id is one of KVM_IRQCHIP_*"},
    "KVM_SET_IRQCHIP": {errno.ENXIO: _NO_IRQCHIP, errno.EINVAL: "chip_id is one of KVM_IRQCHIP_*"},
    "KVM_IRQ_LINE": {errno.ENXIO: _NO_IRQCHIP},
    "KVM_IRQ_LINE_STATUS": {errno.ENXIO: _NO_IRQCHIP},
    "KVM_SIGNAL_MSI": {errno.EINVAL: _NO_IRQCHIP},
    "KVM_SET_GSI_ROUTING": {
        errno.EINVAL: (
            "an entry has a gsi of check_extension(KVM_CAP_IRQ_ROUTING) or more, an unknown flag or pin, "
            "two entries of one gsi name the same chip, or the VM has no in-kernel interrupt controller"
        ),
    },
    "KVM_IRQFD": {
        errno.EBUSY: "the eventfd raises a gsi of this VM already; deassign it first",
        errno.EINVAL: "the descriptor is no eventfd, or the VM has no in-kernel interrupt controller",
        errno.EBADF: "the descriptor is closed",
    },
    "KVM_IOEVENTFD": {
        errno.EEXIST: "another ioeventfd has this address, length and datamatch",
        errno.ENOENT: "no ioeventfd has this address, length and datamatch",
        errno.EINVAL: "length is 0, 1, 2, 4 or 8, a datamatch needs one; fd must be an eventfd",
        errno.ENOSPC: "the VM's bus holds 1000 in-kernel devices and ioeventfds at most",
    },
    "KVM_REGISTER_COALESCED_MMIO": {errno.ENOSPC: "the VM's bus holds 1000 in-kernel devices at most"},
    "KVM_SET_BOOT_CPU_ID": {errno.EBUSY: "it must come before the first vCPU"},
    "KVM_SET_IDENTITY_MAP_ADDR": {errno.EINVAL: "it must come before the first vCPU"},
    "KVM_SET_TSC_KHZ": {errno.EINVAL: "the host cannot scale the TSC (KVM_CAP_TSC_CONTROL)"},
    "KVM_ENABLE_CAP": {
        errno.EINVAL: "this KVM does not know the capability, its arguments, or not on this descriptor",
        errno.EEXIST: "it is enabled already, or it must come before the first vCPU",
    },
    "KVM_CREATE_DEVICE": {errno.ENODEV: "this KVM has no device of that type"},
    "KVM_X86_SET_MSR_FILTER": {
        errno.EINVAL: "a range has unknown flags, or no MSR, or more than 12288",
    },
    "KVM_RUN": {
        errno.EFAULT: "the guest reached memory that its slot maps to no host memory",
        errno.ENOEXEC: "the vCPU has not been set up",
    },
    "KVM_SET_CPUID2": {
        errno.EINVAL: "CPUID cannot change once the vCPU has run, or an entry is invalid",
        errno.E2BIG: "too many entries (256 at most)",
    },
    "KVM_SET_SREGS": {errno.EINVAL: _SREGS},
    "KVM_SET_SREGS2": {errno.EINVAL: _SREGS},
    "KVM_SET_XCRS": {errno.EINVAL: "the guest's CPUID lacks a feature that XCR0 enables"},
    "KVM_GET_LAPIC": {errno.EINVAL: _NO_IRQCHIP},
    "KVM_SET_LAPIC": {errno.EINVAL: _NO_IRQCHIP},
    "KVM_INTERRUPT": {
        errno.ENXIO: "the interrupt controller is in the kernel: use irq_line or signal_msi",
        errno.EEXIST: "an interrupt is queued already: wait for ready_for_interrupt_injection",
        errno.EINVAL: "the vector is 0 to 255",
    },
    "KVM_SET_MP_STATE": {errno.EINVAL: "x86 has no such state, or it needs create_irqchip"},
    "KVM_SET_GUEST_DEBUG": {
        errno.EBUSY: "an exception is queued: let the vCPU run first",
        errno.EINVAL: "this KVM does not know a flag",
    },
    "KVM_KVMCLOCK_CTRL": {errno.EINVAL: "the guest uses no kvmclock"},
    "KVM_SET_NESTED_STATE": {errno.EINVAL: "it does not fit the guest's CPUID and EFER; set those first"},
}


def hint(name: str, error: int) -> str:
    """What to do when the request ``name`` fails with ``error``; empty where that is not known."""
    return _HINTS.get(name, {}).get(error) or _GENERAL.get(error, "")
