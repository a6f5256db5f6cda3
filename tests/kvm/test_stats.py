from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from aiokvm.errors import KvmError
from aiokvm.kvm import Cap, StatType, StatUnit, Vm

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kvm.conftest import Guest

pytestmark = pytest.mark.kvm


def test_of_a_vm(vm: Vm, requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_BINARY_STATS_FD)
    with vm.get_stats() as stats:
        assert stats.id == f"kvm-{os.getpid()}"
        by_name = {stat.name: stat for stat in stats.descriptors}
        flushes = by_name["remote_tlb_flush"]
        assert (flushes.type, flushes.unit) == (
            StatType.KVM_STATS_TYPE_CUMULATIVE,
            StatUnit.KVM_STATS_UNIT_NONE,
        )
        assert (flushes.size, flushes.base, flushes.exponent) == (1, 10, 0)
        assert stats.read().keys() == by_name.keys()


def test_of_a_vcpu(guest: Callable[..., Guest], requires: Callable[[Cap], int]) -> None:
    requires(Cap.KVM_CAP_BINARY_STATS_FD)
    g = guest(b"\xe6\x50\xf4")
    with g.vcpu.get_stats() as stats:
        assert stats.id == f"kvm-{os.getpid()}/vcpu-0"
        by_name = {stat.name: stat for stat in stats.descriptors}
        wait = by_name["halt_wait_ns"]
        assert (wait.unit, wait.base, wait.exponent) == (StatUnit.KVM_STATS_UNIT_SECONDS, 10, -9)
        histogram = by_name["halt_poll_success_hist"]
        assert histogram.type is StatType.KVM_STATS_TYPE_LOG_HIST
        before = stats.read()
        buckets = before["halt_poll_success_hist"]
        assert isinstance(buckets, tuple)
        assert len(buckets) == histogram.size > 1
        g.run()
        g.run_to_hlt()
        after = stats.read()
        assert isinstance(after["exits"], int)
        assert isinstance(before["exits"], int)
        assert after["exits"] > before["exits"]
    with pytest.raises(KvmError, match="the Stats is closed"):
        stats.read()
