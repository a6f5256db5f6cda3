"""The ELF kernel inside a bzImage (Linux ``Documentation/arch/x86/boot.rst``, protocol 2.08 and later)."""

from __future__ import annotations

import bz2
import lzma
import struct
import tempfile
import zlib

from aiokvm.boot import zeropage as zp
from aiokvm.boot.bzimage import BzImage
from aiokvm.errors import BootError, ImageError
from aiokvm.images.process import run

# A kernel with all its drivers built in is a quarter of it.
_ELF_MAX_BYTES = 256 << 20

_GZIP = b"\x1f\x8b"
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_ZSTD = b"\x28\xb5\x2f\xfd"
_XZ = b"\xfd7zXZ\0"
_BZIP2 = b"BZh"
_LZMA = b"\x5d\0\0"


def payload(image: bytes) -> bytes:
    """Return the compressed kernel of a bzImage; ``ImageError`` if its header does not describe one."""
    try:
        code = BzImage.parse(image).code
    except BootError as error:
        raise ImageError(f"no ELF kernel can be taken out of it: {error}") from error
    (version,) = struct.unpack_from("<H", image, zp.VERSION)
    if version < 0x0208:
        raise ImageError(f"boot protocol {version >> 8}.{version & 0xFF:02} names no payload; 2.08 does")
    offset, length = struct.unpack_from("<II", image, zp.PAYLOAD_OFFSET)
    if length < 8:
        raise ImageError(f"the payload has {length} bytes, which is no kernel")
    return bytes(code[offset : offset + length])


async def extract(image: bytes) -> bytes:
    """Return the ELF kernel of a bzImage.

    LZ4 and Zstandard need the programs ``lz4`` and ``zstd``. Raises ``ImageError`` for a missing program and
    for a damaged or unknown payload.
    """
    packed = payload(image)
    if packed.startswith(_GZIP):
        elf = _decompress_gzip(packed)
    else:
        # All but gzip are followed by the unpacked size.
        packed, (size,) = packed[:-4], struct.unpack("<I", packed[-4:])
        if size > _ELF_MAX_BYTES:
            raise ImageError(f"the kernel claims to unpack to {size} bytes (limit {_ELF_MAX_BYTES})")
        elf = await _decompress(packed, size)
        if len(elf) != size:
            raise ImageError(f"the kernel unpacks to {len(elf)} bytes where its header says {size}")
    if not elf.startswith(b"\x7fELF"):
        raise ImageError(f"the kernel unpacks to something that is not ELF: it begins with {elf[:4].hex()}")
    return elf


async def _decompress(packed: bytes, size: int) -> bytes:
    if packed.startswith(_LZ4_LEGACY):
        return await _filter("lz4", packed)
    if packed.startswith(_ZSTD):
        return await _filter("zstd", packed)
    try:
        # One byte more than the size shows that there is more, and bounds what a lying header can cost.
        if packed.startswith((_XZ, _LZMA)):
            return lzma.LZMADecompressor().decompress(packed, size + 1)
        if packed.startswith(_BZIP2):
            return bz2.BZ2Decompressor().decompress(packed, size + 1)
    except (lzma.LZMAError, OSError, EOFError) as error:
        raise ImageError(f"the kernel's payload is damaged: {error}") from error
    raise ImageError(
        f"the kernel is compressed in a way that is not known here: it begins with {packed[:6].hex()}"
    )


def _decompress_gzip(packed: bytes) -> bytes:
    decompressor = zlib.decompressobj(wbits=31)
    try:
        elf = decompressor.decompress(packed, _ELF_MAX_BYTES)
    except zlib.error as error:
        raise ImageError(f"the kernel's payload is damaged: {error}") from error
    if not decompressor.eof:
        raise ImageError(f"the kernel's payload breaks off, or unpacks to more than {_ELF_MAX_BYTES} bytes")
    return elf


async def _filter(program: str, packed: bytes) -> bytes:
    with tempfile.TemporaryFile() as stdin:
        stdin.write(packed)
        stdin.seek(0)
        return await run([program, "-dc"], stdin=stdin)
