from __future__ import annotations

import pytest

from aiokvm.hw.debugexit import DebugExit


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_write_of_any_size_exits(size: int) -> None:
    codes: list[int] = []
    device = DebugExit(codes.append)
    device.write(0, size, 0x2A)
    device.write(1, size, 0)
    assert codes == [0x2A, 0]


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF), (8, 0xFFFFFFFFFFFFFFFF)])
def test_reads_give_ones_and_do_not_exit(size: int, ones: int) -> None:
    codes: list[int] = []
    device = DebugExit(codes.append)
    device.reset()
    assert device.read(0, size) == ones
    assert codes == []
