"""Guest RAM: where it lies in the guest's physical address space, and access to it from the host.

RAM begins at 0. What does not fit below the PCI hole goes on at 4 GiB, as on a PC. It is one mapping, of
anonymous memory or of a memfd; a child of fork does not inherit it, and core dumps leave it out.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm._core import ffi, lib
from aiokvm.arguments import checked_late
from aiokvm.errors import ConfigError, GuestMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from aiokvm._core import Pointer

PAGE_SIZE = 4096
PCI_HOLE_START = 0xC000_0000
PCI_HOLE_END = 0x1_0000_0000
MFD_HUGE_SHIFT = 26
# KVM maps RAM with pages of up to this size where host and guest addresses are congruent to it. Less RAM than
# some of them gains nothing by it.
_ALIGN = 2 << 20
_ALIGN_FROM = 16 * _ALIGN


def ram_ranges(size_bytes: int) -> tuple[tuple[int, int], ...]:
    """Where RAM of this size lies: (gpa, size in bytes) of each range, ascending."""
    if size_bytes <= PCI_HOLE_START:
        return ((0, size_bytes),)
    return ((0, PCI_HOLE_START), (PCI_HOLE_END, size_bytes - PCI_HOLE_START))


@dataclass(frozen=True, slots=True)
class RamRegion:
    """A contiguous range of guest RAM; one KVM memslot each.

    ``gpa`` and ``size`` are bytes of the guest's physical address space, ``host_address`` is where this
    process sees them.
    """

    gpa: int
    size: int
    host_address: int
    bytes: memoryview


def core_ranges(regions: Sequence[RamRegion]) -> Pointer:
    """The ranges as the C core takes them: an array of ``struct aiokvm_ram``, which owns no RAM."""
    ranges: Pointer = ffi.new("struct aiokvm_ram[]", len(regions))
    for i, region in enumerate(regions):
        ranges[i].gpa = region.gpa
        ranges[i].size = region.size
        ranges[i].host = ffi.cast("uint8_t *", region.host_address)
    return ranges


class GuestMemory:
    """The RAM of one machine.

    ``size_bytes`` is a multiple of 4096. The memory is anonymous, in transparent huge pages where the host
    has them. ``shared`` makes it a memfd, ``fd``, for another process to map; pages of 4 KiB are what most
    hosts give such a file. ``hugepage_bytes`` (2 MiB or 1 GiB) takes the memory from the host's reserved huge
    pages of that size, and is a memfd, too. With ``overcommit`` the kernel need not promise as much.

    Raises ConfigError if the host cannot give that much memory.
    """

    fd: int | None = None
    """The memfd that the memory is, if it is one."""

    def __init__(
        self,
        size_bytes: int,
        hugepage_bytes: int | None = None,
        *,
        shared: bool = False,
        overcommit: bool = False,
    ) -> None:
        page_bytes = hugepage_bytes or PAGE_SIZE
        if size_bytes <= 0 or size_bytes % page_bytes:
            raise ConfigError(
                f"{size_bytes} bytes of memory is not a positive multiple of {page_bytes} bytes"
            )
        self.size_bytes = size_bytes
        self._is_reserved = hugepage_bytes is not None
        self._pid = os.getpid()
        if shared or hugepage_bytes:
            self.fd = _create_memfd(size_bytes, hugepage_bytes)
        try:
            mapping = _map(self.fd, size_bytes, hugepage_bytes, overcommit)
        except OSError as error:
            if self.fd is not None:
                os.close(self.fd)
            hint = _hint(size_bytes, hugepage_bytes, overcommit) if error.errno == errno.ENOMEM else ""
            raise ConfigError(
                f"cannot map {size_bytes} bytes of guest memory: {error.strerror}{hint}"
            ) from error
        base = int(ffi.cast("uintptr_t", mapping))
        # Views keep this object, and so the mapping, alive: closing never pulls memory from under one.
        whole = memoryview(ffi.buffer(ffi.gc(mapping, _Unmap(size_bytes)), size_bytes)).cast("B")
        regions = []
        offset = 0
        for gpa, size in ram_ranges(size_bytes):
            regions.append(RamRegion(gpa, size, base + offset, whole[offset : offset + size]))
            offset += size
        self.regions: tuple[RamRegion, ...] = tuple(regions)

    def close(self) -> None:
        """Gives the memory back, once the last view that the program still holds is gone. Idempotent."""
        if self.regions:
            self.regions = ()
            if self.fd is not None:
                os.close(self.fd)

    @checked_late
    def view(self, gpa: int, size: int) -> memoryview:
        """The guest's own bytes, writable, with no copy: ``size`` bytes from ``gpa`` on.

        The guest may change them at any time. A view keeps the memory from being freed; release it.
        Raises GuestMemoryError if the range is not wholly inside one range of RAM.
        """
        if os.getpid() != self._pid:
            raise GuestMemoryError(
                "guest memory belongs to the process that created it: a fork does not inherit it"
            )
        if not self.regions:
            raise GuestMemoryError("guest memory is closed")
        for region in self.regions:
            offset = gpa - region.gpa
            if 0 <= offset <= region.size and 0 <= size <= region.size - offset:
                return region.bytes[offset : offset + size]
        raise GuestMemoryError(f"{size:#x} bytes at {gpa:#x} are not wholly inside the guest's RAM")

    @checked_late
    def read(self, gpa: int, size: int) -> bytes:
        """A copy of ``size`` bytes from ``gpa`` on. Raises GuestMemoryError as `view` does."""
        with self.view(gpa, size) as view:
            return bytes(view)

    @checked_late
    def write(self, gpa: int, data: Buffer) -> None:
        """Copies data to ``gpa``. Raises GuestMemoryError as `view` does, before anything is written."""
        with memoryview(data).cast("B") as source, self.view(gpa, len(source)) as view:
            view[:] = source

    @checked_late
    def fill(self, gpa: int, size: int) -> None:
        """Writes ``size`` zero bytes from ``gpa`` on. Raises GuestMemoryError as `view` does."""
        with self.view(gpa, size) as view:
            lib.aiokvm_zero(ffi.from_buffer("uint8_t[]", view), size)

    def clear(self) -> None:
        """Makes all of it read as zeros, as after power-on, and gives it back to the host until it is used.

        Takes the kernel a while: not for the thread of an event loop.
        """
        for region in self.regions:
            try:
                # Reserved pages that were given back could be another's when they are needed again.
                if not self._is_reserved:
                    discard(region.bytes)
                    continue
            except OSError:
                pass  # memory that the program has locked
            self.fill(region.gpa, region.size)


def _create_memfd(size_bytes: int, hugepage_bytes: int | None) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if hugepage_bytes:
        flags |= os.MFD_HUGETLB | (hugepage_bytes.bit_length() - 1) << MFD_HUGE_SHIFT
    try:
        fd = os.memfd_create("aiokvm-ram", flags)
    except OSError as error:
        raise ConfigError(f"cannot create {size_bytes} bytes of guest memory: {error.strerror}") from error
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"cannot create {size_bytes} bytes of guest memory: {error.strerror}") from error
    return fd


def _map(fd: int | None, size_bytes: int, hugepage_bytes: int | None, overcommit: bool) -> Pointer:
    code = ffi.new("int *")
    # The kernel aligns reserved huge pages by itself.
    align = _ALIGN if size_bytes >= _ALIGN_FROM and not hugepage_bytes else 0
    if fd is None:
        mapping = lib.aiokvm_map_anonymous(size_bytes, align, overcommit, code)
    else:
        mapping = lib.aiokvm_map(fd, size_bytes, align, code)
    if not mapping:
        raise OSError(code[0], os.strerror(code[0]))
    return mapping


def _hint(size_bytes: int, hugepage_bytes: int | None, overcommit: bool) -> str:
    if hugepage_bytes:
        return (
            f": {size_bytes // hugepage_bytes} free huge pages of {hugepage_bytes >> 20} MiB are needed; "
            "reserve them in /sys/kernel/mm/hugepages"
        )
    if overcommit:
        return ": see ulimit -v, and the kernel's vm.overcommit_memory, which may allow no more than there is"
    return ": the host does not promise as much; give less, or overcommit"


class _Unmap:
    """Ends a mapping in the process that made it: a child of fork has something else at that address."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pid = os.getpid()

    def __call__(self, address: Pointer) -> None:
        if os.getpid() == self._pid:
            lib.aiokvm_unmap(address, self._size)


def discard(pages: memoryview) -> None:
    """Give RAM back to the host: the whole pages that a view of `GuestMemory` covers read as zeros then.

    Raises OSError if the host refuses, as it does for memory that is locked.
    """
    with memoryview(pages).cast("B") as view:
        code = lib.aiokvm_discard(ffi.from_buffer("uint8_t[]", view), len(view))
    if code:
        raise OSError(-code, os.strerror(-code))


class SharedPages:
    """Pages of RAM of their own, zeroed, that a device shares with the guest.

    ``size_bytes`` is a multiple of 4096. The pages live as long as ``bytes`` or a view of it does. Raises
    OSError if the host has none.
    """

    def __init__(self, size_bytes: int) -> None:
        fd = os.memfd_create("aiokvm-shared", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            code = ffi.new("int *")
            mapping = lib.aiokvm_map(fd, size_bytes, 0, code)
            if not mapping:
                raise OSError(code[0], os.strerror(code[0]))
        finally:
            os.close(fd)
        self.host_address = int(ffi.cast("uintptr_t", mapping))
        self.bytes = memoryview(ffi.buffer(ffi.gc(mapping, _Unmap(size_bytes)), size_bytes)).cast("B")
