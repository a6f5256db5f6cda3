"""Guest RAM: layout, bounds, lifetime, fork."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import memory as module
from aiokvm.errors import ConfigError, GuestMemoryError
from aiokvm.memory import PCI_HOLE_END, PCI_HOLE_START, GuestMemory, discard, ram_ranges
from tests.mappings import resident_bytes, secluded_bytes

GIB = 1 << 30


@pytest.fixture(params=[False, True], ids=["anonymous", "shared"])
def shared(request: pytest.FixtureRequest) -> bool:
    """Both kinds of memory."""
    return bool(request.param)


def take_all(memory: GuestMemory) -> int:
    """Bytes that it takes of the host when all of it is in use."""
    memory.write(0, b"x" * memory.size_bytes)
    return taken(memory)


def taken(memory: GuestMemory) -> int:
    if memory.fd is None:
        return resident_bytes(memory.regions[0].host_address)
    return os.fstat(memory.fd).st_blocks * 512


def test_ram_below_the_hole_is_one_range() -> None:
    assert ram_ranges(512 << 20) == ((0, 512 << 20),)
    assert ram_ranges(3 * GIB) == ((0, 3 * GIB),)


def test_ram_past_the_hole_goes_on_at_4_gib() -> None:
    assert ram_ranges(5 * GIB) == ((0, PCI_HOLE_START), (PCI_HOLE_END, 2 * GIB))
    assert PCI_HOLE_END == 4 * GIB


def test_reads_and_writes_reach_both_sides_of_the_hole() -> None:
    memory = GuestMemory(5 * GIB)
    memory.write(0, b"low")
    memory.write(5 * GIB - 4 + GIB, b"high")
    assert memory.read(0, 4) == b"low\0"
    assert memory.read(6 * GIB - 4, 4) == b"high"
    with memory.view(1, 2) as view:
        view[:] = b"ee"
    assert memory.read(0, 3) == b"lee"
    memory.close()


def test_host_addresses_are_congruent_to_guest_addresses_in_large_pages(shared: bool) -> None:
    memory = GuestMemory(5 * GIB, shared=shared)
    assert [region.host_address % (2 << 20) for region in memory.regions] == [0, 0]
    memory.close()


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0x1000, 1), (0xFFF, 2), (-1, 1), (0, -1), (0, 0x1001), (PCI_HOLE_START, 1), (1 << 64, 1), (0, 1 << 64)],
)
def test_a_range_that_leaves_ram_is_refused(gpa: int, size: int) -> None:
    memory = GuestMemory(0x1000)
    with pytest.raises(GuestMemoryError, match="not wholly inside"):
        memory.read(gpa, size)
    memory.close()


def test_a_range_across_the_hole_is_refused() -> None:
    memory = GuestMemory(4 * GIB)
    with pytest.raises(GuestMemoryError):
        memory.write(PCI_HOLE_START - 1, b"xy")
    memory.close()


@given(st.integers(-10, 0x2010), st.binary(max_size=40))
def test_a_write_changes_its_own_bytes_only(gpa: int, data: bytes) -> None:
    memory = GuestMemory(0x2000)
    model = bytearray(0x2000)
    if gpa >= 0 and gpa + len(data) <= 0x2000:
        memory.write(gpa, data)
        model[gpa : gpa + len(data)] = data
    else:
        with pytest.raises(GuestMemoryError):
            memory.write(gpa, data)
    assert memory.read(0, 0x2000) == model
    memory.close()


def test_fill_zeroes_the_range_and_nothing_else() -> None:
    memory = GuestMemory(4 << 20)
    memory.write(0, b"\xff" * (4 << 20))
    memory.fill(1, (3 << 20) + 5)
    assert memory.read(0, 4 << 20) == b"\xff" + bytes((3 << 20) + 5) + b"\xff" * ((1 << 20) - 6)
    memory.close()


def test_close_unmaps_and_further_access_is_refused(shared: bool) -> None:
    before = secluded_bytes()
    memory = GuestMemory(0x1000, shared=shared)
    assert secluded_bytes() == before + 0x1000
    memory.close()
    memory.close()
    assert secluded_bytes() == before
    with pytest.raises(GuestMemoryError, match="closed"):
        memory.read(0, 1)
    if memory.fd is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(memory.fd)


def test_shared_memory_is_a_file_that_another_can_map(shared: bool) -> None:
    memory = GuestMemory(0x2000, shared=shared)
    assert (memory.fd is not None) == shared
    if memory.fd is not None:
        with mmap.mmap(memory.fd, 0x2000) as other:
            memory.write(0x1000, b"guest")
            assert other[0x1000:0x1005] == b"guest"
    memory.close()


def test_by_default_large_memory_is_in_huge_pages() -> None:
    memory = GuestMemory(64 << 20)
    memory.write(5 << 20, b"x")
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if "[never]" not in modes:
        assert taken(memory) == 2 << 20
    memory.close()
    # Where there is little, many machines may be, and each has the pages that it uses.
    memory = GuestMemory(2 << 20)
    before = taken(memory)
    memory.write(0, b"x")
    assert taken(memory) <= before + 0x1000
    memory.close()


def test_memory_is_cleared(shared: bool) -> None:
    memory = GuestMemory(4 << 20, shared=shared)
    unused = taken(memory)
    assert take_all(memory) == unused + (4 << 20)
    memory.clear()
    assert taken(memory) == unused
    assert memory.read(0, 4 << 20) == bytes(4 << 20)
    memory.close()


def test_memory_that_cannot_be_given_back_is_cleared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pages: memoryview) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(module, "discard", refuse)
    memory = GuestMemory(1 << 20)
    take_all(memory)
    memory.clear()
    assert memory.read(0, 1 << 20) == bytes(1 << 20)
    memory.close()


def test_a_view_outlives_close_and_keeps_the_mapping() -> None:
    before = secluded_bytes()
    memory = GuestMemory(0x1000)
    view = memory.view(0, 4)
    memory.close()
    view[:] = b"still"[:4]
    assert bytes(view) == b"stil"
    view.release()
    assert secluded_bytes() == before


@pytest.mark.parametrize("size", [0, -4096, 4095, 4097])
def test_odd_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 4096"):
        GuestMemory(size)


def test_more_than_the_address_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot map"):
        GuestMemory(1 << 62)


def test_huge_pages_that_the_host_does_not_have_are_refused_with_the_way_out() -> None:
    free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    with pytest.raises(ConfigError, match=f"{free + 1} free huge pages of 2 MiB are needed"):
        GuestMemory((free + 1) * (2 << 20), hugepage_bytes=2 << 20)


def test_a_child_of_fork_is_refused_instead_of_crashing() -> None:
    memory = GuestMemory(0x1000)
    pid = os.fork()
    if pid == 0:
        # Whatever the child has at that address by now is not to be unmapped with the object.
        hole = mmap.mmap(-1, 0x1000)
        try:
            memory.read(0, 1)
        except GuestMemoryError:
            del memory
            hole[0] = 1
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    memory.close()


def test_discard_gives_whole_pages_back_and_leaves_their_neighbours(shared: bool) -> None:
    memory = GuestMemory(0x10000, shared=shared)
    used = take_all(memory)
    with memory.view(0x1001, 0x3000) as view:
        discard(view)
    assert taken(memory) == used - 0x2000
    assert memory.read(0, 0x2000) == b"x" * 0x2000
    assert memory.read(0x2000, 0x2000) == bytes(0x2000)
    assert memory.read(0x4000, 0xC000) == b"x" * 0xC000
    with memory.view(0x4001, 10) as view:
        discard(view)
    with memory.view(0x4000, 0) as view:
        discard(view)
    assert memory.read(0x4000, 0xC000) == b"x" * 0xC000
    memory.close()


def test_discard_of_memory_that_cannot_go_is_told() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    memory = GuestMemory(0x1000)
    address = ctypes.c_void_p(memory.regions[0].host_address)
    if libc.mlock(address, ctypes.c_size_t(0x1000)):
        pytest.skip("this process may lock no memory")
    with memory.view(0, 0x1000) as view, pytest.raises(OSError, match="Invalid argument"):
        discard(view)
    libc.munlock(address, ctypes.c_size_t(0x1000))
    memory.close()


def test_more_than_the_kernel_promises_takes_overcommit() -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "0":
        pytest.skip("the heuristic of vm.overcommit_memory=0 is what refuses it")
    with pytest.raises(ConfigError, match="does not promise as much"):
        GuestMemory(16 << 40)
    memory = GuestMemory(16 << 40, overcommit=True)
    memory.write((16 << 40) - 1, b"x")
    memory.close()
