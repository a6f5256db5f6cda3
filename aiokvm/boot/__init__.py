"""What a machine boots: each protocol turns files into a plan of guest memory and initial registers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from aiokvm.boot.cpu import CpuState, DescriptorTable, SegmentRegister
from aiokvm.boot.linux import Linux
from aiokvm.boot.plan import BootPlan, BootProtocol, GuestInfo, PlanBuilder, Segment, check_plan

if TYPE_CHECKING:
    from aiokvm.boot.flat import Flat
    from aiokvm.boot.multiboot import Multiboot

__all__ = [
    "BootPlan",
    "BootProtocol",
    "CpuState",
    "DescriptorTable",
    "Flat",
    "GuestInfo",
    "Linux",
    "Multiboot",
    "PlanBuilder",
    "Segment",
    "SegmentRegister",
    "check_plan",
]

# What few machines boot is loaded when it is asked for.
_LATER = {"Flat": "flat", "Multiboot": "multiboot"}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
