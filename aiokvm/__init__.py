"""aiokvm: virtual machines for Linux KVM inside an asynchronous Python program.

from aiokvm import VM, boot

async with await VM.create(boot=boot.Linux("vmlinuz", cmdline="console=ttyS0")) as vm:
    await vm.start()
    async for line in vm.serial.lines():
        print(line)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm import boot, kvm
from aiokvm.errors import (
    AiokvmError,
    BootError,
    ConfigError,
    DeviceError,
    GuestMemoryError,
    ImageError,
    KvmError,
    LabError,
    SerialClosedError,
    StateError,
    TraceError,
    VirtqueueError,
)
from aiokvm.machine.attachments import Attachment
from aiokvm.machine.console import SerialConsole
from aiokvm.machine.device import Device, ErrorPolicy, Placement, RegionMode, Timer
from aiokvm.machine.events import (
    DeviceFailed,
    Event,
    Exit,
    Exited,
    ExitReason,
    Paused,
    Resumed,
    Started,
    WasReset,
)
from aiokvm.machine.irq import Irq
from aiokvm.machine.vcpu import VcpuState, VirtualCpu
from aiokvm.machine.vm import VM, VmState
from aiokvm.memory import GuestMemory, RamRegion

if TYPE_CHECKING:
    from aiokvm.aio.watchdog import HoldUp, Watchdog
    from aiokvm.machine.limits import Limit, check_limits, host_limits
    from aiokvm.machine.stats import DeviceStats, VcpuStats, VmStats
    from aiokvm.machine.trace import Trace

__all__ = [
    "VM",
    "AiokvmError",
    "Attachment",
    "BootError",
    "ConfigError",
    "Device",
    "DeviceError",
    "DeviceFailed",
    "DeviceStats",
    "ErrorPolicy",
    "Event",
    "Exit",
    "ExitReason",
    "Exited",
    "GuestMemory",
    "GuestMemoryError",
    "HoldUp",
    "ImageError",
    "Irq",
    "KvmError",
    "LabError",
    "Limit",
    "Paused",
    "Placement",
    "RamRegion",
    "RegionMode",
    "Resumed",
    "SerialClosedError",
    "SerialConsole",
    "Started",
    "StateError",
    "Timer",
    "Trace",
    "TraceError",
    "VcpuState",
    "VcpuStats",
    "VirtqueueError",
    "VirtualCpu",
    "VmState",
    "VmStats",
    "WasReset",
    "Watchdog",
    "boot",
    "check_limits",
    "host_limits",
    "kvm",
]

# What a running machine needs nothing of is loaded when it is asked for.
_LATER = {
    "HoldUp": "aiokvm.aio.watchdog",
    "Watchdog": "aiokvm.aio.watchdog",
    "Limit": "aiokvm.machine.limits",
    "check_limits": "aiokvm.machine.limits",
    "host_limits": "aiokvm.machine.limits",
    "DeviceStats": "aiokvm.machine.stats",
    "VcpuStats": "aiokvm.machine.stats",
    "VmStats": "aiokvm.machine.stats",
    "Trace": "aiokvm.machine.trace",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)
