from __future__ import annotations

import struct

from aiokvm.boot.plan import GuestInfo
from aiokvm.boot.zeropage import minimal_setup, zero_page

GUEST = GuestInfo(((0, 64 << 20),), rsdp=0xE_0010)


def test_the_loader_s_fields_and_the_memory_map() -> None:
    setup = bytes(range(1, 0x7C))
    page = zero_page(GUEST, setup, load=0x100_0000, initrd_gpa=0x3F0_0000, initrd_size=12345)
    assert len(page) == 4096
    assert struct.unpack_from("<Q", page, 0x070) == (0xE_0010,)
    assert page[0x1E8] == 4
    assert page[0x1F1:0x1FA] == setup[:9]
    assert struct.unpack_from("<H", page, 0x1FA) == (0xFFFF,)
    assert page[0x210:0x212] == b"\xff\x01"
    assert struct.unpack_from("<III", page, 0x214) == (0x100_0000, 0x3F0_0000, 12345)
    assert page[0x226:0x228] == b"\0\0"
    assert struct.unpack_from("<I", page, 0x228) == (0x9_9000,)
    assert page[0x22C : 0x1F1 + len(setup)] == setup[0x22C - 0x1F1 :]
    assert list(struct.iter_unpack("<QQI", page[0x2D0 : 0x2D0 + 80])) == [
        (0, 0x9_FC00, 1),
        (0x9_FC00, 0x400, 2),
        (0xE_0000, 0x2_0000, 2),
        (0x10_0000, 63 << 20, 1),
    ]
    # The sentinel and what no field covers: the kernel clears the page if they are not zero.
    assert not any(page[0x1E9:0x1F1])
    assert not any(page[0x2D0 + 80 :])


def test_a_kernel_without_a_header_gets_one() -> None:
    page = zero_page(GUEST, minimal_setup(), load=0x100_0000, initrd_gpa=0, initrd_size=0)
    assert struct.unpack_from("<H", page, 0x1FE) == (0xAA55,)
    assert page[0x202:0x206] == b"HdrS"
    assert struct.unpack_from("<H", page, 0x206) == (0x020C,)
    assert struct.unpack_from("<II", page, 0x218) == (0, 0)
