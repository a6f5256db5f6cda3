"""Where a network adapter leads: every backend takes and gives Ethernet frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.net.backend import NetBackend

if TYPE_CHECKING:
    from aiokvm.net.nic import Nic
    from aiokvm.net.plane import NetStats
    from aiokvm.net.port import Batch, Frame, Port
    from aiokvm.net.switch import Switch, SwitchPort, SwitchStats
    from aiokvm.ratelimit import Limit

__all__ = [
    "Batch",
    "Frame",
    "Limit",
    "NetBackend",
    "NetStats",
    "Nic",
    "Port",
    "Switch",
    "SwitchPort",
    "SwitchStats",
]

# What most machines need nothing of is loaded when it is asked for.
_LATER = {
    "Batch": "aiokvm.net.port",
    "Frame": "aiokvm.net.port",
    "Limit": "aiokvm.ratelimit",
    "NetStats": "aiokvm.net.plane",
    "Nic": "aiokvm.net.nic",
    "Port": "aiokvm.net.port",
    "Switch": "aiokvm.net.switch",
    "SwitchPort": "aiokvm.net.switch",
    "SwitchStats": "aiokvm.net.switch",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
