"""A VM's memory slots, what was written to them, and coalesced MMIO (KVM API, section 4)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from aiokvm._core import ffi
from aiokvm.errors import KvmError
from aiokvm.kvm.constants import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_MEM_GUEST_MEMFD,
)
from aiokvm.kvm.hints import hint
from aiokvm.kvm.ioctl import Handle

if TYPE_CHECKING:
    from typing import Any

    from aiokvm.kvm.caps import Cap
    from aiokvm.kvm.vm_structs import DirtyLog

_PAGE = 4096


class MemoryIoctls(Handle):
    """The requests of a VM that concern its memory."""

    dirty_ring_entries = 0
    """How many entries each vCPU's dirty ring has; 0 without ``enable_dirty_ring``."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        # The kernel writes a dirty log as long as the slot is: the length must be what it was told.
        self._slot_pages: dict[int, int] = {}

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """Give the guest ``memory_size`` bytes of this process at ``guest_phys_addr``; 0 deletes the slot.

        ``flags`` of KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY. The memory at ``userspace_addr`` must stay
        mapped as long as the slot is there. Addresses and size are multiples of 4096.
        """
        self._set_region(
            "KVM_SET_USER_MEMORY_REGION", slot, guest_phys_addr, memory_size, userspace_addr, flags
        )

    def set_user_memory_region2(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
        *,
        guest_memfd: int | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        """Do the same, with a guest_memfd where one is named (KVM_CAP_USER_MEMORY2)."""
        more = {"guest_memfd": 0, "guest_memfd_offset": guest_memfd_offset}
        if guest_memfd is not None:
            flags |= KVM_MEM_GUEST_MEMFD
            more["guest_memfd"] = guest_memfd
        self._set_region(
            "KVM_SET_USER_MEMORY_REGION2", slot, guest_phys_addr, memory_size, userspace_addr, flags, more
        )

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """Return the descriptor of ``size`` bytes, the caller's to close (KVM_CAP_GUEST_MEMFD)."""
        arg = ffi.new("struct kvm_create_guest_memfd *", {"size": size, "flags": flags})
        return self.ioctl("KVM_CREATE_GUEST_MEMFD", arg)

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        """Make a guest physical range private (KVM_MEMORY_ATTRIBUTE_PRIVATE) or shared (0).

        It needs KVM_CAP_MEMORY_ATTRIBUTES.
        """
        arg = {"address": address, "size": size, "attributes": attributes}
        self.ioctl("KVM_SET_MEMORY_ATTRIBUTES", ffi.new("struct kvm_memory_attributes *", arg))

    def set_nr_mmu_pages(self, pages: int) -> None:
        """Limit the pages that KVM's shadow page tables take."""
        self.ioctl("KVM_SET_NR_MMU_PAGES", pages)

    def get_dirty_log(self, slot: int) -> DirtyLog:
        """Return the slot's pages written since the last call.

        Where KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is not enabled they count as clean from then on.
        """
        bitmap = ffi.new("char[]", self._bitmap_bytes("KVM_GET_DIRTY_LOG", slot))
        self.ioctl(
            "KVM_GET_DIRTY_LOG", ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": bitmap})
        )
        from aiokvm.kvm.vm_structs import DirtyLog

        return DirtyLog(slot, bytes(ffi.buffer(bitmap)))

    def clear_dirty_log(self, log: DirtyLog, first_page: int = 0, num_pages: int | None = None) -> None:
        """Count the log's pages among ``num_pages`` from ``first_page`` as clean.

        ``first_page`` is a multiple of 64; None means up to the slot's end. It needs
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
        """
        if first_page % 64:
            raise ValueError(f"first_page is {first_page}; it must be a multiple of 64")
        size = self._bitmap_bytes("KVM_CLEAR_DIRTY_LOG", log.slot)
        count = self._slot_pages[log.slot] - first_page if num_pages is None else num_pages
        bitmap = ffi.new("char[]", size)
        part = log.bitmap[first_page // 8 : size]
        ffi.memmove(bitmap, part, len(part))
        arg = {"slot": log.slot, "num_pages": count, "first_page": first_page, "dirty_bitmap": bitmap}
        self.ioctl("KVM_CLEAR_DIRTY_LOG", ffi.new("struct kvm_clear_dirty_log *", arg))

    def enable_dirty_ring(self, entries: int) -> None:
        """Give each vCPU to come a ring of ``entries`` (a power of two) written pages, instead of dirty logs.

        KVM_CAP_DIRTY_LOG_RING_ACQ_REL or KVM_CAP_DIRTY_LOG_RING say how many bytes, 16 each, there may be.
        """
        cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL
        if self.check_extension(cap) == 0:
            cap = KVM_CAP_DIRTY_LOG_RING
        self.enable_cap(cap, entries * ffi.sizeof("struct kvm_dirty_gfn"))
        self.dirty_ring_entries = entries

    def reset_dirty_rings(self) -> int:
        """Count the pages that were harvested as clean; return how many those were."""
        return self.ioctl("KVM_RESET_DIRTY_RINGS")

    def register_coalesced_mmio(self, addr: int, size: int, *, pio: bool = False) -> None:
        """Put writes to a range aside, for ``Vcpu.drain_coalesced`` (KVM_CAP_COALESCED_MMIO, _PIO).

        They cause an exit only when the ring of about 170 is full.
        """
        arg = {"addr": addr, "size": size, "pio": pio}
        self.ioctl("KVM_REGISTER_COALESCED_MMIO", ffi.new("struct kvm_coalesced_mmio_zone *", arg))

    def unregister_coalesced_mmio(self, addr: int, size: int, *, pio: bool = False) -> None:
        """Undo ``register_coalesced_mmio``, for every zone within the range."""
        arg = {"addr": addr, "size": size, "pio": pio}
        self.ioctl("KVM_UNREGISTER_COALESCED_MMIO", ffi.new("struct kvm_coalesced_mmio_zone *", arg))

    def check_extension(self, cap: Cap | int) -> int:
        """Return 0 where this VM lacks the capability, else a positive number, which may be a count."""
        return self.ioctl("KVM_CHECK_EXTENSION", int(cap))

    def enable_cap(self, cap: Cap | int, *args: int, flags: int = 0) -> int:
        """Enable a capability of the VM with up to four arguments (KVM API, section 7)."""
        return enable_cap(self, cap, args, flags)

    def _set_region(
        self,
        name: str,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int,
        more: dict[str, int] | None = None,
    ) -> None:
        struct = "kvm_userspace_memory_region" if more is None else "kvm_userspace_memory_region2"
        region: dict[str, Any] = {
            "slot": slot,
            "flags": flags,
            "guest_phys_addr": guest_phys_addr,
            "memory_size": memory_size,
            "userspace_addr": userspace_addr,
        }
        self.ioctl(name, ffi.new(f"struct {struct} *", region | (more or {})))
        self._slot_pages[slot] = memory_size // _PAGE
        if memory_size == 0:
            del self._slot_pages[slot]

    def _bitmap_bytes(self, name: str, slot: int) -> int:
        pages = self._slot_pages.get(slot)
        if pages is None:
            raise KvmError(name, errno.ENOENT, hint(name, errno.ENOENT))
        return (pages + 63) // 64 * 8


def enable_cap(handle: Handle, cap: Cap | int, args: tuple[int, ...], flags: int) -> int:
    """Enable a capability of a VM or a vCPU."""
    arg = {"cap": int(cap), "flags": flags, "args": list(args)}
    return handle.ioctl("KVM_ENABLE_CAP", ffi.new("struct kvm_enable_cap *", arg))
