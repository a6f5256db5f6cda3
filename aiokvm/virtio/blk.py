"""The block device: virtio 1.2, section 5.2. Its features and configuration space; requests are others'.

Who moves the data is given to it: a thread in C, or `aiokvm.virtio.blk_request` with a backend on the loop.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from aiokvm.errors import ConfigError
from aiokvm.virtio.constants import VIRTIO_ID_BLOCK
from aiokvm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from aiokvm.virtio.device import VirtioHost
    from aiokvm.virtio.queue import Virtqueue

SECTOR_BYTES = 512
"""The unit of ``sector`` and ``capacity``, whatever the block size."""

# Feature bits (5.2.3), as masks.
VIRTIO_BLK_F_SIZE_MAX = 1 << 1
VIRTIO_BLK_F_SEG_MAX = 1 << 2
VIRTIO_BLK_F_RO = 1 << 5
VIRTIO_BLK_F_BLK_SIZE = 1 << 6
VIRTIO_BLK_F_FLUSH = 1 << 9
VIRTIO_BLK_F_TOPOLOGY = 1 << 10
VIRTIO_BLK_F_CONFIG_WCE = 1 << 11
VIRTIO_BLK_F_MQ = 1 << 12
VIRTIO_BLK_F_DISCARD = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES = 1 << 14

# Request types and what comes of them (5.2.6).
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1
VIRTIO_BLK_ID_BYTES = 20

# struct virtio_blk_config (5.2.4): offsets in bytes.
_CONFIG = struct.Struct("<QII HBB I BBHI BBH IIIIIB3x")
_CAPACITY = 0
_WRITEBACK = 32

MAX_QUEUES = 16
SIZE_MAX = 4 << 20
"""Bytes of one buffer: what is moved at a time."""
MAX_SEGMENTS = 16
"""Ranges of one DISCARD or WRITE_ZEROES."""
MAX_CLEAR_SECTORS = (1 << 30) // SECTOR_BYTES
"""Of one such range: a hole of more than a gigabyte at a time makes others wait."""


@dataclass(frozen=True, slots=True)
class BlkLayout:
    """What the driver is told of a disk. Sizes are in bytes.

    ``block_size`` is what requests should be multiples of, ``physical_block_size`` what they are best
    multiples of; ``discard_granularity`` is 0 if nothing is discarded. Raises ConfigError for what cannot be.
    """

    size_bytes: int
    block_size: int = 512
    physical_block_size: int = 4096
    readonly: bool = False
    discard_granularity: int = 0
    serial: str = ""
    queues: int = 1
    queue_size: int = 256
    writeback: bool = True

    def __post_init__(self) -> None:
        for name, size in (("block", self.block_size), ("physical block", self.physical_block_size)):
            if size & (size - 1) or not 512 <= size <= 65536:
                raise ConfigError(f"a {name} size of {size} bytes: it is a power of two, 512 to 65536")
        if self.size_bytes < 0 or self.size_bytes % self.block_size:
            raise ConfigError(
                f"a disk of {self.size_bytes} bytes is not a whole number of blocks of {self.block_size}"
            )
        if not 1 <= self.queues <= MAX_QUEUES:
            raise ConfigError(f"{self.queues} queues: a disk has 1 to {MAX_QUEUES}")
        if self.queue_size & (self.queue_size - 1) or not 4 <= self.queue_size <= 1024:
            raise ConfigError(f"a queue size of {self.queue_size}: it is a power of two, 4 to 1024")
        if not self.serial.isascii() or len(self.serial) > VIRTIO_BLK_ID_BYTES:
            raise ConfigError(f"serial {self.serial!r} is not up to {VIRTIO_BLK_ID_BYTES} ASCII characters")


class BlkData(Protocol):
    """Who serves a disk's queues; all of it belongs to the machine's loop."""

    def activate(self, host: VirtioHost, features: int, queues: Sequence[Virtqueue]) -> None:
        """Serve them, until `reset`."""

    def notified(self, queue: int) -> None:
        """As `VirtioDevice.notified`."""

    def reset(self) -> Awaitable[None] | None:
        """As `VirtioDevice.reset`."""

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        """As `VirtioDevice.stop_queue`."""

    def set_writeback(self, writeback: bool) -> None:
        """Without write-back every write is durable before it completes."""

    def set_capacity(self, sectors: int) -> None:
        """Requests end there from now on."""

    def close(self) -> Awaitable[None] | None:
        """As `VirtioDevice.close`."""


class VirtioBlk(VirtioDevice):
    """A disk as its driver sees it; ``data`` moves what is on it."""

    device_id = VIRTIO_ID_BLOCK

    def __init__(self, layout: BlkLayout, data: BlkData) -> None:
        self.layout = layout
        self.data = data
        self.queue_size_max = (layout.queue_size,) * layout.queues
        features = (
            VIRTIO_BLK_F_SIZE_MAX
            | VIRTIO_BLK_F_SEG_MAX
            | VIRTIO_BLK_F_BLK_SIZE
            | VIRTIO_BLK_F_FLUSH
            | VIRTIO_BLK_F_TOPOLOGY
            | VIRTIO_BLK_F_CONFIG_WCE
        )
        if layout.readonly:
            features |= VIRTIO_BLK_F_RO
        else:
            features |= VIRTIO_BLK_F_WRITE_ZEROES
            if layout.discard_granularity:
                features |= VIRTIO_BLK_F_DISCARD
        if layout.queues > 1:
            features |= VIRTIO_BLK_F_MQ
        self.device_features = features
        self.config = bytearray(self._initial_config())

    def _initial_config(self) -> bytes:
        layout = self.layout
        blocks = layout.physical_block_size // layout.block_size
        granularity = max(layout.discard_granularity, layout.block_size)
        # A request is its header, its status, and the segments between.
        return _CONFIG.pack(
            layout.size_bytes // SECTOR_BYTES,
            SIZE_MAX,
            layout.queue_size - 2,
            *(0, 0, 0),  # geometry: not offered
            layout.block_size,
            max(blocks.bit_length() - 1, 0),  # physical_block_exp
            0,  # alignment_offset
            max(blocks, 1),  # min_io_size
            0,  # opt_io_size: none
            layout.writeback,
            0,
            layout.queues,
            MAX_CLEAR_SECTORS if layout.discard_granularity else 0,
            MAX_SEGMENTS if layout.discard_granularity else 0,
            granularity // SECTOR_BYTES,
            MAX_CLEAR_SECTORS,
            MAX_SEGMENTS,
            bool(layout.discard_granularity),  # write_zeroes_may_unmap
        )

    def accept_features(self, features: int) -> bool:
        # "The device MUST initialize writeback to 0" (5.2.5.2).
        if features & VIRTIO_BLK_F_CONFIG_WCE and not features & VIRTIO_BLK_F_FLUSH:
            self.config[_WRITEBACK] = 0
        return True

    def write_config(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (_WRITEBACK, 1) and self.features & VIRTIO_BLK_F_CONFIG_WCE:
            self.config[_WRITEBACK] = bool(value)
            self._apply_writeback()

    def _apply_writeback(self) -> None:
        # A driver that knows of no cache cannot flush it (5.2.6.2); one that cannot choose has ours.
        knows = self.features & (VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_CONFIG_WCE)
        self.data.set_writeback(bool(self.config[_WRITEBACK] and knows))

    def activate(self, features: int, queues: Sequence[Virtqueue]) -> None:
        self._apply_writeback()
        self.data.activate(self.host, features, queues)

    def notified(self, queue: int) -> None:
        self.data.notified(queue)

    def reset(self) -> Awaitable[None] | None:
        self.config[_WRITEBACK] = self.layout.writeback
        return self.data.reset()

    def stop_queue(self, queue: int) -> Awaitable[None] | None:
        return self.data.stop_queue(queue)

    def close(self) -> Awaitable[None] | None:
        return self.data.close()

    def resize(self, size_bytes: int) -> None:
        """The disk has another size from now on, and the driver is told (5.2.5). Raises ConfigError."""
        if size_bytes < 0 or size_bytes % self.layout.block_size:
            raise ConfigError(
                f"a disk of {size_bytes} bytes is not a whole number of blocks of {self.layout.block_size}"
            )
        sectors = size_bytes // SECTOR_BYTES
        struct.pack_into("<Q", self.config, _CAPACITY, sectors)
        self.data.set_capacity(sectors)
        if self._host is not None:
            self.host.config_changed()
