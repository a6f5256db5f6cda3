"""Devices without a loop: what would be a callback of it is measured as one (tests/holdups.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.virtio.guest import DeviceGuest
from tests.virtio.transport import Transport

if TYPE_CHECKING:
    from tests.holdups import Step


@pytest.fixture(autouse=True)
def measured_steps(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    for rig in (DeviceGuest, Transport):
        monkeypatch.setattr(rig, "step", staticmethod(step))
