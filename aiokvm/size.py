"""Sizes as people write them."""

from __future__ import annotations

import re

from aiokvm.errors import ConfigError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d{1,20})(\.\d{1,20})?\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE | re.ASCII)
# What memory and disks are multiples of.
_STEP = 4096


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"512M"`` or ``"1.5G"``, with K, M, G or T for powers of 1024, or an int.

    A fraction of M, G or T is rounded down to a multiple of 4096. Raises ConfigError for anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if not match or (match[2] and not match[3]):
        raise ConfigError(
            f"{size!r} is not a size: write bytes, or a number with K, M, G or T, such as 512M or 1.5G"
        )
    unit = _UNITS[match[3].upper()]
    found = int(match[1]) * unit
    if not match[2]:
        return found
    digits = match[2][1:]
    found += int(digits) * unit // int("1" + "0" * len(digits))
    return found - found % _STEP if unit > _STEP else found
