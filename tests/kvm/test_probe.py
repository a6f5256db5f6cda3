from __future__ import annotations

import os

import pytest

from aiokvm.kvm import System, probe, ring0_speed

pytestmark = pytest.mark.kvm


def test_ring0_speed_is_a_speed_and_leaves_nothing_behind(system: System) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert 1e5 < ring0_speed(system) < 1e11
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_that_something_else_disturbs_does_not_count(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([5.0, 0.001, 5.0, 5.0, 0.016, 5.0])
    monkeypatch.setattr(probe, "_time", lambda _vcpu, _loops: next(times))
    assert ring0_speed(system) == (1 << 18) / 0.016
