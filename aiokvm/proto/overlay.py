"""The file of an overlay: which clusters of a disk differ from its base, and what is in them.

All numbers are little-endian. A file is a header in the first 4096 bytes, two bitmaps, of which the header
says which one counts, and the clusters, each in its own place, so that the file is sparse:

    header   "AIOKVMOV", u32 version, u32 cluster size, u64 disk size, u32 bitmap (0 or 1), u32 CRC-32 of the
             bytes before it; then zeroes
    bitmap   one bit a cluster, the lowest of a byte first; whole pages of 4096 bytes, zeroes behind the last
    cluster  at the end of the second bitmap, rounded up to the cluster size, plus index * cluster size

A set bit means that the cluster is here, wholly; where the file has a hole, it is zeroes. The data of a
cluster is on the disk before its bit is. The header fits into a sector, written wholly or not at all.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"AIOKVMOV"
VERSION = 1
PAGE_BYTES = 4096
CLUSTER_BYTES = (4096, 2 << 20)
"""Smallest and largest cluster."""
CLUSTERS_MAX = 1 << 28
"""Of one overlay: their bitmap takes 32 MiB of memory. 16 TiB with clusters of 64 KiB."""

_HEADER = struct.Struct("<8sIIQII")
_CLUSTERS_A_PAGE = 8 * PAGE_BYTES
_STRETCH_BYTES = 1 << 16
_STRETCHES = {byte: bytes((byte,)) * _STRETCH_BYTES for byte in (0, 0xFF)}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in the file of an overlay; ImageError if the numbers make no sense."""

    size_bytes: int
    cluster_bytes: int
    bitmap: int = 0

    def __post_init__(self) -> None:
        size = self.cluster_bytes
        if not CLUSTER_BYTES[0] <= size <= CLUSTER_BYTES[1] or size & (size - 1):
            raise ImageError(f"clusters of {size} bytes: a power of two from 4 KiB to 2 MiB is needed")
        if not 0 < self.size_bytes <= CLUSTERS_MAX * size:
            raise ImageError(
                f"a disk of {self.size_bytes} bytes: with clusters of {size} bytes an overlay can have "
                f"{CLUSTERS_MAX * size}"
            )
        if self.bitmap not in (0, 1):
            raise ImageError(f"bitmap {self.bitmap} of 2")

    @property
    def clusters(self) -> int:
        """How many there are; the last one may be partial."""
        return -(-self.size_bytes // self.cluster_bytes)

    @property
    def bitmap_bytes(self) -> int:
        """The length of one bitmap: whole pages."""
        return -(-self.clusters // _CLUSTERS_A_PAGE) * PAGE_BYTES

    def bitmap_offset(self, bitmap: int) -> int:
        """Where a bitmap begins."""
        return PAGE_BYTES + bitmap * self.bitmap_bytes

    @property
    def data_offset(self) -> int:
        """Where the first cluster is."""
        return -(-self.bitmap_offset(2) // self.cluster_bytes) * self.cluster_bytes

    @property
    def file_bytes(self) -> int:
        """The length of the file."""
        return self.data_offset + self.size_bytes

    def pack(self) -> bytes:
        """The header: 4096 bytes."""
        packed = _HEADER.pack(MAGIC, VERSION, self.cluster_bytes, self.size_bytes, self.bitmap, 0)[:-4]
        return (packed + zlib.crc32(packed).to_bytes(4, "little")).ljust(PAGE_BYTES, b"\0")


def unpack(header: bytes) -> Layout:
    """The layout that a file's first 4096 bytes describe. ImageError if they do not."""
    if len(header) != PAGE_BYTES or not header.startswith(MAGIC):
        raise ImageError("this is no overlay: it does not begin as one does")
    _, version, cluster_bytes, size_bytes, bitmap, crc = _HEADER.unpack_from(header)
    if version != VERSION:
        raise ImageError(f"the overlay has version {version}, only {VERSION} can be used")
    if crc != zlib.crc32(header[: _HEADER.size - 4]) or any(header[_HEADER.size :]):
        raise ImageError("the overlay's header is damaged: its checksum is wrong")
    return Layout(size_bytes, cluster_bytes, bitmap)


class Bitmap:
    """Which clusters an overlay has, and which pages of that are to be written."""

    def __init__(self, layout: Layout, bits: bytes | bytearray | None = None) -> None:
        """Raises ImageError if there are bits behind the last cluster."""
        self._clusters = layout.clusters
        self._bits = bytearray(layout.bitmap_bytes if bits is None else bits)
        if len(self._bits) != layout.bitmap_bytes:
            raise ImageError(f"a bitmap of {len(self._bits)} bytes instead of {layout.bitmap_bytes}")
        whole, partial = divmod(self._clusters, 8)
        if (partial and self._bits[whole] >> partial) or any(self._bits[whole + bool(partial) :]):
            raise ImageError("the overlay is damaged: its bitmap names clusters behind the disk's end")
        self.dirty: set[int] = set()
        """Indices of the pages that have changed."""

    def __getitem__(self, cluster: int) -> bool:
        return bool(self._bits[cluster >> 3] >> (cluster & 7) & 1)

    def set(self, start: int, end: int, value: bool = True) -> None:
        """Change all clusters from start to end, exclusively."""
        if start >= end:
            return
        first, last = start >> 3, (end - 1) >> 3
        low = 0xFF << (start & 7) & 0xFF
        high = 0xFF >> (7 - ((end - 1) & 7))
        if first == last:
            low &= high
        self._merge(first, low, value)
        if first < last:
            self._merge(last, high, value)
            self._bits[first + 1 : last] = (b"\xff" if value else b"\0") * (last - first - 1)
        self.dirty.update(range(first // PAGE_BYTES, last // PAGE_BYTES + 1))

    def _merge(self, at: int, mask: int, value: bool) -> None:
        self._bits[at] = self._bits[at] | mask if value else self._bits[at] & ~mask

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """The clusters from start to end in runs: (first, end, whether the overlay has them)."""
        at = start
        while at < end:
            here = self[at]
            run = self._end_of_run(at, end, here)
            yield at, run, here
            at = run

    def next(self, start: int) -> int | None:
        """The first cluster from start on that the overlay has."""
        at = self._end_of_run(start, self._clusters, False)
        return at if at < self._clusters else None

    def take_dirty(self, most: int) -> list[range]:
        """The indices of the pages that have changed, in runs of at most so many; they count as unchanged."""
        runs: list[range] = []
        for index in sorted(self.dirty):
            if runs and index == runs[-1].stop and len(runs[-1]) < most:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        self.dirty.clear()
        return runs

    def pages(self, indices: range) -> bytes:
        """The bytes of pages."""
        return bytes(self._bits[indices.start * PAGE_BYTES : indices.stop * PAGE_BYTES])

    def _end_of_run(self, at: int, end: int, here: bool) -> int:
        """The first cluster from ``at`` on that the overlay has (or has not) unlike ``here``, or ``end``."""
        same = 0xFF if here else 0
        byte = at >> 3
        other = (self._bits[byte] ^ same) >> (at & 7) << (at & 7) if at < end else 0
        if not other:
            byte = self._end_of_bytes(byte + 1, -(-end // 8), same)
            other = self._bits[byte] ^ same if 8 * byte < end else 0
        return min(8 * byte + (other & -other).bit_length() - 1, end) if other else end

    def _end_of_bytes(self, at: int, end: int, same: int) -> int:
        """The first byte from ``at`` on that is another, or ``end``; comparing and stripping is done in C."""
        stretch = _STRETCHES[same]
        for begin in range(at, end, _STRETCH_BYTES):
            piece = self._bits[begin : min(begin + _STRETCH_BYTES, end)]
            if piece != stretch[: len(piece)]:
                return begin + len(piece) - len(piece.lstrip(stretch[:1]))
        return end
