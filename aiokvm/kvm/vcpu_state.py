"""A vCPU's registers and the rest of its state (KVM API, section 4, "vcpu ioctl")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiokvm._core import ffi
from aiokvm.kvm.constants import KVM_CAP_NESTED_STATE, KVM_CAP_XSAVE2
from aiokvm.kvm.ioctl import AttributeHandle
from aiokvm.kvm.structs import MpState, Regs, Sregs
from aiokvm.kvm.tables import get_cpuid, get_msrs, set_cpuid, set_msrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiokvm.kvm.state_structs import DebugRegs, Fpu, Sregs2, TranslateResult, VcpuEvents, Xcr
    from aiokvm.kvm.structs import CpuidEntry, MsrEntry
    from aiokvm.kvm.vm import Vm

_XSAVE_BYTES = 4096
_LAPIC_BYTES = 0x400


class StateIoctls(AttributeHandle):
    """The requests of a vCPU that read and write its state; the vCPU must not be running meanwhile."""

    vm: Vm

    def get_regs(self) -> Regs:
        """Return the general registers."""
        return self._get("KVM_GET_REGS", Regs)

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers."""
        self._set("KVM_SET_REGS", regs)

    def get_sregs(self) -> Sregs:
        """Return segments, descriptor tables and control registers."""
        return self._get("KVM_GET_SREGS", Sregs)

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments, descriptor tables and control registers."""
        self._set("KVM_SET_SREGS", sregs)

    def get_sregs2(self) -> Sregs2:
        """Return the same with the PAE page directory pointers (KVM_CAP_SREGS2)."""
        from aiokvm.kvm.state_structs import Sregs2

        return self._get("KVM_GET_SREGS2", Sregs2)

    def set_sregs2(self, sregs: Sregs2) -> None:
        """Set the same with the PAE page directory pointers (KVM_CAP_SREGS2)."""
        self._set("KVM_SET_SREGS2", sregs)

    def get_fpu(self) -> Fpu:
        """Return the x87 and SSE registers."""
        from aiokvm.kvm.state_structs import Fpu

        return self._get("KVM_GET_FPU", Fpu)

    def set_fpu(self, fpu: Fpu) -> None:
        """Set the x87 and SSE registers."""
        self._set("KVM_SET_FPU", fpu)

    def get_xsave(self) -> bytes:
        """Return the 4096 bytes of XSAVE state (KVM_CAP_XSAVE)."""
        return self._get_bytes("KVM_GET_XSAVE", _XSAVE_BYTES)

    def get_xsave2(self) -> bytes:
        """Return the XSAVE state at its full length, at least 4096 bytes (KVM_CAP_XSAVE2)."""
        return self._get_bytes("KVM_GET_XSAVE2", max(_XSAVE_BYTES, self._xsave_bytes()))

    def set_xsave(self, state: bytes) -> None:
        """Set what ``get_xsave`` or ``get_xsave2`` returned."""
        # The kernel reads as much as KVM_CAP_XSAVE2 says, whatever the length that it was given.
        self._set_bytes("KVM_SET_XSAVE", state, max(_XSAVE_BYTES, self._xsave_bytes()))

    def get_xcrs(self) -> tuple[Xcr, ...]:
        """Return the extended control registers (KVM_CAP_XCRS)."""
        c = ffi.new("struct kvm_xcrs *")
        self.ioctl("KVM_GET_XCRS", c)
        from aiokvm.kvm.state_structs import Xcr

        return tuple(Xcr(c.xcrs[i].xcr, c.xcrs[i].value) for i in range(c.nr_xcrs))

    def set_xcrs(self, xcrs: Iterable[Xcr]) -> None:
        """Set extended control registers (KVM_CAP_XCRS)."""
        table = [{"xcr": entry.xcr, "value": entry.value} for entry in xcrs]
        self.ioctl("KVM_SET_XCRS", ffi.new("struct kvm_xcrs *", {"nr_xcrs": len(table), "xcrs": table}))

    def get_msrs(self, indices: Iterable[int]) -> tuple[MsrEntry, ...]:
        """Return the MSRs' values in order. Raises MsrError with the first that KVM refuses."""
        return get_msrs(self, indices)

    def set_msrs(self, entries: Iterable[MsrEntry]) -> None:
        """Set MSRs in order. Raises MsrError with the first that KVM refuses; those before it are set."""
        set_msrs(self, entries)

    def get_cpuid2(self) -> tuple[CpuidEntry, ...]:
        """Return what CPUID answers in the guest."""
        return get_cpuid(self, "KVM_GET_CPUID2")

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """Set what CPUID answers in the guest; it precedes the first run."""
        set_cpuid(self, entries)

    def get_supported_hv_cpuid(self) -> tuple[CpuidEntry, ...]:
        """Return the CPUID leaves of Hyper-V that KVM can show on this vCPU (KVM_CAP_HYPERV_CPUID)."""
        return get_cpuid(self, "KVM_GET_SUPPORTED_HV_CPUID")

    def get_lapic(self) -> bytes:
        """Return the 1024 bytes of the local APIC's registers (Intel SDM, volume 3, section 11.4.1)."""
        return self._get_bytes("KVM_GET_LAPIC", _LAPIC_BYTES)

    def set_lapic(self, state: bytes) -> None:
        """Set the local APIC's registers."""
        self._set_bytes("KVM_SET_LAPIC", state, _LAPIC_BYTES)

    def get_vcpu_events(self) -> VcpuEvents:
        """Return what waits to be delivered (KVM_CAP_VCPU_EVENTS)."""
        from aiokvm.kvm.state_structs import VcpuEvents

        return self._get("KVM_GET_VCPU_EVENTS", VcpuEvents)

    def set_vcpu_events(self, events: VcpuEvents) -> None:
        """Set what waits to be delivered (KVM_CAP_VCPU_EVENTS)."""
        self._set("KVM_SET_VCPU_EVENTS", events)

    def get_debugregs(self) -> DebugRegs:
        """Return the guest's debug registers (KVM_CAP_DEBUGREGS)."""
        from aiokvm.kvm.state_structs import DebugRegs

        return self._get("KVM_GET_DEBUGREGS", DebugRegs)

    def set_debugregs(self, regs: DebugRegs) -> None:
        """Set the guest's debug registers (KVM_CAP_DEBUGREGS)."""
        self._set("KVM_SET_DEBUGREGS", regs)

    def get_mp_state(self) -> MpState:
        """Return whether the vCPU runs, sleeps or waits (KVM_CAP_MP_STATE)."""
        state = ffi.new("__u32 *")
        self.ioctl("KVM_GET_MP_STATE", state)
        return MpState(state[0])

    def set_mp_state(self, state: MpState) -> None:
        """Set whether the vCPU runs, sleeps or waits (KVM_CAP_MP_STATE)."""
        self.ioctl("KVM_SET_MP_STATE", ffi.new("__u32 *", state))

    def get_nested_state(self) -> bytes:
        """Return struct kvm_nested_state and its data, of the guest's own guests (KVM_CAP_NESTED_STATE)."""
        size = self.vm.check_extension(KVM_CAP_NESTED_STATE)
        buffer = ffi.new("char[]", max(size, 128))
        header = ffi.cast("__u32 *", buffer)
        header[1] = len(buffer)
        self.ioctl("KVM_GET_NESTED_STATE", buffer)
        return bytes(ffi.buffer(buffer, header[1]))

    def set_nested_state(self, state: bytes) -> None:
        """Set what ``get_nested_state`` returned (KVM_CAP_NESTED_STATE)."""
        if len(state) < 128 or int.from_bytes(state[4:8], "little") > len(state):
            raise ValueError(f"a nested state of {len(state)} bytes is shorter than its header says")
        self.ioctl("KVM_SET_NESTED_STATE", ffi.from_buffer("char[]", state))

    def set_tsc_khz(self, khz: int) -> None:
        """Set the guest's TSC frequency (KVM_CAP_TSC_CONTROL); 0 means the host's."""
        self.ioctl("KVM_SET_TSC_KHZ", khz)

    def get_tsc_khz(self) -> int:
        """Return the guest's TSC frequency in kHz (KVM_CAP_GET_TSC_KHZ)."""
        return self.ioctl("KVM_GET_TSC_KHZ")

    def translate(self, linear_address: int) -> TranslateResult:
        """Walk the guest's page tables."""
        c = ffi.new("struct kvm_translation *", {"linear_address": linear_address})
        self.ioctl("KVM_TRANSLATE", c)
        from aiokvm.kvm.state_structs import TranslateResult

        return TranslateResult(linear_address, c.physical_address, c.valid, c.writeable, c.usermode)

    def _xsave_bytes(self) -> int:
        return self.vm.check_extension(KVM_CAP_XSAVE2)

    def _get_bytes(self, name: str, size: int) -> bytes:
        buffer = ffi.new("char[]", size)
        self.ioctl(name, buffer)
        return bytes(ffi.buffer(buffer))

    def _set_bytes(self, name: str, state: bytes, size: int) -> None:
        if len(state) > size:
            raise ValueError(f"{len(state)} bytes of state; {name} takes {size} at most")
        buffer: Any = ffi.new("char[]", size)
        ffi.memmove(buffer, state, len(state))
        self.ioctl(name, buffer)
