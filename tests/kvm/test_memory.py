from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import Cap, CoalescedMmio, DirtyLog, KvmExit, Vm
from aiokvm.kvm.constants import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kvm.conftest import Guest

pytestmark = pytest.mark.kvm

# mov byte [0x3000], 0x55; mov byte [0x5123], 0x55; hlt
WRITE_3_AND_5 = bytes.fromhex("c606003055 c606235155 f4")


def test_overlapping_slots_are_refused(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xf4")
    with pytest.raises(KvmError, match="overlaps another slot") as caught:
        g.vm.set_user_memory_region(1, 0x4000, 0x1000, g.host_address)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(KvmError, match="multiples of 4096"):
        g.vm.set_user_memory_region(1, 0x40001, 0x1000, g.host_address)


def test_a_deleted_slot_is_gone(guest: Callable[..., Guest]) -> None:
    g = guest(bytes.fromhex("a00080 f4"))  # mov al, [0x8000]
    g.vm.set_user_memory_region(0, 0, 0, g.host_address)
    g.vm.set_user_memory_region(0, 0, 0x8000, g.host_address)
    assert g.run() == KvmExit.KVM_EXIT_MMIO
    assert g.vcpu.run_state.mmio.phys_addr == 0x8000


def test_read_only_memory(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_READONLY_MEM)
    g = guest(WRITE_3_AND_5, KVM_MEM_READONLY)
    assert g.run() == KvmExit.KVM_EXIT_MMIO
    assert g.vcpu.run_state.mmio.phys_addr == 0x3000
    assert g.memory[0x3000] == 0


def test_dirty_log(guest: Callable[..., Guest]) -> None:
    g = guest(WRITE_3_AND_5, KVM_MEM_LOG_DIRTY_PAGES)
    # A page that is read first may be mapped for writing at once, and then counts as dirty: the code's.
    g.run_to_hlt()
    assert {3, 5} <= set(g.vm.get_dirty_log(0).pages()) <= {1, 3, 5}
    g.go()
    g.run_to_hlt()
    log = g.vm.get_dirty_log(0)
    assert log == DirtyLog(0, (1 << 3 | 1 << 5).to_bytes(8, "little"))
    assert list(log.pages()) == [3, 5]
    assert list(g.vm.get_dirty_log(0).pages()) == []


def test_dirty_log_of_a_slot_without_one(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xf4")
    for slot in (0, 1):
        with pytest.raises(KvmError, match="KVM_MEM_LOG_DIRTY_PAGES") as caught:
            g.vm.get_dirty_log(slot)
        assert caught.value.errno == errno.ENOENT


def test_clear_dirty_log(vm: Vm, guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
    vm.enable_cap(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    g = guest(WRITE_3_AND_5, KVM_MEM_LOG_DIRTY_PAGES)
    g.run_to_hlt()
    vm.clear_dirty_log(vm.get_dirty_log(0))
    g.go()
    g.run_to_hlt()
    log = vm.get_dirty_log(0)
    assert list(vm.get_dirty_log(0).pages()) == [3, 5]
    vm.clear_dirty_log(DirtyLog(0, (1 << 3).to_bytes(2, "little")))
    assert list(vm.get_dirty_log(0).pages()) == [5]
    vm.clear_dirty_log(log)
    assert list(vm.get_dirty_log(0).pages()) == []
    with pytest.raises(ValueError, match="first_page is 8"):
        vm.clear_dirty_log(log, first_page=8)


def test_dirty_ring(vm: Vm, guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_DIRTY_LOG_RING)
    vm.enable_dirty_ring(1024)
    g = guest(WRITE_3_AND_5, KVM_MEM_LOG_DIRTY_PAGES)
    g.run_to_hlt()
    ring = g.vcpu.dirty_ring
    first = ring.harvest()
    assert {(0, 3), (0, 5)} <= {(entry.slot, entry.offset) for entry in first} <= {(0, 1), (0, 3), (0, 5)}
    assert ring.harvest() == []
    assert vm.reset_dirty_rings() == len(first)
    g.go()
    g.run_to_hlt()
    # Not in the order of the writes: with PML the processor notes them, and KVM reads its log backwards.
    assert {(entry.slot, entry.offset) for entry in ring.harvest()} == {(0, 3), (0, 5)}
    with pytest.raises(KvmError, match="the dirty ring is enabled"):
        vm.get_dirty_log(0)


def test_a_dirty_ring_has_a_power_of_two(
    vm: Vm, guest: Callable[..., Guest], requires: Callable[[Cap], int]
) -> None:
    requires(Cap.KVM_CAP_DIRTY_LOG_RING)
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP"):
        vm.enable_dirty_ring(3)
    assert vm.dirty_ring_entries == 0


def test_no_dirty_ring(guest: Callable[..., Guest]) -> None:
    g = guest(b"\xf4")
    with pytest.raises(KvmError, match="enable_dirty_ring"):
        _ = g.vcpu.dirty_ring
    with pytest.raises(KvmError):
        g.vm.reset_dirty_rings()


def test_coalesced_writes(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_COALESCED_MMIO)
    requires(Cap.KVM_CAP_COALESCED_PIO)
    # mov ax, 0x2000; mov ds, ax; mov [0x10], ax; out 0x50, al; hlt
    g = guest(bytes.fromhex("b80020 8ed8 a31000 e650 f4"))
    g.vm.register_coalesced_mmio(0x20000, 0x100)
    g.vm.register_coalesced_mmio(0x50, 1, pio=True)
    g.run_to_hlt()
    assert g.vcpu.drain_coalesced() == [
        CoalescedMmio(0x20010, b"\x00\x20", pio=False),
        CoalescedMmio(0x50, b"\x00", pio=True),
    ]
    assert g.vcpu.drain_coalesced() == []
    g.vm.unregister_coalesced_mmio(0x20000, 0x100)
    g.go()
    assert g.run() == KvmExit.KVM_EXIT_MMIO


def test_a_coalesced_ring_wraps_and_runs_full(
    guest: Callable[..., Guest], requires: Callable[[Cap], int]
) -> None:
    requires(Cap.KVM_CAP_COALESCED_PIO)
    # mov cx, 250; 1: mov al, cl; out 0x50, al; loop 1b; hlt
    g = guest(bytes.fromhex("b9fa00 88c8 e650 e2fa f4"))
    g.vm.register_coalesced_mmio(0x50, 1, pio=True)
    for _ in range(3):
        g.go()
        written = []
        exits = 0
        while g.run() == KvmExit.KVM_EXIT_IO:
            written += [entry.data for entry in g.vcpu.drain_coalesced()]
            written.append(g.vcpu.run_state.io.data)
            exits += 1
        written += [entry.data for entry in g.vcpu.drain_coalesced()]
        assert b"".join(written) == bytes(range(250, 0, -1))
        assert 1 <= exits < 10


def test_region2_and_guest_memfd(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_USER_MEMORY2)
    g = guest(WRITE_3_AND_5)
    g.vm.set_user_memory_region2(0, 0, 0, 0)
    g.vm.set_user_memory_region2(0, 0, len(g.memory), g.host_address, KVM_MEM_LOG_DIRTY_PAGES)
    g.run_to_hlt()
    assert list(g.vm.get_dirty_log(0).pages()) == [3, 5]


def test_guest_memfd(vm: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_GUEST_MEMFD)
    wanted = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    if vm.check_extension(Cap.KVM_CAP_GUEST_MEMFD_FLAGS) & wanted != wanted:
        pytest.skip("this host lacks the flags of KVM_CAP_GUEST_MEMFD_FLAGS")
    fd = vm.create_guest_memfd(0x10000, wanted)
    try:
        assert os.fstat(fd).st_size == 0x10000
        vm.set_user_memory_region2(7, 0, 0x8000, 0, guest_memfd=fd, guest_memfd_offset=0x8000)
        vm.set_user_memory_region2(7, 0, 0, 0, guest_memfd=fd, guest_memfd_offset=0x8000)
    finally:
        os.close(fd)


def test_memory_attributes(vm: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_MEMORY_ATTRIBUTES)
    vm.set_memory_attributes(0, 0x1000, 0)


def test_mmu_pages(vm: Vm) -> None:
    vm.set_nr_mmu_pages(4096)
    with pytest.raises(KvmError):
        vm.set_nr_mmu_pages(1)


def test_dirty_pages_of_a_bitmap() -> None:
    assert list(DirtyLog(0, b"\x81\x00\x03").pages()) == [0, 7, 16, 17]
    assert list(DirtyLog(0, b"").pages()) == []
