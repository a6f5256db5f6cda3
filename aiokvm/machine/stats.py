"""What a machine has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokvm._core import ffi, lib
from aiokvm.hw.bus import device_name
from aiokvm.kvm import KvmExit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiokvm import kvm
    from aiokvm._core import Pointer
    from aiokvm.machine.exits import Exits
    from aiokvm.machine.failures import Failures
    from aiokvm.machine.vcpu import VirtualCpu

    KvmStats = Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class VcpuStats:
    """What one vCPU has done since its creation; times are in nanoseconds.

    - ``exits``: returns from KVM_RUN with something to do; ``reasons`` has them by the name of exit_reason
    - ``posted``: how many of them were queued for the loop, or answered in C
    - ``unclaimed``: how many of them hit an address where nothing is
    - ``kicks``: returns from KVM_RUN because the loop wanted something
    - ``guest_ns``: time in KVM_RUN, the guest's and the kernel's on its behalf
    - ``wait_ns``: time waiting for the loop's replies; ``poll_hits``: how many of these came while it polled
    - ``kvm``: the kernel's own figures (KVM_GET_STATS_FD) by name; empty where it has none, and before start
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
    """One region: the name of the device's class, where it is, and its ``exits``.

    ``bus`` is "pio" or "mmio", ``base`` a port or a guest physical address, ``size`` in bytes. ``exits``
    counts the accesses that the loop has served, posted ones included; doorbells are not among them.
    """

    device: str
    bus: str
    base: int
    size: int
    exits: int


@dataclass(frozen=True, slots=True)
class VmStats:
    """What one machine has done since its creation.

    - ``vcpus``: by index; ``devices``: the regions that are attached, aiokvm's own among them
    - ``serving_ns``: time in nanoseconds that the loop spent with its exits
    - ``poll_hits``: how often news came while the loop polled; ``poll_misses``: how often it stopped
      since none had come; ``rings``: how often the doorbell woke it
    - ``device_errors``: how often a device raised
    - ``kvm``: the kernel's own figures (KVM_GET_STATS_FD) by name; empty where it has none
    """

    vcpus: tuple[VcpuStats, ...]
    devices: tuple[DeviceStats, ...]
    serving_ns: int
    poll_hits: int
    poll_misses: int
    rings: int
    device_errors: int
    kvm: KvmStats


def collect(
    vcpus: Iterable[VirtualCpu], exits: Exits, failures: Failures, kvm_stats: kvm.Stats | None
) -> VmStats:
    """Read a machine's counters."""
    core = exits.stats()
    return VmStats(
        vcpus=tuple(vcpu.stats() for vcpu in vcpus),
        devices=tuple(
            DeviceStats(device_name(region.device), bus, region.base, region.size, count)
            for bus, region, count in exits.counts()
        ),
        serving_ns=core.serving_ns,
        poll_hits=core.poll_hits,
        poll_misses=core.poll_misses,
        rings=core.rings,
        device_errors=failures.errors,
        kvm=kvm_stats.read() if kvm_stats else {},
    )


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
