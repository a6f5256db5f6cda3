"""The bare KVM API: every request of a monitor, a snapshotter or a debugger, typed, with no policy.

``System().create_vm().create_vcpu(0)`` is the way in. Methods are named after the requests, structures are
spelled as in linux/kvm.h; flags and numbers stand in ``aiokvm.kvm.constants``. Failures raise KvmError.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from aiokvm.kvm.constants import KvmExit
from aiokvm.kvm.structs import CpuidEntry, DTable, MpState, MsrEntry, Regs, Segment, Sregs
from aiokvm.kvm.system import System
from aiokvm.kvm.tables import MsrError
from aiokvm.kvm.vcpu import Vcpu
from aiokvm.kvm.vm import Device, Vm

if TYPE_CHECKING:
    from aiokvm.kvm.caps import Cap
    from aiokvm.kvm.probe import ring0_speed
    from aiokvm.kvm.rings import DirtyRing
    from aiokvm.kvm.routing import (
        IrqRoutingEntry,
        IrqRoutingHvSint,
        IrqRoutingIrqchip,
        IrqRoutingMsi,
        IrqRoutingXenEvtchn,
    )
    from aiokvm.kvm.run_state import (
        DebugExit,
        ExceptionExit,
        FailEntry,
        HypercallExit,
        InternalError,
        IoExit,
        MemoryFault,
        MmioExit,
        MsrExit,
        RunState,
        SystemEvent,
        TprAccess,
    )
    from aiokvm.kvm.state_structs import (
        DebugRegs,
        EventException,
        EventInterrupt,
        EventNmi,
        EventSmi,
        EventTripleFault,
        Fpu,
        Sregs2,
        TranslateResult,
        VcpuEvents,
        X86Mce,
        Xcr,
    )
    from aiokvm.kvm.stats import StatDescriptor, Stats, StatType, StatUnit
    from aiokvm.kvm.vm_structs import (
        ClockData,
        CoalescedMmio,
        DirtyGfn,
        DirtyLog,
        IoapicState,
        Msi,
        MsrFilterRange,
        PicState,
        PitChannelState,
        PitState2,
    )

# What a machine that runs well never needs: each of these modules would slow its start.
_LATER = {
    "caps": ("Cap",),
    "state_structs": (
        "DebugRegs",
        "EventException",
        "EventInterrupt",
        "EventNmi",
        "EventSmi",
        "EventTripleFault",
        "Fpu",
        "Sregs2",
        "TranslateResult",
        "VcpuEvents",
        "X86Mce",
        "Xcr",
    ),
    "vm_structs": (
        "ClockData",
        "CoalescedMmio",
        "DirtyGfn",
        "DirtyLog",
        "IoapicState",
        "Msi",
        "MsrFilterRange",
        "PicState",
        "PitChannelState",
        "PitState2",
    ),
    "probe": ("ring0_speed",),
    "rings": ("DirtyRing",),
    "routing": (
        "IrqRoutingEntry",
        "IrqRoutingHvSint",
        "IrqRoutingIrqchip",
        "IrqRoutingMsi",
        "IrqRoutingXenEvtchn",
    ),
    "run_state": (
        "DebugExit",
        "ExceptionExit",
        "FailEntry",
        "HypercallExit",
        "InternalError",
        "IoExit",
        "MemoryFault",
        "MmioExit",
        "MsrExit",
        "RunState",
        "SystemEvent",
        "TprAccess",
    ),
    "stats": (
        "StatDescriptor",
        "StatType",
        "StatUnit",
        "Stats",
    ),
}

__all__ = [
    "Cap",
    "ClockData",
    "CoalescedMmio",
    "CpuidEntry",
    "DTable",
    "DebugExit",
    "DebugRegs",
    "Device",
    "DirtyGfn",
    "DirtyLog",
    "DirtyRing",
    "EventException",
    "EventInterrupt",
    "EventNmi",
    "EventSmi",
    "EventTripleFault",
    "ExceptionExit",
    "FailEntry",
    "Fpu",
    "HypercallExit",
    "InternalError",
    "IoExit",
    "IoapicState",
    "IrqRoutingEntry",
    "IrqRoutingHvSint",
    "IrqRoutingIrqchip",
    "IrqRoutingMsi",
    "IrqRoutingXenEvtchn",
    "KvmExit",
    "MemoryFault",
    "MmioExit",
    "MpState",
    "Msi",
    "MsrEntry",
    "MsrError",
    "MsrExit",
    "MsrFilterRange",
    "PicState",
    "PitChannelState",
    "PitState2",
    "Regs",
    "RunState",
    "Segment",
    "Sregs",
    "Sregs2",
    "StatDescriptor",
    "StatType",
    "StatUnit",
    "Stats",
    "System",
    "SystemEvent",
    "TprAccess",
    "TranslateResult",
    "Vcpu",
    "VcpuEvents",
    "Vm",
    "X86Mce",
    "Xcr",
    "ring0_speed",
]


def __getattr__(name: str) -> object:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
