"""Linux: a bzImage or an ELF vmlinux, x86-64 or i386, with an initrd and a command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiokvm.arguments import checked_init
from aiokvm.boot.bzimage import BzImage
from aiokvm.boot.elf import ELFMAG, EM_X86_64, Elf
from aiokvm.boot.entry import long_mode, protected_mode
from aiokvm.boot.layout import CMDLINE, CMDLINE_SIZE, HIGH_MEMORY, START_INFO, ZERO_PAGE
from aiokvm.boot.plan import PlanBuilder
from aiokvm.boot.pvh import start_info
from aiokvm.boot.zeropage import HEADER, HEADER_MAGIC, minimal_setup, zero_page
from aiokvm.errors import BootError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from aiokvm.boot.cpu import CpuState
    from aiokvm.boot.plan import BootPlan, GuestInfo

# COMMAND_LINE_SIZE of x86, with its NUL: an ELF file does not tell, and the kernel would cut silently.
_ELF_CMDLINE_MAX = 2047
# The initrd_addr_max that the same kernels have in their bzImage.
_ELF_INITRD_ADDR_MAX = {True: 0x7FFF_FFFF, False: 0x37FF_FFFF}


@checked_init
@dataclass(frozen=True)
class Linux:
    """Boot a Linux kernel directly (Documentation/arch/x86/boot.rst; PVH for an ELF file with its note).

    ``kernel`` is a bzImage (boot protocol 2.06 or later) or an uncompressed ELF vmlinux, ``initrd`` what
    the kernel unpacks as its initramfs. ``cmdline`` is passed on in UTF-8, exactly as it is, unless
    ``virtio_mmio_cmdline`` is set: then ``virtio_mmio.device=`` of each virtio device stands before it, for a
    kernel that was built without ACPI. With ACPI it would find each device twice.

    A bzImage is entered in 64-bit mode if it can be, else in 32-bit mode. An ELF file is entered by PVH if it
    has the note, else as an unpacked bzImage, in the mode of its machine.

    Raises ConfigError for a command line with a NUL or with what UTF-8 cannot express.
    """

    kernel: str | PathLike[str]
    initrd: str | PathLike[str] | None = None
    cmdline: str = ""
    virtio_mmio_cmdline: bool = False

    def __post_init__(self) -> None:
        if "\0" in self.cmdline:
            raise ConfigError(f"cmdline has a NUL at position {self.cmdline.index(chr(0))}: remove it")
        try:
            self.cmdline.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"cmdline cannot be encoded as UTF-8 at position {error.start}") from error

    def files(self) -> tuple[Path, ...]:
        """Return the kernel and, if there is one, the initrd."""
        kernel = Path(self.kernel)
        return (kernel,) if self.initrd is None else (kernel, Path(self.initrd))

    def plan(self, files: Mapping[Path, bytes], guest: GuestInfo) -> BootPlan:
        """Return what goes where in ``guest``'s RAM, and the registers to enter the kernel with.

        Raises BootError for a file that is damaged, lies about itself, or does not fit into RAM, ConfigError
        for a command line longer than the kernel takes.
        """
        kernel = files[Path(self.kernel)]
        initrd = None if self.initrd is None else files[Path(self.initrd)]
        if initrd is not None and not initrd:
            raise BootError(f"the initrd {self.initrd} is empty")
        builder = PlanBuilder(guest, BootError)
        if kernel[:4] == ELFMAG:
            cpu = self._load_elf(builder, guest, Elf.parse(kernel), initrd)
        elif kernel[HEADER : HEADER + 4] == HEADER_MAGIC:
            cpu = self._load_bzimage(builder, guest, BzImage.parse(kernel), initrd)
        else:
            raise BootError(
                f"{self.kernel} ({len(kernel)} bytes, first {kernel[:4].hex(' ') or 'none'}) is neither "
                "a bzImage nor an ELF file; a compressed vmlinux has to be unpacked first"
            )
        return builder.build(cpu)

    def _load_bzimage(
        self, builder: PlanBuilder, guest: GuestInfo, kernel: BzImage, initrd: bytes | None
    ) -> CpuState:
        builder.claim("the kernel", *kernel.span)
        builder.place(kernel.load, kernel.code)
        self._load_cmdline(builder, guest, kernel.cmdline_size)
        initrd_gpa = _load_initrd(builder, initrd, kernel.initrd_addr_max)
        page = zero_page(
            guest, kernel.setup, load=kernel.load, initrd_gpa=initrd_gpa, initrd_size=len(initrd or b"")
        )
        return _enter_with_zero_page(builder, page, kernel.entry, is_64bit=kernel.is_64bit)

    def _load_elf(
        self, builder: PlanBuilder, guest: GuestInfo, kernel: Elf, initrd: bytes | None
    ) -> CpuState:
        for segment in kernel.segments:
            if segment.paddr < HIGH_MEMORY:
                raise BootError(
                    f"ELF: a segment goes to {segment.paddr:#x}: the first MiB is not for the kernel"
                )
            builder.copy("a segment of the kernel", segment.paddr, segment.data, segment.memsz)
        is_64bit = kernel.machine == EM_X86_64
        self._load_cmdline(builder, guest, _ELF_CMDLINE_MAX)
        initrd_gpa = _load_initrd(builder, initrd, _ELF_INITRD_ADDR_MAX[is_64bit])
        initrd_size = len(initrd or b"")
        if kernel.pvh_entry is not None:
            info = start_info(guest, initrd_gpa=initrd_gpa, initrd_size=initrd_size)
            builder.copy("the start info", START_INFO, info)
            return protected_mode(builder, kernel.pvh_entry, rbx=START_INFO)
        page = zero_page(
            guest, minimal_setup(), load=kernel.entry, initrd_gpa=initrd_gpa, initrd_size=initrd_size
        )
        return _enter_with_zero_page(builder, page, kernel.entry, is_64bit=is_64bit)

    def _load_cmdline(self, builder: PlanBuilder, guest: GuestInfo, limit: int) -> None:
        words = [self.cmdline]
        if self.virtio_mmio_cmdline:
            # Documentation/admin-guide/kernel-parameters.txt. What follows "--" is not for the kernel.
            words[:0] = (
                f"virtio_mmio.device={size >> 10}K@{base:#x}:{gsi}" for base, size, gsi in guest.virtio_mmio
            )
        data = " ".join(filter(None, words)).encode()
        limit = min(limit, CMDLINE_SIZE - 1)
        if len(data) > limit:
            raise ConfigError(f"cmdline has {len(data)} bytes, this kernel takes at most {limit}: shorten it")
        builder.copy("the command line", CMDLINE, data + b"\0")


def _load_initrd(builder: PlanBuilder, initrd: bytes | None, addr_max: int) -> int:
    if initrd is None:
        return 0
    gpa = builder.highest(len(initrd), addr_max + 1)
    if gpa is None:
        raise BootError(
            f"the initrd ({len(initrd)} bytes) does not fit into RAM beside the kernel, up to {addr_max:#x}: "
            "give the machine more memory"
        )
    builder.copy("the initrd", gpa, initrd)
    return gpa


def _enter_with_zero_page(builder: PlanBuilder, page: bytes, entry: int, *, is_64bit: bool) -> CpuState:
    builder.copy("the zero page", ZERO_PAGE, page)
    mode = long_mode if is_64bit else protected_mode
    return mode(builder, entry, rsi=ZERO_PAGE)
