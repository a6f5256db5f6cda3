from __future__ import annotations

from typing import TYPE_CHECKING

from aiokvm.boot.acpi.facs import facs

if TYPE_CHECKING:
    from collections.abc import Callable


def test_facs() -> None:
    data = facs()
    assert len(data) == 64
    assert data[:8] == b"FACS" + bytes([64, 0, 0, 0])
    assert data[32] == 2
    assert not any(data[8:32] + data[33:])


def test_iasl(iasl: Callable[[bytes], str]) -> None:
    assert "Version : 02" in iasl(facs())
