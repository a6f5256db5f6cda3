"""What a disk is connected to: every backend reads, writes and flushes a range of bytes."""

from __future__ import annotations

from aiokvm.block.backend import BlockBackend

__all__ = ["BlockBackend"]
