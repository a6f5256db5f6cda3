"""Flat images: bytes that are put into memory and jumped into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aiokvm.arguments import checked_init
from aiokvm.boot.entry import long_mode, protected_mode, real_mode
from aiokvm.boot.layout import FOUR_GIB, HIGH_MEMORY
from aiokvm.boot.plan import PlanBuilder
from aiokvm.errors import BootError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from aiokvm.boot.plan import BootPlan, GuestInfo

_MODES = {"real": real_mode, "protected": protected_mode, "long": long_mode}


@checked_init
@dataclass(frozen=True)
class Flat:
    """Load ``image`` at the gpa ``load`` and enter it at the gpa ``entry``, with interrupts off.

    ``image`` is a path, or the bytes themselves. ``mode`` is what the processor is in:

    - ``"real"``: an ``entry`` below 64 KiB is 0:entry, one above it (up to 1 MiB) is entry>>4 : entry&15;
      DS, ES, FS and GS are as CS, SS:SP is 0x8000:0xfff0;
    - ``"protected"``: 32 bits, flat segments of 4 GiB, paging off;
    - ``"long"``: 64 bits, the first 4 GiB mapped to themselves.

    The image must keep clear of what the mode needs: the stack (0x80000 to 0x90000, growing down from its
    end), the GDT (32 bytes at 0x90000; code is selector 0x10, data 0x18), in long mode the page tables
    (0x93000 to 0x99000); and of the ACPI tables (0xe0000 to 0x100000) of a machine that has them.

    Raises ConfigError for an unknown mode or an address that the mode cannot reach.
    """

    image: str | PathLike[str] | bytes
    load: int = 0x1000
    entry: int = 0x1000
    mode: Literal["real", "protected", "long"] = "real"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"mode is {self.mode!r}, not one of {', '.join(map(repr, _MODES))}")
        limit = HIGH_MEMORY if self.mode == "real" else FOUR_GIB
        if not 0 <= self.load <= self.entry < limit:
            raise ConfigError(
                f"load {self.load:#x}, entry {self.entry:#x}: {self.mode} mode needs "
                f"0 <= load <= entry < {limit:#x}"
            )

    def files(self) -> tuple[Path, ...]:
        """Return the image's path; nothing if the image was given as bytes."""
        return () if isinstance(self.image, bytes) else (Path(self.image),)

    def plan(self, files: Mapping[Path, bytes], guest: GuestInfo) -> BootPlan:
        """Return where the image and its structures go, and the registers to enter it with.

        Raises BootError for an empty image, ConfigError for one that does not hold ``entry``, is not inside
        RAM and the first 4 GiB, or overlaps what the mode needs.
        """
        image = self.image if isinstance(self.image, bytes) else files[Path(self.image)]
        if not image:
            raise BootError("the flat image is empty")
        end = self.load + len(image)
        if self.entry >= end:
            raise ConfigError(f"entry {self.entry:#x} is not inside the image ({self.load:#x} to {end:#x})")
        if end > FOUR_GIB:
            raise ConfigError(f"the image ends at {end:#x}, beyond the first 4 GiB")
        builder = PlanBuilder(guest, ConfigError)
        cpu = _MODES[self.mode](builder, self.entry)
        builder.copy("the image", self.load, image)
        return builder.build(cpu)
