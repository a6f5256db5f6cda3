"""The figures of machines for Prometheus; needs the extra ``metrics`` (prometheus_client)."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import anyio.lowlevel
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from aiokvm import ConfigError, StateError, VmState
from aiokvm.arguments import checked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

    from aiokvm import VM, VmStats

__all__ = ["MachineCollector"]

_NS = 1e-9
# That `snapshot` reads before the loop has a turn: some ten machines.
_SLICE_NS = 500_000


class MachineCollector(Collector):
    """Gives a Prometheus registry what `VM.stats` says of the machines that were added to it.

    It keeps nothing between two collections and forgets a machine that is closed. Collect on the thread of
    the machines' event loop, ``prometheus_client.generate_latest(registry)`` in a handler for instance;
    `collect` raises StateError on any other. It holds the loop: of hundreds of machines take a `snapshot`.
    The kernel's own figures (``VmStats.kvm``) are left out.
    """

    def __init__(self) -> None:
        self._machines: dict[VM, int] = {}

    @checked
    def add(self, vm: VM) -> None:
        """Show this machine, too, from now on, on its loop's thread. ConfigError if another has its name.

        Raises StateError on any other thread.
        """
        self._forget_closed()
        if any(other.name == vm.name and other is not vm for other in self._machines):
            raise ConfigError(
                f"a machine named {vm.name} is shown already: give it another name, which tells figures apart"
            )
        if vm.state is not VmState.CLOSED:
            vm.stats()  # it says no on any other thread
        self._machines[vm] = threading.get_ident()

    @checked
    def remove(self, vm: VM) -> None:
        """Do not show it any more. Nothing happens if it is not shown."""
        self._machines.pop(vm, None)

    def describe(self) -> Iterable[Metric]:
        """The families without figures: what a registry asks for when the collector is registered."""
        return _Families().all

    def collect(self) -> Iterable[Metric]:
        """All figures as they are now."""
        self._forget_closed()
        families = _Families()
        for vm in tuple(self._machines):
            self._read(vm, families)
        return families.all

    async def snapshot(self) -> CollectorRegistry:
        """The figures as they are now, as a registry for ``generate_latest`` on any thread.

        Others on the loop have their turns while machines are read. Raises StateError as `collect` does.
        """
        self._forget_closed()
        families = _Families()
        end_ns = time.monotonic_ns() + _SLICE_NS
        for vm in tuple(self._machines):
            # Meanwhile it may have been closed, or removed.
            if vm in self._machines and vm.state is not VmState.CLOSED:
                self._read(vm, families)
            if time.monotonic_ns() >= end_ns:
                await anyio.lowlevel.checkpoint()
                end_ns = time.monotonic_ns() + _SLICE_NS
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(families.all))
        return registry

    def _read(self, vm: VM, families: _Families) -> None:
        if self._machines[vm] != threading.get_ident():
            raise StateError(
                f"the figures of machine {vm.name} belong to its event loop's thread: collect there, "
                "for instance by generate_latest(registry) in a coroutine"
            )
        families.add(vm.name, vm.memory.size_bytes, vm.stats())

    def _forget_closed(self) -> None:
        for vm in [vm for vm in tuple(self._machines) if vm.state is VmState.CLOSED]:
            del self._machines[vm]


class _Snapshot(Collector):
    """Figures that do not change."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Families:
    """The metrics of one collection. A counter's name gets ``_total``."""

    def __init__(self) -> None:
        self.all: list[Metric] = []
        vcpu = ("machine", "vcpu")
        device = ("machine", "device", "bus", "base")
        self._exits = self._counter(
            "exits", "Returns from KVM_RUN with something to do, by exit_reason.", *vcpu, "reason"
        )
        self._posted = self._counter("posted_accesses", "Accesses queued or answered in C.", *vcpu)
        self._unclaimed = self._counter("unclaimed_accesses", "Accesses to where nothing is.", *vcpu)
        self._kicks = self._counter("kicks", "Times a vCPU was made to leave KVM_RUN.", *vcpu)
        self._guest = self._counter("guest_seconds", "Time in KVM_RUN.", *vcpu)
        self._wait = self._counter("wait_seconds", "Time in which a vCPU waited for the loop.", *vcpu)
        self._replies = self._counter(
            "polled_replies", "Replies that came while the vCPU's thread polled.", *vcpu
        )
        self._served = self._counter("device_accesses", "Accesses that the loop has served.", *device)
        self._serving = self._counter("serving_seconds", "Time in Python with exits.", "machine")
        self._hits = self._counter("poll_hits", "News that came while the loop polled.", "machine")
        self._misses = self._counter("poll_misses", "Polls of the loop in vain.", "machine")
        self._rings = self._counter("doorbell_rings", "Times the loop was woken for exits.", "machine")
        self._errors = self._counter("device_errors", "Exceptions raised by devices.", "machine")
        self._memory = GaugeMetricFamily("aiokvm_memory_bytes", "The guest's RAM.", labels=["machine"])
        self.all.append(self._memory)

    def add(self, name: str, memory_bytes: int, stats: VmStats) -> None:
        """Take in one machine."""
        machine = [name]
        for index, vcpu in enumerate(stats.vcpus):
            labels = [name, str(index)]
            for reason, count in vcpu.reasons.items():
                self._exits.add_metric([*labels, reason], count)
            self._posted.add_metric(labels, vcpu.posted)
            self._unclaimed.add_metric(labels, vcpu.unclaimed)
            self._kicks.add_metric(labels, vcpu.kicks)
            self._guest.add_metric(labels, vcpu.guest_ns * _NS)
            self._wait.add_metric(labels, vcpu.wait_ns * _NS)
            self._replies.add_metric(labels, vcpu.poll_hits)
        for device in stats.devices:
            self._served.add_metric([name, device.device, device.bus, f"{device.base:#x}"], device.exits)
        self._serving.add_metric(machine, stats.serving_ns * _NS)
        self._hits.add_metric(machine, stats.poll_hits)
        self._misses.add_metric(machine, stats.poll_misses)
        self._rings.add_metric(machine, stats.rings)
        self._errors.add_metric(machine, stats.device_errors)
        self._memory.add_metric(machine, memory_bytes)

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        family = CounterMetricFamily(f"aiokvm_{name}", text, labels=labels)
        self.all.append(family)
        return family
