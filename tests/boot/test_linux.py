from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.boot import GuestInfo, Linux
from aiokvm.errors import BootError, ConfigError

GUEST = GuestInfo(((0, 64 << 20),))


def test_files_in_order() -> None:
    assert Linux("vmlinuz").files() == (Path("vmlinuz"),)
    assert Linux(Path("vmlinuz"), "initrd.img").files() == (Path("vmlinuz"), Path("initrd.img"))


@pytest.mark.parametrize(
    ("cmdline", "message"),
    [
        ("quiet\0", "cmdline has a NUL at position 5"),
        ("a\udc80", "cannot be encoded as UTF-8 at position 1"),
    ],
)
def test_a_command_line_that_cannot_be_passed_on_is_refused_at_once(cmdline: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Linux("vmlinuz", cmdline=cmdline)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"vmlinuz \(0 bytes, first none\) is neither a bzImage nor an ELF file"),
        (
            b"\x1f\x8b\x08\x00rest",
            r"vmlinuz \(8 bytes, first 1f 8b 08 00\) is neither .* has to be unpacked first",
        ),
    ],
)
def test_other_files_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message):
        Linux("vmlinuz").plan({Path("vmlinuz"): content}, GUEST)


@given(
    st.binary(max_size=700),
    st.sampled_from([b"", b"\x7fELF\x02\x01\x01", b"\x7fELF\x01\x01\x01"]),
    st.booleans(),
)
def test_noise_is_refused(noise: bytes, magic: bytes, header: bool) -> None:
    content = bytearray(magic + noise)
    if header:
        content[0x202:0x206] = b"HdrS"
    with pytest.raises(BootError):
        Linux("vmlinuz").plan({Path("vmlinuz"): bytes(content)}, GUEST)
