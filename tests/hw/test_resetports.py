"""Ports that reset the machine: what resets it, what reads back, and their state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aiokvm.errors import DeviceError
from aiokvm.hw.resetports import ResetControl, ResetVector, SystemControl


@pytest.mark.parametrize(
    ("kind", "written", "reads", "resets"),
    [
        (ResetControl, 0x00, 0x00, False),
        (ResetControl, 0x02, 0x02, False),
        (ResetControl, 0x04, 0x00, True),
        (ResetControl, 0x06, 0x02, True),
        (ResetControl, 0x0E, 0x02, True),
        (ResetControl, 0xFB, 0x02, False),
        (ResetVector, 0x01, 0x00, True),
        (SystemControl, 0x00, 0x00, False),
        (SystemControl, 0x02, 0x02, False),
        (SystemControl, 0x01, 0x00, True),
        (SystemControl, 0x03, 0x02, True),
        (SystemControl, 0xFE, 0x02, False),
    ],
)
def test_one_bit_resets_and_one_reads_back(
    kind: type[ResetControl | ResetVector | SystemControl], written: int, reads: int, resets: bool
) -> None:
    seen: list[str] = []
    device = kind(lambda: seen.append("reset"))
    initial = device.read(0, 1)
    device.write(0, 1, written)
    assert device.read(0, 1) == reads
    assert seen == ["reset"] * resets
    device.reset()
    assert device.read(0, 1) == initial


def test_each_write_of_the_bit_resets() -> None:
    seen: list[str] = []
    device = ResetControl(lambda: seen.append("reset"))
    for _ in range(3):
        device.write(0, 1, 6)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", [ResetControl, SystemControl])
def test_state(kind: type[ResetControl | SystemControl]) -> None:
    device = kind(lambda: None)
    device.write(0, 1, 0x02)
    other = kind(lambda: pytest.fail("restoring resets nothing"))
    other.restore(device.state())
    assert other.read(0, 1) == 2
    with pytest.raises(DeviceError, match="version 2"):
        other.restore(replace(device.state(), version=2))
