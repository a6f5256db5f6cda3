from __future__ import annotations

import pytest

from aiokvm.boot.e820 import E820Entry, E820Type, memory_map
from aiokvm.boot.plan import GuestInfo
from aiokvm.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30
EBDA = E820Entry(0x9_FC00, 0x400, E820Type.RESERVED)
BIOS = E820Entry(0xE_0000, 0x2_0000, E820Type.RESERVED)


def test_low_and_high_ram() -> None:
    assert memory_map(GuestInfo(((0, 3 * GIB), (4 * GIB, 2 * GIB)))) == [
        (0, 0x9_FC00, E820Type.RAM),
        EBDA,
        BIOS,
        (MIB, 3 * GIB - MIB, E820Type.RAM),
        (4 * GIB, 2 * GIB, E820Type.RAM),
    ]


@pytest.mark.parametrize(("size", "usable"), [(0x8_0000, 0x8_0000), (0x9_FC00, 0x9_FC00), (MIB, 0x9_FC00)])
def test_ram_that_ends_in_the_first_mib(size: int, usable: int) -> None:
    assert memory_map(GuestInfo(((0, size),))) == [(0, usable, E820Type.RAM), EBDA, BIOS]


def test_at_most_what_the_zero_page_holds() -> None:
    ram = tuple((i * 2 * MIB, MIB) for i in range(1, 127))
    assert len(memory_map(GuestInfo(ram))) == 128
    with pytest.raises(ConfigError, match=r"129 entries, a kernel takes 128"):
        memory_map(GuestInfo((*ram, (GIB, MIB))))
