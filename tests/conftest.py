"""Fixtures and markers that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import uvloop


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"loop_factory": uvloop.new_event_loop}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """Every test marked anyio runs on the three loops."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return
    reason = "no access to /dev/kvm" if Path("/dev/kvm").exists() else "this machine has no /dev/kvm"
    for item in items:
        if item.get_closest_marker("kvm") or item.get_closest_marker("linux"):
            item.add_marker(pytest.mark.skip(reason=reason))
