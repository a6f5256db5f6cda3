"""A vCPU (KVM API, section 4, "vcpu ioctl")."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

from aiokvm._core import ffi, lib
from aiokvm.errors import KvmError
from aiokvm.kvm.constants import KVM_CAP_COALESCED_MMIO, KVM_GUESTDBG_ENABLE, KvmExit
from aiokvm.kvm.hints import hint
from aiokvm.kvm.memory import enable_cap
from aiokvm.kvm.vcpu_state import StateIoctls

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aiokvm._core import Pointer
    from aiokvm.kvm.caps import Cap
    from aiokvm.kvm.rings import DirtyRing
    from aiokvm.kvm.run_state import RunState
    from aiokvm.kvm.state_structs import X86Mce
    from aiokvm.kvm.stats import Stats
    from aiokvm.kvm.vm import Vm
    from aiokvm.kvm.vm_structs import CoalescedMmio

_EHWPOISON = 133  # Python's errno lacks it


class Vcpu(StateIoctls):
    """A vCPU, made by ``Vm.create_vcpu``, with its struct kvm_run mapped.

    KVM wants all requests of a vCPU to come from one thread at a time, and none while it runs.
    """

    _run: Pointer | None = None
    _dirty_ring: DirtyRing | None = None

    def __init__(self, vm: Vm, vcpu_id: int, fd: int) -> None:
        super().__init__(fd)
        self.vm = vm
        self.id = vcpu_id
        self.run_size = vm.vcpu_mmap_size
        """The size in bytes of what ``run_pointer`` points to."""
        error = ffi.new("int *")
        address = lib.aiokvm_map(fd, self.run_size, 0, error)
        if not address:
            self.close()
            raise KvmError("mmap", error[0], "the vCPU's kvm_run could not be mapped")
        self._run = ffi.cast("struct kvm_run *", address)
        self._pid = os.getpid()

    @property
    def run_pointer(self) -> Pointer:
        """Where the vCPU's struct kvm_run is; valid until ``close``."""
        if self._run is None:
            raise KvmError("kvm_run", errno.EBADF, "the Vcpu is closed")
        return self._run

    @property
    def run_state(self) -> RunState:
        """The vCPU's struct kvm_run, typed."""
        from aiokvm.kvm.run_state import RunState

        return RunState(self)

    def run(self) -> int:
        """Run the guest in this thread until an exit; return its reason, a KvmExit or a newer number.

        A signal, and ``run_state.immediate_exit``, end it with KVM_EXIT_INTR. Raises KvmError.
        """
        # EAGAIN: a vCPU that waits for its start-up interrupt was woken, and is to be entered once more.
        while (answer := self.try_ioctl("KVM_RUN")) == -errno.EAGAIN:
            pass
        if answer == -errno.EINTR:
            return KvmExit.KVM_EXIT_INTR
        reason = int(self.run_pointer.exit_reason)
        # A memory fault is an exit although the call fails.
        if answer < 0 and not (
            reason == KvmExit.KVM_EXIT_MEMORY_FAULT and -answer in (errno.EFAULT, _EHWPOISON)
        ):
            raise KvmError("KVM_RUN", -answer, hint("KVM_RUN", -answer))
        return reason

    def enable_cap(self, cap: Cap | int, *args: int, flags: int = 0) -> int:
        """Enable a capability of the vCPU with up to four arguments (KVM API, section 6)."""
        return enable_cap(self, cap, args, flags)

    def interrupt(self, vector: int) -> None:
        """Queue an interrupt, without an in-kernel local APIC, where ``ready_for_interrupt_injection``."""
        self.ioctl("KVM_INTERRUPT", ffi.new("__u32 *", vector))

    def nmi(self) -> None:
        """Queue an NMI (KVM_CAP_USER_NMI)."""
        self.ioctl("KVM_NMI")

    def smi(self) -> None:
        """Queue an SMI (KVM_CAP_X86_SMM)."""
        self.ioctl("KVM_SMI")

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """Step the guest or stop it at breakpoints with KVM_EXIT_DEBUG (KVM_CAP_SET_GUEST_DEBUG).

        ``control`` of KVM_GUESTDBG_*, 0 to end it; ``debugreg`` are DR0 to DR7 with KVM_GUESTDBG_USE_HW_BP.
        """
        if control:
            control |= KVM_GUESTDBG_ENABLE
        arg = {"control": control, "arch": {"debugreg": list(debugreg)}}
        self.ioctl("KVM_SET_GUEST_DEBUG", ffi.new("struct kvm_guest_debug *", arg))

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """Block these signals while the guest runs, instead of the thread's own mask; None undoes it."""
        if signals is None:
            self.ioctl("KVM_SET_SIGNAL_MASK", 0)
            return
        mask = 0
        for number in signals:
            mask |= 1 << (number - 1)
        arg = {"len": 8, "sigset": list(mask.to_bytes(8, "little"))}
        self.ioctl("KVM_SET_SIGNAL_MASK", ffi.new("struct kvm_signal_mask *", arg))

    def kvmclock_ctrl(self) -> None:
        """Tell the guest's watchdogs that it was paused (KVM_CAP_KVMCLOCK_CTRL)."""
        self.ioctl("KVM_KVMCLOCK_CTRL")

    def tpr_access_reporting(self, enabled: bool) -> None:
        """Report accesses to the local APIC's TPR as KVM_EXIT_TPR_ACCESS (KVM_CAP_VAPIC)."""
        self.ioctl("KVM_TPR_ACCESS_REPORTING", ffi.new("struct kvm_tpr_access_ctl *", {"enabled": enabled}))

    def set_vapic_addr(self, address: int) -> None:
        """Name the guest physical address that mirrors the TPR (KVM_CAP_VAPIC)."""
        self.ioctl("KVM_SET_VAPIC_ADDR", ffi.new("struct kvm_vapic_addr *", [address]))

    def setup_mce(self, mcg_cap: int) -> None:
        """Set MCG_CAP: the number of machine check banks and features (KVM_CAP_MCE)."""
        self.ioctl("KVM_X86_SETUP_MCE", ffi.new("__u64 *", mcg_cap))

    def set_mce(self, mce: X86Mce) -> None:
        """Inject a machine check (KVM_CAP_MCE)."""
        self._set("KVM_X86_SET_MCE", mce)

    def pre_fault_memory(self, gpa: int, size: int) -> int:
        """Map guest memory ahead; return how many bytes are left to do (KVM_CAP_PRE_FAULT_MEMORY)."""
        arg = ffi.new("struct kvm_pre_fault_memory *", {"gpa": gpa, "size": size})
        self.ioctl("KVM_PRE_FAULT_MEMORY", arg)
        return int(arg.size)

    def get_stats(self) -> Stats:
        """Return the vCPU's statistics, open until closed (KVM_CAP_BINARY_STATS_FD)."""
        from aiokvm.kvm.stats import Stats

        return Stats(self.ioctl("KVM_GET_STATS_FD"))

    def drain_coalesced(self) -> list[CoalescedMmio]:
        """Take the VM's coalesced writes, oldest first (KVM_CAP_COALESCED_MMIO)."""
        from aiokvm.kvm.rings import drain_coalesced

        page = self.vm.check_extension(KVM_CAP_COALESCED_MMIO)
        if page == 0:
            raise KvmError("KVM_REGISTER_COALESCED_MMIO", errno.EOPNOTSUPP, "this KVM coalesces no writes")
        return drain_coalesced(ffi.cast("char *", self.run_pointer) + page * mmap.PAGESIZE)

    @property
    def dirty_ring(self) -> DirtyRing:
        """The pages that this vCPU wrote, with ``Vm.enable_dirty_ring`` before the vCPU was made."""
        from aiokvm.kvm.rings import DirtyRing

        fd = self._open_fd("dirty_ring")
        if self._dirty_ring is None:
            entries = self.vm.dirty_ring_entries
            if entries == 0:
                raise KvmError("mmap", errno.EINVAL, "enable_dirty_ring must come before the first vCPU")
            self._dirty_ring = DirtyRing(fd, entries)
        return self._dirty_ring

    def close(self) -> None:
        """Unmap kvm_run and the dirty ring, then close the descriptor; the second call does nothing."""
        if self._dirty_ring is not None:
            self._dirty_ring.close()
        # A child of fork() has not inherited the mapping; what it has at this address is its own.
        if self._run is not None and self._pid == os.getpid():
            lib.aiokvm_unmap(self._run, self.run_size)
        self._run = None
        super().close()
