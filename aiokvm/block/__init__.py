"""What a disk is connected to: every backend reads, writes and flushes a range of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.block.backend import BlockBackend
from aiokvm.block.raw import Raw

if TYPE_CHECKING:
    from aiokvm.block.disk_option import DiskOption, parse_disk
    from aiokvm.block.image import Image
    from aiokvm.block.nbd import Nbd
    from aiokvm.block.overlay import Overlay
    from aiokvm.ratelimit import Limit

__all__ = ["BlockBackend", "DiskOption", "Image", "Limit", "Nbd", "Overlay", "Raw", "parse_disk"]

# What most machines need nothing of is loaded when it is asked for.
_LATER = {
    "DiskOption": "aiokvm.block.disk_option",
    "Image": "aiokvm.block.image",
    "Limit": "aiokvm.ratelimit",
    "Nbd": "aiokvm.block.nbd",
    "Overlay": "aiokvm.block.overlay",
    "parse_disk": "aiokvm.block.disk_option",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
