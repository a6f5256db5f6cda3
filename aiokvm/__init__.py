"""aiokvm: virtual machines for Linux KVM inside an asynchronous Python program.

from aiokvm import VM, boot

async with await VM.create(boot=boot.Linux("vmlinuz", cmdline="console=ttyS0")) as vm:
    await vm.start()
    async for line in vm.serial.lines():
        print(line)
"""

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
)
from aiokvm.machine.console import SerialConsole
from aiokvm.machine.events import Event, Exit, Exited, ExitReason, Paused, Resumed, Started, WasReset
from aiokvm.machine.vcpu import VcpuState, VirtualCpu
from aiokvm.machine.vm import VM, VmState
from aiokvm.memory import GuestMemory, RamRegion

__all__ = [
    "VM",
    "AiokvmError",
    "BootError",
    "ConfigError",
    "DeviceError",
    "Event",
    "Exit",
    "ExitReason",
    "Exited",
    "GuestMemory",
    "GuestMemoryError",
    "ImageError",
    "KvmError",
    "LabError",
    "Paused",
    "RamRegion",
    "Resumed",
    "SerialClosedError",
    "SerialConsole",
    "Started",
    "StateError",
    "VcpuState",
    "VirtualCpu",
    "VmState",
    "WasReset",
    "boot",
    "kvm",
]
