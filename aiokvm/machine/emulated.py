"""Hosts whose KVM emulates ring 0: kernels run there, but so slowly that it looks as if nothing happened."""

from __future__ import annotations

import os
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from aiokvm.errors import KvmError
from aiokvm.text import get_logger

if TYPE_CHECKING:
    from aiokvm.boot import BootPlan

# Where one of these serves /dev/kvm there is hardware behind it, and nothing to be measured.
HARDWARE = ("/sys/module/kvm_amd", "/sys/module/kvm_intel")

# Taken by the first start of a kernel in the process, for good: those that start beside it measure nothing.
first_start = Lock()

# The smallest kernels of an operating system have more; what has less is through soon anywhere.
_KERNEL_BYTES = 1 << 20


def holds_kernel(plan: BootPlan) -> bool:
    """Tell whether so much is put into RAM that it may be a kernel, by whichever protocol."""
    return sum(memoryview(segment.data).nbytes for segment in plan.segments) >= _KERNEL_BYTES


def warn_if_emulated() -> None:
    """Warn once a process if a kernel takes minutes here. To measure it blocks, for half a second at most."""
    if not first_start.acquire(blocking=False):
        return
    if any(map(os.path.exists, HARDWARE)):
        return
    from aiokvm.kvm import System, ring0_speed
    from aiokvm.kvm.probe import HARDWARE_RING0

    with suppress(KvmError), System() as system:
        speed = ring0_speed(system)
        if speed < HARDWARE_RING0:
            get_logger("aiokvm.machine").warning(
                "KVM emulates ring 0 here, at %.1f million instructions a second: a Linux is silent for "
                "minutes, and may stop; `aiokvm lab -- COMMAND` runs a program where KVM has hardware",
                speed / 1e6,
            )
