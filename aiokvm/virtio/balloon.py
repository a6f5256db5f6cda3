"""The traditional memory balloon device. Virtio 1.2, section 5.5.

Pages that the guest gives up go back to the host at once; the guest finds zeros in them when it takes them
back, which needs nothing of the device. Free page hinting, which is migration's, is not offered.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Protocol

from aiokvm.errors import DeviceError, VirtqueueError
from aiokvm.virtio.constants import VIRTIO_ID_BALLOON
from aiokvm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aiokvm.virtio.queue import Chain

VIRTIO_BALLOON_F_MUST_TELL_HOST = 1 << 0
VIRTIO_BALLOON_F_STATS_VQ = 1 << 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 1 << 2
VIRTIO_BALLOON_F_FREE_PAGE_HINT = 1 << 3
VIRTIO_BALLOON_F_PAGE_POISON = 1 << 4
VIRTIO_BALLOON_F_REPORTING = 1 << 5

VIRTIO_BALLOON_PFN_SHIFT = 12
PAGE_BYTES = 1 << VIRTIO_BALLOON_PFN_SHIFT

INFLATEQ = 0
DEFLATEQ = 1
STATSQ = 2
# The specification gives reporting_vq the number 4. Linux and QEMU number the queues that there are, which
# makes it 3 with no free_page_vq. A driver uses one of them.
REPORTING_VQS = (3, 4)

# Linux puts up to 256 page numbers, or 32 ranges of free pages, into one chain.
QUEUE_SIZE = 128
# Before the loop has a turn: a page of a huge one, which the kernel splits, takes 20 us, and more while vCPUs
# run that may know it; a page of a large range 0.1 us.
PAGES_AT_ONCE = 128
RELEASE_BYTES = 32 << 20
# Ten statistics are known; this many, known or not, are looked at.
STATS_MAX = 64

STATISTICS = (
    *("swap_in", "swap_out", "major_faults", "minor_faults", "free", "total"),
    *("available", "caches", "hugetlb_allocations", "hugetlb_failures"),
)
"""VIRTIO_BALLOON_S_*, by tag. Memory is in bytes."""

_STAT = struct.Struct("<HQ")
_CONFIG = struct.Struct("<IIII")
_ACTUAL = 4
_POISON_VAL = 12


class Ram(Protocol):
    """Guest RAM, as `aiokvm.memory.GuestMemory`."""

    @property
    def regions(self) -> Sequence[RamRange]:
        """Where it lies."""

    def view(self, gpa: int, size: int) -> memoryview:
        """The guest's own bytes."""


class RamRange(Protocol):
    """A range of RAM, in bytes; a multiple of pages."""

    @property
    def gpa(self) -> int:
        """Its guest physical address."""

    @property
    def size(self) -> int:
        """Its size."""


