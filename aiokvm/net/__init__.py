"""Where a network adapter leads: every backend takes and gives Ethernet frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.net.backend import NetBackend

if TYPE_CHECKING:
    from aiokvm.net.nic import Nic
    from aiokvm.net.plane import NetStats
    from aiokvm.ratelimit import Limit

__all__ = ["Limit", "NetBackend", "NetStats", "Nic"]

# What most machines need nothing of is loaded when it is asked for.
_LATER = {
    "Limit": "aiokvm.ratelimit",
    "NetStats": "aiokvm.net.plane",
    "Nic": "aiokvm.net.nic",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
