"""What a disk is connected to: every backend reads, writes and flushes a range of bytes."""

from __future__ import annotations

from aiokvm.block.backend import BlockBackend
from aiokvm.block.disk_option import DiskOption, parse_disk
from aiokvm.block.image import Image
from aiokvm.block.nbd import Nbd
from aiokvm.block.overlay import Overlay

__all__ = ["BlockBackend", "DiskOption", "Image", "Nbd", "Overlay", "parse_disk"]
