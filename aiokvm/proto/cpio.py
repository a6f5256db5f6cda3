"""The "newc" cpio archive that Linux unpacks as its initramfs.

Follows the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst``.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
ALIGNMENT = 4


@dataclass(frozen=True)
class Entry:
    """One member of an archive: ``name`` has no leading slash, ``mode`` is ``st_mode`` with its file type."""

    name: str
    mode: int
    data: bytes = b""


def directory(name: str, permissions: int = 0o755) -> Entry:
    """Describe a directory. Linux makes no parents: list them first."""
    return Entry(name, stat.S_IFDIR | permissions)


def file(name: str, data: bytes, permissions: int = 0o644) -> Entry:
    """Describe a regular file."""
    return Entry(name, stat.S_IFREG | permissions, data)


def symlink(name: str, target: str) -> Entry:
    """Describe a symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def archive(entries: Iterable[Entry]) -> bytes:
    """Write the entries in their order, owned by root and dated 0, so that equal input gives equal bytes.

    The length is a multiple of 4. Raises ``ValueError`` for a file of 4 GiB and more, which newc cannot hold.
    """
    out = bytearray()
    for inode, entry in enumerate(entries, 1):
        _write(out, inode, entry)
    _write(out, 0, Entry(TRAILER, 0))
    return bytes(out)


def join(*archives: bytes) -> bytes:
    """Concatenate archives, compressed ones too, each starting where Linux looks for it: 4-byte aligned.

    Linux unpacks them one after the other; a later file replaces an earlier one of its name.
    """
    out = bytearray()
    for part in archives:
        _pad(out)
        out += part
    return bytes(out)


def _write(out: bytearray, inode: int, entry: Entry) -> None:
    name = entry.name.encode() + b"\0"
    if len(entry.data) > 0xFFFF_FFFF:
        raise ValueError(f"{entry.name}: {len(entry.data)} bytes do not fit a newc archive (limit 2^32 - 1)")
    nlink = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, entry.mode, 0, 0, nlink, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    out += MAGIC + b"".join(b"%08X" % field for field in fields) + name
    _pad(out)
    out += entry.data
    _pad(out)


def _pad(out: bytearray) -> None:
    out += bytes(-len(out) % ALIGNMENT)
