"""Where a network adapter leads: every backend takes and gives Ethernet frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.net.backend import NetBackend

if TYPE_CHECKING:
    from aiokvm.net.asgi import Asgi
    from aiokvm.net.datagram import Datagram
    from aiokvm.net.filter import Rule, allow, deny, essentials
    from aiokvm.net.forwards import Forward
    from aiokvm.net.hook import Flow, Hook
    from aiokvm.net.nic import Nic
    from aiokvm.net.pcap import Pcap
    from aiokvm.net.plane import NetStats
    from aiokvm.net.port import Batch, Frame, Port
    from aiokvm.net.service import Connection
    from aiokvm.net.stream import Stream
    from aiokvm.net.switch import Switch, SwitchAddress, SwitchPort, SwitchStats
    from aiokvm.net.tap import Tap
    from aiokvm.net.user import User
    from aiokvm.ratelimit import Limit

__all__ = [
    "Asgi",
    "Batch",
    "Connection",
    "Datagram",
    "Flow",
    "Forward",
    "Frame",
    "Hook",
    "Limit",
    "NetBackend",
    "NetStats",
    "Nic",
    "Pcap",
    "Port",
    "Rule",
    "Stream",
    "Switch",
    "SwitchAddress",
    "SwitchPort",
    "SwitchStats",
    "Tap",
    "User",
    "allow",
    "deny",
    "essentials",
]

# What most machines need nothing of is loaded when it is asked for.
_LATER = {
    "Asgi": "aiokvm.net.asgi",
    "Batch": "aiokvm.net.port",
    "Connection": "aiokvm.net.service",
    "Datagram": "aiokvm.net.datagram",
    "Flow": "aiokvm.net.hook",
    "Forward": "aiokvm.net.forwards",
    "Frame": "aiokvm.net.port",
    "Hook": "aiokvm.net.hook",
    "Limit": "aiokvm.ratelimit",
    "NetStats": "aiokvm.net.plane",
    "Nic": "aiokvm.net.nic",
    "Pcap": "aiokvm.net.pcap",
    "Port": "aiokvm.net.port",
    "Rule": "aiokvm.net.filter",
    "Stream": "aiokvm.net.stream",
    "Switch": "aiokvm.net.switch",
    "SwitchAddress": "aiokvm.net.switch",
    "SwitchPort": "aiokvm.net.switch",
    "SwitchStats": "aiokvm.net.switch",
    "Tap": "aiokvm.net.tap",
    "User": "aiokvm.net.user",
    "allow": "aiokvm.net.filter",
    "deny": "aiokvm.net.filter",
    "essentials": "aiokvm.net.filter",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
