"""What a machine has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm._core import ffi, lib
from aiokvm.kvm import KvmExit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiokvm._core import Pointer

    KvmStats = Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class VcpuStats:
    """One vCPU since its creation.

    ``exits`` are returns from KVM_RUN with something to do, ``reasons`` the same by the name of exit_reason.
    Of those, ``posted`` were queued or answered in C, and ``unclaimed`` hit addresses where nothing is.
    ``guest_ns`` were spent in KVM_RUN, ``wait_ns`` waiting for the loop; ``poll_hits`` of the replies came
    while the thread polled. ``kvm`` has the kernel's own figures (KVM_GET_STATS_FD), empty where it has none.
    """

    exits: int
    reasons: Mapping[str, int]
    posted: int
    unclaimed: int
    kicks: int
    guest_ns: int
    wait_ns: int
    poll_hits: int
    kvm: KvmStats


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """One region: the device's class, where it is, and how many accesses the loop has served."""

    device: str
    bus: str
    base: int
    size: int
    exits: int


@dataclass(frozen=True, slots=True)
class VmStats:
    """One machine since its creation.

    ``serving_ns`` were spent in Python with its exits. Of what came from the vCPUs, ``poll_hits`` came
    while the loop polled, ``poll_misses`` polls were in vain, and ``rings`` times the loop was woken by the
    doorbell. ``device_errors`` counts what devices raised.
    """

    vcpus: tuple[VcpuStats, ...]
    devices: tuple[DeviceStats, ...]
    serving_ns: int
    poll_hits: int
    poll_misses: int
    rings: int
    device_errors: int
    kvm: KvmStats


def vcpu_stats(core: Pointer, kvm: KvmStats) -> VcpuStats:
    """Read a vCPU's counters, which its thread goes on counting."""
    raw = ffi.new("struct aiokvm_vcpu_stats *")
    lib.aiokvm_vcpu_stats(core, raw)
    reasons = {_reason(number): count for number, count in enumerate(raw.reasons) if count}
    return VcpuStats(
        exits=raw.exits,
        reasons=reasons,
        posted=raw.posted,
        unclaimed=raw.unclaimed,
        kicks=raw.kicks,
        guest_ns=raw.guest_ns,
        wait_ns=raw.wait_ns,
        poll_hits=raw.poll_hits,
        kvm=kvm,
    )


def _reason(number: int) -> str:
    try:
        return KvmExit(number).name
    except ValueError:
        return str(number)
