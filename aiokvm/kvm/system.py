"""/dev/kvm: what this host's KVM can do, and the way to a VM (KVM API, section 4, "system ioctl")."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from aiokvm._core import ffi
from aiokvm.errors import KvmError
from aiokvm.kvm.constants import KVM_API_VERSION
from aiokvm.kvm.hints import hint
from aiokvm.kvm.ioctl import AttributeHandle
from aiokvm.kvm.tables import get_cpuid, get_msrs
from aiokvm.kvm.vm import Vm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiokvm.kvm.caps import Cap
    from aiokvm.kvm.structs import CpuidEntry, MsrEntry

# KVM_CREATE_VM waits for the kernel to set a worker up and gives up at a signal; a program whose timers keep
# firing must not lose its VM to one of them.
_CREATE_VM_TRIES = 20


class System(AttributeHandle):
    """The host's KVM, opened at ``path``.

    Raises KvmError: named "open" where the device cannot be opened, KVM_GET_API_VERSION where it is no
    KVM of version 12.
    """

    def __init__(self, path: str | os.PathLike[str] = "/dev/kvm") -> None:
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            number = error.errno or errno.EIO
            raise KvmError("open", number, f"{os.fspath(path)}: {hint('open', number)}") from None
        version = self.get_api_version()
        if version != KVM_API_VERSION:
            self.close()
            raise KvmError(
                "KVM_GET_API_VERSION", errno.EPROTO, f"it is {version}; aiokvm speaks {KVM_API_VERSION} only"
            )

    def get_api_version(self) -> int:
        """Return KVM's API version; it is 12 for good."""
        return self.ioctl("KVM_GET_API_VERSION")

    def check_extension(self, cap: Cap | int) -> int:
        """Return 0 where the capability is missing, else a positive number, which may be a count."""
        return self.ioctl("KVM_CHECK_EXTENSION", int(cap))

    def get_vcpu_mmap_size(self) -> int:
        """Return the size in bytes of a vCPU's kvm_run, with the pages that KVM puts behind it."""
        return self.ioctl("KVM_GET_VCPU_MMAP_SIZE")

    def create_vm(self, vm_type: int = 0) -> Vm:
        """Create a VM of no memory and no vCPU; ``vm_type`` is KVM_X86_DEFAULT_VM or another KVM_X86_*_VM."""
        for _ in range(_CREATE_VM_TRIES):
            answer = self.try_ioctl("KVM_CREATE_VM", vm_type)
            if answer != -errno.EINTR:
                break
        if answer < 0:
            raise KvmError("KVM_CREATE_VM", -answer, hint("KVM_CREATE_VM", -answer))
        return Vm(self, answer)

    def get_supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return what a vCPU's CPUID may be set to (KVM_CAP_EXT_CPUID)."""
        return get_cpuid(self, "KVM_GET_SUPPORTED_CPUID")

    def get_emulated_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return what KVM emulates although the processor lacks it (KVM_CAP_EXT_EMUL_CPUID)."""
        return get_cpuid(self, "KVM_GET_EMULATED_CPUID")

    def get_supported_hv_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return the CPUID leaves of Hyper-V that KVM can show (KVM_CAP_SYS_HYPERV_CPUID)."""
        return get_cpuid(self, "KVM_GET_SUPPORTED_HV_CPUID")

    def get_msr_index_list(self) -> tuple[int, ...]:
        """Return the MSRs that a vCPU's state consists of; some hosts list one that cannot be set."""
        return self._get_msr_list("KVM_GET_MSR_INDEX_LIST")

    def get_msr_feature_index_list(self) -> tuple[int, ...]:
        """Return the MSRs that describe the host's features, for ``get_msrs`` (KVM_CAP_GET_MSR_FEATURES)."""
        return self._get_msr_list("KVM_GET_MSR_FEATURE_INDEX_LIST")

    def get_msrs(self, indices: Iterable[int]) -> tuple[MsrEntry, ...]:
        """Return feature MSRs (KVM_CAP_GET_MSR_FEATURES). Raises MsrError with the first that KVM refuses."""
        return get_msrs(self, indices)

    def get_mce_cap_supported(self) -> int:
        """Return the MCG_CAP bits that KVM supports (KVM_CAP_MCE)."""
        value = ffi.new("__u64 *")
        self.ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED", value)
        return int(value[0])

    def _get_msr_list(self, name: str) -> tuple[int, ...]:
        probe = ffi.new("struct kvm_msr_list *")
        answer = self.try_ioctl(name, probe)
        if answer == -errno.E2BIG:
            probe = ffi.new("struct kvm_msr_list *", {"nmsrs": probe.nmsrs, "indices": probe.nmsrs})
            self.ioctl(name, probe)
        elif answer < 0:
            raise KvmError(name, -answer, hint(name, -answer))
        return tuple(probe.indices[0 : probe.nmsrs])
