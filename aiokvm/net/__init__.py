"""Where a network adapter leads: every backend takes and gives Ethernet frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.net.backend import NetBackend

if TYPE_CHECKING:
    from aiokvm.net.asgi import Asgi
    from aiokvm.net.forwards import Forward
    from aiokvm.net.plane import NetStats
    from aiokvm.net.service import Connection
    from aiokvm.net.user import User
    from aiokvm.ratelimit import Limit

__all__ = ["Asgi", "Connection", "Forward", "Limit", "NetBackend", "NetStats", "User"]

# What most machines need nothing of is loaded when it is asked for.
_LATER = {
    "Asgi": "aiokvm.net.asgi",
    "Connection": "aiokvm.net.service",
    "Forward": "aiokvm.net.forwards",
    "Limit": "aiokvm.ratelimit",
    "NetStats": "aiokvm.net.plane",
    "User": "aiokvm.net.user",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
