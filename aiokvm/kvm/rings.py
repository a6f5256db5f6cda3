"""The rings behind a vCPU's kvm_run: coalesced writes and written pages (KVM API, 4.116 and 8.29)."""

from __future__ import annotations

import mmap
from typing import Any

from aiokvm._core import ffi
from aiokvm.kvm.constants import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_LOG_PAGE_OFFSET
from aiokvm.kvm.convert import from_c
from aiokvm.kvm.vm_structs import CoalescedMmio, DirtyGfn


def drain_coalesced(page: Any) -> list[CoalescedMmio]:
    """Take all writes out of the ring in ``page``, oldest first. One thread at a time may do this in a VM."""
    ring = ffi.cast("struct kvm_coalesced_mmio_ring *", page)
    capacity = (mmap.PAGESIZE - ffi.sizeof("struct kvm_coalesced_mmio_ring")) // ffi.sizeof(
        "struct kvm_coalesced_mmio"
    )
    entries = ffi.cast("struct kvm_coalesced_mmio *", ring + 1)
    first, last = ring.first, ring.last
    taken = []
    while first != last:
        entry = entries[first]
        data = bytes(ffi.buffer(entry.data))[: entry.len]
        taken.append(CoalescedMmio(entry.phys_addr, data, bool(entry.pio)))
        first = (first + 1) % capacity
    # The kernel owns last, this side owns first; x86 keeps the store behind the loads above.
    ring.first = first
    return taken


class DirtyRing:
    """A vCPU's ring of written pages.

    KVM_EXIT_DIRTY_RING_FULL asks for a harvest and ``Vm.reset_dirty_rings``.
    """

    def __init__(self, fd: int, entries: int) -> None:
        self._map = mmap.mmap(
            fd,
            entries * ffi.sizeof("struct kvm_dirty_gfn"),
            flags=mmap.MAP_SHARED,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE,
        )
        self._entries: Any = ffi.from_buffer("struct kvm_dirty_gfn[]", self._map)
        self._next = 0

    def harvest(self) -> list[DirtyGfn]:
        """Take the pages written since the last harvest, in the order in which KVM noted them.

        That need not be the order of the writes: a processor that logs pages by itself (Intel's PML) hands
        them over in batches. The pages count as dirty, and their entries stay taken, until
        ``Vm.reset_dirty_rings``.
        """
        taken: list[DirtyGfn] = []
        count = len(self._entries)
        while len(taken) < count:
            entry = self._entries[self._next % count]
            # x86 keeps the loads of slot and offset behind that of flags, and the store of flags behind both.
            if not entry.flags & KVM_DIRTY_GFN_F_DIRTY or entry.flags & KVM_DIRTY_GFN_F_RESET:
                break
            taken.append(from_c(DirtyGfn, entry))
            entry.flags = KVM_DIRTY_GFN_F_RESET
            self._next += 1
        return taken

    def close(self) -> None:
        """Unmap the ring; the second call does nothing."""
        if not self._map.closed:
            del self._entries
            self._map.close()