class Balloon(VirtioDevice):
    """A balloon over ``memory``.

    ``release`` gives a range of RAM back to the host, which then reads as zeros; of a range that does not
    begin or end with a page, the whole pages in it. ``on_actual`` is called when the guest says how many
    pages are in the balloon, ``on_stats`` when it has sent statistics: numbers by their name in `STATISTICS`.

    ``dropped`` counts page numbers that were not in RAM, given up twice, or taken back without having been
    given up; ``released_bytes`` what went back to the host, again and again for pages that the guest used
    again.
    """

    device_id = VIRTIO_ID_BALLOON
    queue_size_max = (QUEUE_SIZE,) * 5
    device_features = (
        VIRTIO_BALLOON_F_STATS_VQ
        | VIRTIO_BALLOON_F_DEFLATE_ON_OOM
        | VIRTIO_BALLOON_F_PAGE_POISON
        | VIRTIO_BALLOON_F_REPORTING
    )

    def __init__(
        self,
        memory: Ram,
        release: Callable[[memoryview], None],
        *,
        on_actual: Callable[[], None] = lambda: None,
        on_stats: Callable[[Mapping[str, int]], None] = lambda stats: None,  # noqa: ARG005
    ) -> None:
        self.config = bytearray(_CONFIG.size)
        self.dropped = 0
        self.released_bytes = 0
        self.pages = 0
        """Pages in the balloon, by the device's own count."""
        self._memory = memory
        self._release = release
        self._on_actual = on_actual
        self._on_stats = on_stats
        # One bit a page of RAM, range after range.
        self._most = sum(ram.size for ram in memory.regions) >> VIRTIO_BALLOON_PFN_SHIFT
        self._inside = bytearray((self._most + 7) // 8)
        # By queue: a chain that is not finished.
        self._held: dict[int, Chain] = {}
        # What of a report is not yet released, and the chain of statistics by which the next are asked for.
        self._report: list[memoryview] = []
        self._stats: Chain | None = None

    @property
    def num_pages(self) -> int:
        """Pages that the guest is asked to have in the balloon."""
        return int.from_bytes(self.config[:_ACTUAL], "little")

    @num_pages.setter
    def num_pages(self, pages: int) -> None:
        if not 0 <= pages <= self._most:
            raise DeviceError(f"a balloon of {pages} pages: RAM has {self._most}")
        self.config[:_ACTUAL] = pages.to_bytes(4, "little")
        if self.queues:
            self.host.config_changed()

    @property
    def actual(self) -> int:
        """Pages in the balloon as the guest says, which nothing makes true."""
        return int.from_bytes(self.config[_ACTUAL : _ACTUAL + 4], "little")

    def request_stats(self) -> bool:
        """Ask the guest for statistics; False if it has none to give, or has not answered the last time."""
        if not self._stats:
            return False
        self._stats.push(0)
        self._stats = None
        self._publish(STATSQ)
        return True

    # The driver's side.

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take `actual` and poison_val; the rest is the device's."""
        if size != 4 or offset not in (_ACTUAL, _POISON_VAL):
            return
        self.config[offset : offset + 4] = value.to_bytes(4, "little")
        if offset == _ACTUAL:
            self._on_actual()

    def notified(self, queue: int) -> None:
        """Carry on with what the queue is for; queues that were not negotiated are ignored."""
        if queue >= len(self.queues) or not self.queues[queue].ready:
            return
        try:
            if queue in (INFLATEQ, DEFLATEQ):
                self._change(queue)
            elif queue == STATSQ and self.features & VIRTIO_BALLOON_F_STATS_VQ:
                self._take_stats()
            elif queue in REPORTING_VQS and self.features & VIRTIO_BALLOON_F_REPORTING:
                self._take_reports(queue)
        except VirtqueueError as error:
            self.host.needs_reset(str(error))

    def stop_queue(self, queue: int) -> None:
        """Forget what of it was held."""
        self._held.pop(queue, None)
        if queue in REPORTING_VQS:
            self._report.clear()
        if queue == STATSQ:
            self._stats = None

    def reset(self) -> None:
        """Forget the driver. Its memory is its own again; what it is asked for stays."""
        for queue in range(len(self.queue_size_max)):
            self.stop_queue(queue)
        self._inside = bytearray(len(self._inside))
        self.pages = 0
        self.config[_ACTUAL:] = bytes(_CONFIG.size - _ACTUAL)
        self._on_actual()

    def _publish(self, queue: int) -> None:
        if self.queues[queue].publish():
            self.host.interrupt(queue)

    # Inflating and deflating (5.5.6).

    def _change(self, index: int) -> None:
        queue = self.queues[index]
        budget = PAGES_AT_ONCE
        # A chain with no page in it costs something, too.
        chains = queue.size
        while budget > 0 and chains:
            chain = self._held.pop(index, None) or queue.pop()
            if chain is None:
                break
            numbers = chain.read(4 * budget)
            # The end of a chain that is no multiple of 4 is no page number.
            pfns = [pfn for (pfn,) in struct.iter_unpack("<I", numbers[: len(numbers) & ~3])]
            (self._inflate if index == INFLATEQ else self._deflate)(pfns)
            if len(numbers) == 4 * budget:
                self._held[index] = chain
            else:
                chain.push(0)
                chains -= 1
            budget -= len(pfns)
        else:
            self.host.again(index)
        self._publish(index)

    def _inflate(self, pfns: Sequence[int]) -> None:
        start = end = 0
        for pfn in sorted(pfns):
            page = self._page(pfn)
            if page is None or self._inside[page >> 3] & 1 << (page & 7):
                self.dropped += 1
                continue
            self._inside[page >> 3] |= 1 << (page & 7)
            self.pages += 1
            # Neighbours go in one call, if they are in one range of RAM.
            if pfn != end or self._begins_range(pfn):
                self._give_back(start, end)
                start = pfn
            end = pfn + 1
        self._give_back(start, end)

    def _deflate(self, pfns: Sequence[int]) -> None:
        for pfn in pfns:
            page = self._page(pfn)
            if page is None or not self._inside[page >> 3] & 1 << (page & 7):
                self.dropped += 1
                continue
            self._inside[page >> 3] &= ~(1 << (page & 7))
            self.pages -= 1

    def _page(self, pfn: int) -> int | None:
        """The page's number among those of RAM; None if it is not there."""
        gpa = pfn << VIRTIO_BALLOON_PFN_SHIFT
        before = 0
        for ram in self._memory.regions:
            if 0 <= gpa - ram.gpa < ram.size:
                return (before + gpa - ram.gpa) >> VIRTIO_BALLOON_PFN_SHIFT
            before += ram.size
        return None

    def _begins_range(self, pfn: int) -> bool:
        return any(ram.gpa == pfn << VIRTIO_BALLOON_PFN_SHIFT for ram in self._memory.regions)

    def _give_back(self, start: int, end: int) -> None:
        if size := (end - start) << VIRTIO_BALLOON_PFN_SHIFT:
            with self._memory.view(start << VIRTIO_BALLOON_PFN_SHIFT, size) as view:
                self._release(view)
            self.released_bytes += size

    # Statistics (5.5.6.3): the device keeps a chain, and asks for the next statistics by giving it back.

    def _take_stats(self) -> None:
        queue = self.queues[STATSQ]
        stats: dict[str, int] | None = None
        for _ in range(queue.size):
            if (chain := queue.pop()) is None:
                break
            # A driver has one buffer there. Of one that has more the newest counts.
            if self._stats:
                self._stats.push(0)
            self._stats = chain
            data = chain.read(_STAT.size * STATS_MAX)
            entries = _STAT.iter_unpack(data[: len(data) - len(data) % _STAT.size])
            stats = {STATISTICS[tag]: value for tag, value in entries if tag < len(STATISTICS)}
        else:
            self.host.again(STATSQ)
        self._publish(STATSQ)
        if stats is not None:
            self._on_stats(stats)

    # Free page reporting (5.5.6.7): the buffers of a chain are the pages.

    def _take_reports(self, index: int) -> None:
        queue = self.queues[index]
        budget = RELEASE_BYTES
        chains = queue.size
        # A page that has to keep a value other than zero cannot go (5.5.6.7.2).
        keep = self.features & VIRTIO_BALLOON_F_PAGE_POISON and any(self.config[_POISON_VAL:])
        while budget > 0 and chains:
            chain = self._held.pop(index, None)
            if chain is None:
                chain = queue.pop()
                if chain is None:
                    break
                self._report = [] if keep else list(chain.writable)
            while self._report and budget > 0:
                view = self._report.pop()
                if len(view) > budget:
                    self._report.append(view[budget:])
                    view = view[:budget]
                self._release(view)
                self.released_bytes += len(view)
                # Each range takes a call, however small it is.
                budget -= max(len(view), RELEASE_BYTES // PAGES_AT_ONCE)
            if self._report:
                self._held[index] = chain
            else:
                chain.push(0)
                chains -= 1
        else:
            self.host.again(index)
        self._publish(index)
