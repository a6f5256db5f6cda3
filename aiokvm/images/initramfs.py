"""The small guest's initramfs: busybox, ``/init``, and a way to tell a command's exit status."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from aiokvm.arguments import checked
from aiokvm.errors import ConfigError
from aiokvm.proto import cpio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

INIT = Path(__file__).with_name("init")
DHCP = Path(__file__).with_name("dhcp")
TTY = Path(__file__).with_name("tty")

EM_386 = 3
EM_X86_64 = 62

# Drains standard output, so that the command's last words are out, then writes the byte read from standard
# input to I/O port 0xf4 (QEMU's isa-debug-exit). A program, because the cloud kernel has no /dev/port; in
# machine code, because a C compiler for the guest is more than this needs.
_DEBUG_EXIT_X86_64 = bytes.fromhex(
    "6a00"  # push 0                  the byte lives on the stack
    "31c0 31ff 4889e6 6a01 5a 0f05"  # read(0, rsp, 1)
    "6a10 58 6a01 5f be09540000 6a01 5a 0f05"  # ioctl(1, TCSBRK, 1), as tcdrain
    "b8ad000000 bff4000000 6a01 5e 6a01 5a 0f05"  # ioperm(0xf4, 1, 1)
    "89c7 85c0 7505"  # mov edi, eax; test eax, eax; jnz exit
    "8a0424 e6f4"  # mov al, [rsp]; out 0xf4, al
    "6a3c 58 0f05"  # exit: exit(edi)
)
_DEBUG_EXIT_I386 = bytes.fromhex(
    "6a00"  # push 0
    "6a03 58 31db 89e1 6a01 5a cd80"  # read(0, esp, 1)
    "6a36 58 6a01 5b b909540000 6a01 5a cd80"  # ioctl(1, TCSBRK, 1)
    "6a65 58 bbf4000000 6a01 59 6a01 5a cd80"  # ioperm(0xf4, 1, 1)
    "89c3 85c0 7505"  # mov ebx, eax; test eax, eax; jnz exit
    "8a0424 e6f4"  # mov al, [esp]; out 0xf4, al
    "31c0 40 cd80"  # exit: exit(ebx)
)


def debug_exit_program(architecture: str) -> bytes:
    """Return a static ELF program for ``amd64`` or ``i386`` that writes one byte from its input to port 0xf4.

    Its exit status is 0, or not 0 if the kernel refuses access to the port.
    """
    return elf(_DEBUG_EXIT_X86_64 if architecture == "amd64" else _DEBUG_EXIT_I386, architecture)


def elf(code: bytes, architecture: str) -> bytes:
    """Return a static ELF program for ``amd64`` or ``i386`` that is this machine code."""
    base = 0x400000
    if architecture == "amd64":
        header_bytes = 64 + 56
        length = header_bytes + len(code)
        program = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, length, length, 0x1000)
        kind, layout, machine = 2, "<HHIQQQIHHHHHH", EM_X86_64
    else:
        header_bytes = 52 + 32
        length = header_bytes + len(code)
        program = struct.pack("<IIIIIIII", 1, 0, base, base, length, length, 5, 0x1000)
        kind, layout, machine = 1, "<HHIIIIIHHHHHH", EM_386
    identity = b"\x7fELF" + bytes([kind, 1, 1]) + bytes(9)
    entry, header_end = base + header_bytes, header_bytes - len(program)
    fields = (2, machine, 1, entry, header_end, 0, 0, header_end, len(program), 1, 0, 0, 0)
    return identity + struct.pack(layout, *fields) + program + code


def base_archive(busybox: bytes, architecture: str) -> bytes:
    """Return the initramfs without kernel modules."""
    directories = ("bin", "dev", "proc", "sys", "root", "tmp", "run", "var", "var/run", "aiokvm")
    return cpio.archive(
        [
            *map(cpio.directory, directories),
            cpio.file("bin/busybox", busybox, 0o755),
            cpio.symlink("bin/sh", "busybox"),
            cpio.file("init", INIT.read_bytes(), 0o755),
            cpio.file("aiokvm/dhcp", DHCP.read_bytes(), 0o755),
            cpio.file("aiokvm/tty", TTY.read_bytes(), 0o755),
            cpio.file("aiokvm/debug-exit", debug_exit_program(architecture), 0o755),
            cpio.directory("etc"),
            cpio.directory("etc/acpi"),
            cpio.directory("etc/acpi/PWRF"),
            cpio.file("etc/acpi/PWRF/00000080", b"#!/bin/sh\nexec poweroff -f\n", 0o755),
        ]
    )


def modules_archive(release: str, modules: Mapping[str, bytes]) -> bytes:
    """Return an archive of kernel modules (``name.ko`` to content) in ``/lib/modules/<release>``."""
    folder = f"lib/modules/{release}"
    parents = map(cpio.directory, ("lib", "lib/modules", folder))
    return cpio.archive([*parents, *(cpio.file(f"{folder}/{name}", data) for name, data in modules.items())])


@checked
def command_archive(argv: Sequence[str]) -> bytes:
    """Return the archive that, joined to the initramfs, makes its ``/init`` run ``argv`` instead of a shell.

    Use ``aiokvm.proto.cpio.join(initrd, command_archive(argv))``. Raises ``ConfigError`` as ``command_line``.
    """
    return cpio.archive([cpio.directory("aiokvm"), cpio.file("aiokvm/command", command_line(argv) + b"\n")])


def command_line(argv: Sequence[str]) -> bytes:
    """Return the line with which a POSIX shell runs exactly ``argv``, whatever bytes the words hold.

    Raises ``ConfigError`` for no words at all and for a NUL, which no argument of a program can hold.
    """
    if not argv:
        raise ConfigError("the command has no words: name a program to run")
    return b" ".join(quote(word) for word in argv)


def quote(word: str) -> bytes:
    """Quote one word for a POSIX shell.

    Always in quotes: ``A=b`` or ``if`` as a first word would not be the name of a program otherwise.
    """
    if "\0" in word:
        raise ConfigError(f"{word!r} holds a NUL, which cannot be passed to a program")
    try:
        return b"'" + os.fsencode(word).replace(b"'", b"'\\''") + b"'"
    except UnicodeEncodeError as error:
        raise ConfigError(f"{word!r} cannot be passed to a program: {error.reason}") from None
