"""The reset vector: what a guest finds that jumps to where a PC's firmware begins."""

from __future__ import annotations

from aiokvm.boot.layout import RESET_VECTOR
from aiokvm.boot.plan import Segment


def reset_vector(port: int) -> Segment:
    """Return the code at f000:fff0, which writes a byte to ``port`` and halts.

    It means the same in 16, 32 and 64-bit mode.
    """
    code = (
        b"\x31\xd2"  # xor edx, edx (or dx, dx)
        + bytes((0xB6, port >> 8))  # mov dh, port >> 8
        + bytes((0xB2, port & 0xFF))  # mov dl, port & 0xff
        + b"\xb0\x01"  # mov al, 1
        + b"\xee"  # out dx, al
        + b"\xf4"  # hlt
        + b"\xeb\xfd"  # jmp to it
    )
    return Segment(RESET_VECTOR, code)
