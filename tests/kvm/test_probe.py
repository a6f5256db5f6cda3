from __future__ import annotations

import os

import pytest

from aiokvm.kvm import System, ring0_speed

pytestmark = pytest.mark.kvm


def test_ring0_speed_is_a_speed_and_leaves_nothing_behind(system: System) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert 1e5 < ring0_speed(system) < 1e11
    assert len(os.listdir("/proc/self/fd")) == before
