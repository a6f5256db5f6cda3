from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm import ImageError
from aiokvm.proto.image import Header, inspect


def qcow2(
    *,
    version: int = 3,
    backing: bytes = b"",
    backing_format: bytes = b"",
    offset: int | None = None,
    size: int | None = None,
    crypt: int = 0,
    incompatible: int = 0,
    length: int | None = None,
) -> bytes:
    extension = b""
    if backing_format:
        count = len(backing_format) if length is None else length
        extension = struct.pack(">II", 0xE2792ACA, count) + backing_format.ljust(
            -(-len(backing_format) // 8) * 8
        )
    extension = struct.pack(">II", 0x6803F857, 3) + b"abc\0\0\0\0\0" + extension + bytes(8)
    header = 104 if version > 2 else 72
    at = (header + len(extension) if offset is None else offset) if backing else 0
    head = struct.pack(
        ">4sIQIIQI",
        *(b"QFI\xfb", version, at, len(backing) if size is None else size, 16, 1 << 20, crypt),
    )
    head = head.ljust(72, b"\0")
    if version > 2:
        head += struct.pack(">QQQII", incompatible, 0, 0, 4, header)
    return (head + extension + backing).ljust(4096, b"\0")


def test_qcow2_names_its_backing_file() -> None:
    assert inspect(qcow2()) == Header("qcow2")
    for version in (2, 3):
        head = qcow2(version=version, backing=b"base.img", backing_format=b"raw")
        assert inspect(head) == Header("qcow2", "base.img", "raw")
    assert inspect(qcow2(backing=b"base.img")) == Header("qcow2", "base.img", "")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (qcow2()[:50], "ends in its header"),
        (qcow2(version=1), "version 1"),
        (qcow2(version=4), "version 4"),
        (qcow2(crypt=1), "encrypted"),
        (qcow2(incompatible=4), "external data"),
        (qcow2(backing=b"x", size=0), "0 bytes"),
        (qcow2(backing=b"x", size=1024), "1024 bytes"),
        (qcow2(backing=b"x", offset=1 << 40), "at 1099511627776"),
        (qcow2(backing=b"a\nb"), "printable"),
        (qcow2(backing=b"\xff"), "printable"),
        (qcow2(backing=b"x", backing_format=b"raw", length=1 << 31), "extension"),
        (b"COWD" + bytes(4096), "several files"),
        (b"# Disk DescriptorFile\nversion=1\n", "several files"),
        (b"KDMV" + bytes(100), "ends in its header"),
        (b"KDMV" + bytes(20000), "several files"),
        ((b"KDMV" + b"\1" * 508 + b'parentFileNameHint="x"').ljust(20000, b"\0"), "difference"),
    ],
)
def test_what_names_other_files_or_is_damaged_is_refused(head: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        inspect(head)


def test_others_are_known_by_their_magic() -> None:
    assert inspect((b"KDMV" + b"\1" * 508).ljust(20000, b"\0")) == Header("vmdk")
    assert inspect(bytes(64) + b"\x7f\x10\xda\xbe") == Header("vdi")
    assert inspect(b"vhdxfile") == Header("vhdx")
    assert inspect(b"") is None
    assert inspect(bytes(1 << 16)) is None


@given(st.sampled_from([b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b"KDMV", b""]), st.binary(max_size=300))
def test_any_bytes_are_an_image_or_none_or_refused(magic: bytes, rest: bytes) -> None:
    with suppress(ImageError):
        inspect((magic + rest).ljust(12000, b"\0"))
