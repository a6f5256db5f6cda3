"""What the beginning of a disk image says about it: its format, and which other files it is made of.

Follows QEMU's docs/interop/qcow2.txt, VMware's Virtual Disk Format 5.0, and MS-VHDX 2.2.1. An image may have
been made by anyone: what names other files is told, so that it can be refused, or refused here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from aiokvm.errors import ImageError

HEAD_BYTES = 1 << 16
"""How much of a file `inspect` wants to see."""
FORMATS = ("qcow2", "vmdk", "vdi", "vhdx")
QCOW2_MAGIC = b"QFI\xfb"
VMDK4_MAGIC = b"KDMV"
VDI_SIGNATURE = b"\x7f\x10\xda\xbe"
VHDX_SIGNATURE = b"vhdxfile"
QCOW2_INCOMPAT_DATA_FILE = 1 << 2
QCOW2_EXT_MAGIC_BACKING_FORMAT = 0xE2792ACA
BACKING_NAME_MAX_BYTES = 1023  # of the format

_QCOW2 = struct.Struct(">4sIQIIQI")
_QCOW2_V2_BYTES = 72
_EXTENSION = struct.Struct(">II")
_VDI_SIGNATURE_OFFSET = 64
_VMDK_CAPACITY = struct.Struct("<Q")
_VMDK_CAPACITY_OFFSET = 12
# Where QEMU looks for a parent, whatever the header says.
_VMDK_DESCRIPTOR = slice(0x200, 0x200 + 20 * 512)


@dataclass(frozen=True, slots=True)
class Header:
    """An image's format, and its backing file's name and format, as the image spells them, else empty."""

    format: str
    backing: str = ""
    backing_format: str = ""


def inspect(head: bytes) -> Header | None:
    """What a file is that begins so; None if it begins as no format does. `HEAD_BYTES` are wanted.

    ImageError for an image that is damaged, or consists of what aiokvm does not use: several files of a VMDK,
    a qcow2's external data file, encryption.
    """
    if head.startswith(QCOW2_MAGIC):
        return _qcow2(head)
    if head.startswith(VMDK4_MAGIC):
        return _vmdk(head)
    if head.startswith((b"COWD", b"# Disk DescriptorFile")):
        raise ImageError(
            "a VMDK of several files, or of an old version: qemu-img convert -O qcow2 makes one file of it"
        )
    if head.startswith(VHDX_SIGNATURE):
        return Header("vhdx")
    if head[_VDI_SIGNATURE_OFFSET : _VDI_SIGNATURE_OFFSET + 4] == VDI_SIGNATURE:
        return Header("vdi")
    return None


def _qcow2(head: bytes) -> Header:
    if len(head) < 104:
        raise ImageError("a qcow2 image that ends in its header")
    _, version, offset, size, _, _, crypt_method = _QCOW2.unpack_from(head)
    if version not in (2, 3):
        raise ImageError(f"qcow2 version {version}: 2 and 3 can be used")
    if crypt_method:
        raise ImageError("an encrypted qcow2 image: aiokvm has no key for it")
    extensions = _QCOW2_V2_BYTES
    if version == 3:
        (incompatible,) = struct.unpack_from(">Q", head, 72)
        (extensions,) = struct.unpack_from(">I", head, 100)
        if incompatible & QCOW2_INCOMPAT_DATA_FILE:
            raise ImageError(
                "a qcow2 image with an external data file: qemu-img convert makes one file of it"
            )
    if not offset:
        return Header("qcow2")
    if not 0 < size <= BACKING_NAME_MAX_BYTES or offset + size > len(head):
        raise ImageError(f"a qcow2 image whose backing file's name has {size} bytes at {offset}")
    name, backing_format = _name(head[offset : offset + size]), ""
    while extensions + _EXTENSION.size <= min(offset, len(head)):
        magic, length = _EXTENSION.unpack_from(head, extensions)
        start = extensions + _EXTENSION.size
        if not magic:
            break
        if start + length > len(head):
            raise ImageError(f"a qcow2 image with a header extension of {length} bytes")
        if magic == QCOW2_EXT_MAGIC_BACKING_FORMAT:
            backing_format = _name(head[start : start + length])
        extensions = start + -(-length // 8) * 8
    return Header("qcow2", name, backing_format)


def _name(data: bytes) -> str:
    try:
        name = data.decode()
    except UnicodeDecodeError:
        name = "\0"
    if not name.isprintable():
        raise ImageError("a qcow2 image whose backing file has no printable name")
    return name


def _vmdk(head: bytes) -> Header:
    if len(head) < _VMDK_DESCRIPTOR.stop:
        raise ImageError("a VMDK image that ends in its header")
    (capacity,) = _VMDK_CAPACITY.unpack_from(head, _VMDK_CAPACITY_OFFSET)
    if not capacity:  # then the descriptor counts, which may name any file
        raise ImageError("a VMDK of several files: qemu-img convert -O qcow2 makes one file of it")
    if b"parentFileNameHint" in head[_VMDK_DESCRIPTOR]:
        raise ImageError(
            "a VMDK that is the difference to another: qemu-img convert -O qcow2 makes one of it"
        )
    return Header("vmdk")
