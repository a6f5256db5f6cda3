"""aiokvm: virtual machines for Linux KVM inside an asynchronous Python program.

from aiokvm import VM, boot

async with await VM.create(boot=boot.Linux("vmlinuz", cmdline="console=ttyS0")) as vm:
    await vm.start()
    async for line in vm.serial.lines():
        print(line)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from aiokvm import boot, kvm
except ImportError as error:
    if error.name != "aiokvm._core":
        raise
    hint = "aiokvm's sources, which are not compiled: run the program from another folder, or by python -P"
    raise ImportError(f"{__path__[0]} has {hint}", name=error.name) from None
from aiokvm.errors import (
    AiokvmError,
    BootError,
    ConfigError,
    DeviceError,
    GuestMemoryError,
    ImageError,
    KvmError,
    LabError,
    NbdError,
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
    DeviceNeedsReset,
    DiskFailed,
    Event,
    Exit,
    Exited,
    ExitReason,
    LinkChanged,
    NicLost,
    Paused,
    Resumed,
    Started,
    WasReset,
)
from aiokvm.machine.irq import Irq
from aiokvm.machine.life import VmState
from aiokvm.machine.vcpu import VcpuState, VirtualCpu
from aiokvm.machine.vm import VM
from aiokvm.memory import GuestMemory, RamRegion

if TYPE_CHECKING:
    from aiokvm import block, net
    from aiokvm.aio.steps import HoldUp
    from aiokvm.aio.watchdog import Watchdog
    from aiokvm.machine.balloon import MemoryBalloon
    from aiokvm.machine.config import RngConfig
    from aiokvm.machine.disks import Disk, DiskErrorPolicy, DiskStats, VmDisk
    from aiokvm.machine.limits import Limit, check_limits, check_memory, host_limits
    from aiokvm.machine.nets import VmNic
    from aiokvm.machine.ports import Consoles, ConsoleStream
    from aiokvm.machine.stats import DeviceStats, VcpuStats, VmStats
    from aiokvm.machine.trace import Trace
    from aiokvm.machine.virtio_host import VirtioAttachment
    from aiokvm.virtio.device import VirtioDevice, VirtioQueue, VirtioRequest

__version__ = "0.1.0.dev0"

__all__ = [
    "VM",
    "AiokvmError",
    "Attachment",
    "BootError",
    "ConfigError",
    "ConsoleStream",
    "Consoles",
    "Device",
    "DeviceError",
    "DeviceFailed",
    "DeviceNeedsReset",
    "DeviceStats",
    "Disk",
    "DiskErrorPolicy",
    "DiskFailed",
    "DiskStats",
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
    "LinkChanged",
    "MemoryBalloon",
    "NbdError",
    "NicLost",
    "Paused",
    "Placement",
    "RamRegion",
    "RegionMode",
    "Resumed",
    "RngConfig",
    "SerialClosedError",
    "SerialConsole",
    "Started",
    "StateError",
    "Timer",
    "Trace",
    "TraceError",
    "VcpuState",
    "VcpuStats",
    "VirtioAttachment",
    "VirtioDevice",
    "VirtioQueue",
    "VirtioRequest",
    "VirtqueueError",
    "VirtualCpu",
    "VmDisk",
    "VmNic",
    "VmState",
    "VmStats",
    "WasReset",
    "Watchdog",
    "__version__",
    "block",
    "boot",
    "check_limits",
    "check_memory",
    "host_limits",
    "kvm",
    "net",
]

# What a running machine needs nothing of is loaded when it is asked for.
_LATER = {
    "HoldUp": "aiokvm.aio.steps",
    "Watchdog": "aiokvm.aio.watchdog",
    "Limit": "aiokvm.machine.limits",
    "check_limits": "aiokvm.machine.limits",
    "check_memory": "aiokvm.machine.limits",
    "host_limits": "aiokvm.machine.limits",
    "DeviceStats": "aiokvm.machine.stats",
    "VcpuStats": "aiokvm.machine.stats",
    "VmStats": "aiokvm.machine.stats",
    "MemoryBalloon": "aiokvm.machine.balloon",
    "RngConfig": "aiokvm.machine.config",
    "Disk": "aiokvm.machine.disks",
    "DiskErrorPolicy": "aiokvm.machine.disks",
    "DiskStats": "aiokvm.machine.disks",
    "VmDisk": "aiokvm.machine.disks",
    "ConsoleStream": "aiokvm.machine.ports",
    "Consoles": "aiokvm.machine.ports",
    "Trace": "aiokvm.machine.trace",
    "VmNic": "aiokvm.machine.nets",
    "VirtioAttachment": "aiokvm.machine.virtio_host",
    "VirtioDevice": "aiokvm.virtio.device",
    "VirtioQueue": "aiokvm.virtio.device",
    "VirtioRequest": "aiokvm.virtio.device",
}


_MODULES_LATER = ("block", "net")


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _MODULES_LATER:
        return import_module(f"{__name__}.{name}")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
