from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokvm.errors import ImageError
from aiokvm.images.vmlinux import extract, payload

if TYPE_CHECKING:
    from collections.abc import Callable

ELF = b"\x7fELF" + bytes(range(256)) * 40


def bzimage(packed: bytes, offset: int = 64) -> bytearray:
    """Make a bzImage whose header is right and whose code is nothing but the payload."""
    code = bytes(offset) + packed
    code += bytes(-len(code) % 16)
    header = bytearray(2 * 512)
    header[0x1F1] = 1
    struct.pack_into("<I", header, 0x1F4, len(code) // 16)
    struct.pack_into("<H", header, 0x1FE, 0xAA55)
    header[0x200:0x202] = b"\xeb\x6a"
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, 0x20F)
    header[0x211] = 1
    struct.pack_into("<I", header, 0x238, 2047)
    struct.pack_into("<II", header, 0x248, offset, len(packed))
    struct.pack_into("<QI", header, 0x258, 0x100000, 0x10000)
    return header + code


def sized(packed: bytes, size: int = len(ELF)) -> bytes:
    return packed + struct.pack("<I", size)


def filtered(*argv: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(argv, input=data, capture_output=True, check=True).stdout


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs the program {program}")


def test_payload_is_cut_out() -> None:
    assert payload(bytes(bzimage(b"12345678", offset=80))) == b"12345678"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        lambda data: sized(lzma.compress(data)),
        lambda data: sized(lzma.compress(data, format=lzma.FORMAT_ALONE)),
        lambda data: sized(bz2.compress(data)),
        pytest.param(lambda data: sized(filtered("lz4", "-l")(data)), marks=needs("lz4")),
        pytest.param(lambda data: sized(filtered("zstd")(data)), marks=needs("zstd")),
    ],
    ids=["gzip", "xz", "lzma", "bzip2", "lz4", "zstd"],
)
async def test_every_compression(pack: Callable[[bytes], bytes]) -> None:
    assert await extract(bytes(bzimage(pack(ELF)))) == ELF


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (sized(b"nonsense"), "compressed in a way that is not known"),
        (sized(lzma.compress(ELF)[:200]), "unpacks to"),
        (gzip.compress(ELF)[:200], "payload breaks off"),
        (sized(lzma.compress(ELF), 7), "unpacks to 8 bytes where its header says 7"),
        (sized(lzma.compress(ELF), 0xFFFF_FFFF), "claims to unpack to 4294967295 bytes"),
        (sized(b"\xfd7zXZ\0" + bytes(50)), "payload is damaged"),
        (b"\x1f\x8b" + bytes(50), "payload is damaged"),
        (gzip.compress(b"not a kernel"), "not ELF: it begins with 6e6f7420"),
        pytest.param(sized(b"\x02\x21\x4c\x18" + b"\xff" * 40), "lz4 failed with status", marks=needs("lz4")),
        (b"", "the payload has 0 bytes"),
    ],
)
async def test_damage_is_refused(packed: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        await extract(bytes(bzimage(packed)))


@pytest.mark.anyio
async def test_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ImageError, match="lz4 is missing: install the Debian package lz4"):
        await extract(bytes(bzimage(sized(b"\x02\x21\x4c\x18"))))


@pytest.mark.parametrize("content", [b"", b"\x7fELF" * 400, bytes(bzimage(b"12345678"))[:900]])
def test_what_is_no_bzimage_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="no ELF kernel can be taken out of it"):
        payload(content)


def test_protocol_without_payload_is_refused() -> None:
    image = bzimage(b"12345678")
    struct.pack_into("<H", image, 0x206, 0x207)
    with pytest.raises(ImageError, match=r"boot protocol 2\.07 names no payload"):
        payload(bytes(image))


@given(st.data())
def test_lying_headers_end_in_a_payload_or_a_typed_error(data: st.DataObject) -> None:
    image = bzimage(b"12345678")
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0x1F1, 0x263))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert len(payload(bytes(image))) <= len(image)
