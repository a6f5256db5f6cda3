"""What a machine boots: each protocol turns files into a plan of guest memory and initial registers."""

from __future__ import annotations

from aiokvm.boot.cpu import CpuState, DescriptorTable, SegmentRegister
from aiokvm.boot.flat import Flat
from aiokvm.boot.linux import Linux
from aiokvm.boot.multiboot import Multiboot
from aiokvm.boot.plan import BootPlan, BootProtocol, GuestInfo, PlanBuilder, Segment, check_plan

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
