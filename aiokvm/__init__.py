"""aiokvm: virtual machines for Linux KVM inside an asynchronous Python program.

from aiokvm import VM, boot

async with await VM.create(boot=boot.Linux("vmlinuz", cmdline="console=ttyS0")) as vm:
    await vm.start()
    async for line in vm.serial.lines():
        print(line)
"""

from aiokvm import boot, kvm
from aiokvm.aio.watchdog import HoldUp, Watchdog
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
from aiokvm.machine.limits import Limit, check_limits, host_limits
from aiokvm.machine.stats import DeviceStats, VcpuStats, VmStats
from aiokvm.machine.trace import Trace
from aiokvm.machine.vcpu import VcpuState, VirtualCpu
from aiokvm.machine.vm import VM, VmState
from aiokvm.memory import GuestMemory, RamRegion

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
