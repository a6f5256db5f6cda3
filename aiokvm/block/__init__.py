"""What a disk is connected to: every backend reads, writes and flushes a range of bytes."""

from __future__ import annotations

from aiokvm.block.backend import BlockBackend
from aiokvm.block.disk_option import DiskOption, parse_disk
from aiokvm.block.image import Image
from aiokvm.block.limit import Limit
from aiokvm.block.nbd import Nbd
from aiokvm.block.overlay import Overlay
from aiokvm.block.raw import Raw

__all__ = ["BlockBackend", "DiskOption", "Image", "Limit", "Nbd", "Overlay", "Raw", "parse_disk"]
