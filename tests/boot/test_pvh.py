from __future__ import annotations

import struct

from aiokvm.boot.plan import GuestInfo
from aiokvm.boot.pvh import start_info


def test_start_info_with_a_module() -> None:
    info = start_info(GuestInfo(((0, 64 << 20),), rsdp=0xE_0010), initrd_gpa=0x3F0_0000, initrd_size=12345)
    assert struct.unpack_from("<IIIIQQQQII", info) == (
        0x336E_C578, 1, 0, 1, 0x9_2038, 0x9_9000, 0xE_0010, 0x9_2058, 4, 0,
    )  # fmt: skip
    assert struct.unpack_from("<4Q", info, 0x38) == (0x3F0_0000, 12345, 0, 0)
    assert list(struct.iter_unpack("<QQII", info[0x58:])) == [
        (0, 0x9_FC00, 1, 0),
        (0x9_FC00, 0x400, 2, 0),
        (0xE_0000, 0x2_0000, 2, 0),
        (0x10_0000, 63 << 20, 1, 0),
    ]


def test_start_info_without_a_module() -> None:
    info = start_info(GuestInfo(((0, 64 << 20),)), initrd_gpa=0, initrd_size=0)
    assert struct.unpack_from("<IIIIQQQQII", info) == (
        0x336E_C578, 1, 0, 0, 0, 0x9_9000, 0, 0x9_2038, 4, 0,
    )  # fmt: skip
    assert len(info) == 0x38 + 4 * 24


def test_the_longest_start_info_is_within_a_page() -> None:
    ram = tuple((i << 21, 1 << 20) for i in range(1, 127))
    assert len(start_info(GuestInfo(ram), initrd_gpa=1, initrd_size=1)) == 56 + 32 + 128 * 24 <= 4096
