"""Where a network adapter leads: every backend takes and gives Ethernet frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.net.backend import NetBackend

if TYPE_CHECKING:
    from aiokvm.net.datagram import Datagram
    from aiokvm.net.plane import NetStats
    from aiokvm.net.stream import Stream
    from aiokvm.net.tap import Tap
    from aiokvm.ratelimit import Limit

__all__ = ["Datagram", "Limit", "NetBackend", "NetStats", "Stream", "Tap"]

# What most machines need nothing of is loaded when it is asked for.
_LATER = {
    "Datagram": "aiokvm.net.datagram",
    "Limit": "aiokvm.ratelimit",
    "NetStats": "aiokvm.net.plane",
    "Stream": "aiokvm.net.stream",
    "Tap": "aiokvm.net.tap",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
