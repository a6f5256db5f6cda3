"""Requests of a block device, for backends that run on the loop: virtio 1.2, section 5.2.6.

Pure: chains come in, requests that are right come out, and the others have been answered.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm.errors import VirtqueueError
from aiokvm.virtio.blk import (
    MAX_CLEAR_SECTORS,
    MAX_SEGMENTS,
    SECTOR_BYTES,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiokvm.virtio.queue import Chain

_HEADER = struct.Struct("<IIQ")
_SEGMENT = struct.Struct("<QII")


@dataclass(frozen=True, slots=True)
class BlkRange:
    """``length`` bytes at ``offset`` of the disk, to discard or to zero; ``unmap``: their storage is free."""

    offset: int
    length: int
    unmap: bool


class BlkRequest:
    """One request: ``type`` is VIRTIO_BLK_T_*.

    IN and OUT move ``length`` bytes at ``offset``, DISCARD and WRITE_ZEROES have ``ranges``.

    The data of an OUT comes by `read`, that of an IN goes by `write`, from the beginning on. `complete` ends
    it. All of it does nothing once the device has been reset.
    """

    __slots__ = ("_chain", "length", "offset", "queue", "ranges", "type")

    def __init__(
        self,
        chain: Chain,
        queue: int,
        type_: int,
        offset: int = 0,
        length: int = 0,
        ranges: tuple[BlkRange, ...] = (),
    ) -> None:
        self._chain: Chain | None = chain
        self.queue = queue
        self.type = type_
        self.offset = offset
        self.length = length
        self.ranges = ranges

    @property
    def void(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._chain is None or self._chain.void

    @property
    def cost_bytes(self) -> int:
        """What it costs of a rate limit."""
        if self.type == VIRTIO_BLK_T_WRITE_ZEROES:
            return sum(part.length for part in self.ranges)
        return self.length

    def pieces(self, most: int) -> Iterator[tuple[int, int]]:
        """Offset and length of the pieces of at most ``most`` bytes that IN and OUT are made of."""
        for start in range(0, self.length, most):
            yield self.offset + start, min(most, self.length - start)

    def read(self, n: int) -> memoryview:
        """A copy of the next ``n`` bytes to be written to the disk."""
        return memoryview(self._chain.take(n) if self._chain else b"")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes that were read from the disk."""
        if self._chain:
            self._chain.write(data)

    def complete(self, status: int) -> None:
        """Push it, with VIRTIO_BLK_S_*."""
        chain = self._chain
        self.release()
        if chain and not chain.void:
            _complete(chain, status)

    def release(self) -> None:
        """It needs guest memory no more, and keeps none from being freed."""
        self._chain = None


def _complete(chain: Chain, status: int) -> None:
    # The last byte, wherever the cursor stands; what is behind bytes that were written counts as written.
    chain.put(chain.writable_bytes - 1, bytes((status,)))
    chain.push(chain.written + 1 if status == VIRTIO_BLK_S_OK else 1)


@dataclass(slots=True)
class BlkParser:
    """What a disk's requests are checked against. ``features`` are the negotiated ones."""

    capacity_sectors: int
    block_size: int = 512
    readonly: bool = False
    serial: str = ""
    features: int = 0

    def take(self, chain: Chain, queue: int) -> BlkRequest | None:
        """The request in ``chain``; None if it was answered here. VirtqueueError if it is none."""
        if chain.readable_bytes < _HEADER.size:
            size = chain.readable_bytes
            chain.drop()
            raise VirtqueueError(f"a request of {size} bytes has no header of {_HEADER.size}")
        if not chain.writable_bytes:
            chain.drop()
            raise VirtqueueError("a request has no byte for its status that the device may write")
        type_, _, sector = _HEADER.unpack(chain.read(_HEADER.size))
        if type_ in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT):
            return self._take_move(chain, queue, type_, sector)
        if type_ == VIRTIO_BLK_T_FLUSH:
            return BlkRequest(chain, queue, type_)
        if type_ == VIRTIO_BLK_T_GET_ID:
            serial = self.serial.encode().ljust(VIRTIO_BLK_ID_BYTES, b"\0")
            chain.write(serial[: chain.writable_bytes - 1])
            _complete(chain, VIRTIO_BLK_S_OK)
            return None
        if (type_ == VIRTIO_BLK_T_DISCARD and self.features & VIRTIO_BLK_F_DISCARD) or (
            type_ == VIRTIO_BLK_T_WRITE_ZEROES and self.features & VIRTIO_BLK_F_WRITE_ZEROES
        ):
            return self._take_clear(chain, queue, type_)
        _complete(chain, VIRTIO_BLK_S_UNSUPP)
        return None

    def _is_inside(self, sector: int, sectors: int) -> bool:
        return sector + sectors <= self.capacity_sectors

    def _take_move(self, chain: Chain, queue: int, type_: int, sector: int) -> BlkRequest | None:
        is_write = type_ == VIRTIO_BLK_T_OUT
        to_disk, to_guest = chain.readable_bytes - _HEADER.size, chain.writable_bytes - 1
        length, wrong = (to_disk, to_guest) if is_write else (to_guest, to_disk)
        offset = sector * SECTOR_BYTES
        if (
            wrong
            or not length
            or length % self.block_size
            or offset % self.block_size
            or not self._is_inside(sector, length // SECTOR_BYTES)
            or (is_write and self.readonly)
        ):
            _complete(chain, VIRTIO_BLK_S_IOERR)
            return None
        return BlkRequest(chain, queue, type_, offset, length)

    def _take_clear(self, chain: Chain, queue: int, type_: int) -> BlkRequest | None:
        length = chain.readable_bytes - _HEADER.size
        status = VIRTIO_BLK_S_OK
        ranges = []
        if not length or length % _SEGMENT.size or length > MAX_SEGMENTS * _SEGMENT.size or self.readonly:
            status = VIRTIO_BLK_S_IOERR
        else:
            known = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP if type_ == VIRTIO_BLK_T_WRITE_ZEROES else 0
            for sector, sectors, flags in _SEGMENT.iter_unpack(chain.read(length)):
                if flags & ~known:
                    status = VIRTIO_BLK_S_UNSUPP
                    break
                offset, size = sector * SECTOR_BYTES, sectors * SECTOR_BYTES
                if (
                    not self._is_inside(sector, sectors)
                    or sectors > MAX_CLEAR_SECTORS
                    or (offset | size) % self.block_size
                ):
                    status = VIRTIO_BLK_S_IOERR
                    break
                if size:
                    ranges.append(BlkRange(offset, size, bool(flags)))
        if status != VIRTIO_BLK_S_OK or not ranges:
            _complete(chain, status)
            return None
        return BlkRequest(chain, queue, type_, ranges=tuple(ranges))
