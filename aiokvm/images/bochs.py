"""Bochs, built from Debian's source package: the emulator of a CPU with VT-x.

Its own package is configured without VT-x, and some things that KVM relies on are corrected here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from aiokvm.errors import ImageError
from aiokvm.images.process import run
from aiokvm.images.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiokvm.images.debian import Apt, Source

SUITE = "trixie"
"""Where the version is to be found that `CORRECTIONS` are for."""

CORRECTIONS: tuple[tuple[str, str, str], ...] = (
    # The posted-interrupt descriptor is aligned to 64 bytes (SDM 27.2.1.1); KVM has it anywhere in a page.
    (
        "cpu/vmx.cc",
        "if (! IsValidPageAlignedPhyAddr(vm->pid_addr)) {",
        "if (! IsValidPhyAddr(vm->pid_addr) || (vm->pid_addr & 63)) {",
    ),
    # Whether an interrupt gets through depends on the mode, not on the guest's IF alone. Else a guest that is
    # entered with IF clear is never left, and a host can be interrupted at an exit, where its IF is clear.
    (
        "cpu/vmx.cc",
        "  VMenterInjectEvents();\n",
        "  handleInterruptMaskChange();\n  VMenterInjectEvents();\n",
    ),
    (
        "cpu/vmx.cc",
        "  BX_CPU_THIS_PTR eflags = 0x2; // Bit1 is always set\n",
        "  BX_CPU_THIS_PTR eflags = 0x2;\n  handleInterruptMaskChange();\n",
    ),
    # A virtual interrupt waits for the guest's IF (SDM 31.2.2), also if another one comes meanwhile.
    (
        "cpu/event.cc",
        "    if (is_pending(BX_EVENT_PENDING_VMX_VIRTUAL_INTR)) {\n",
        "    if (is_unmasked_event_pending(BX_EVENT_PENDING_VMX_VIRTUAL_INTR)) {\n",
    ),
    # An exit while a virtual interrupt is delivered tells of it, as of any other event (SDM 28.2.4). Else it
    # is lost, and KVM injects the event before it anew: with ept=0 a page fault, at a stack's first touch.
    (
        "cpu/vapic.cc",
        "      BX_CPU_THIS_PTR sregs[BX_SEG_REG_CS].selector.value, RIP);\n"
        "    interrupt(vector, BX_EXTERNAL_INTERRUPT, 0, 0);\n",
        "      BX_CPU_THIS_PTR sregs[BX_SEG_REG_CS].selector.value, RIP);\n"
        "    vm->idt_vector_info = vector | (BX_EXTERNAL_INTERRUPT << 8);\n"
        "    vm->idt_vector_error_code = 0;\n"
        "    interrupt(vector, BX_EXTERNAL_INTERRUPT, 0, 0);\n",
    ),
    # CPUID leaves 15H and 16H name clocks that the emulated TSC does not have.
    (
        "cpu/cpudb/intel/corei7_skylake-x.cc",
        "get_leaf(leaf, 0x00000002, 0x00000124, 0x00000000, 0x00000000);",
        "get_reserved_leaf(leaf);",
    ),
    (
        "cpu/cpudb/intel/corei7_skylake-x.cc",
        "get_leaf(leaf, 0x00000dac, 0x00000fa0, 0x00000064, 0x00000000);",
        "get_reserved_leaf(leaf);",
    ),
)
"""Path, text that is there exactly once, and what stands there instead."""

OPTIONS = (
    *("--enable-x86-64", "--enable-cpu-level=6", "--enable-vmx=2"),
    *("--enable-avx", "--enable-evex", "--enable-protection-keys"),
    *("--enable-all-optimizations", "--enable-handlers-chaining"),
    *("--with-nogui", "--without-x", "--disable-docbook", "--disable-readline"),
)
# The linker leaves out what only a debugger would read: nine tenths of it.
_ENV = {"CFLAGS": "-O2 -pipe", "CXXFLAGS": "-O2 -pipe", "LDFLAGS": "-s"}

RECIPE = hashlib.sha256(json.dumps([SUITE, CORRECTIONS, OPTIONS, _ENV]).encode()).hexdigest()
"""A digest of what the code adds: a Bochs of an older one is built anew."""

# Two minutes of a processor's time; on a machine that is busy with other things it takes several times that.
LIMIT_S = 3600.0
_COMPILES = re.compile(rb"(?:g\+\+|gcc|cc) .*-c ")


async def build(
    apt: Apt, source: Source, folder: Path, name: str, progress: Callable[[Progress], None]
) -> Path:
    """Fetch, correct and compile Bochs in ``folder``; return the program.

    Raises ``ImageError``, with the end of what the compiler said if that failed.
    """
    progress(Progress(name, "download", 0, source.size))
    tarball = await apt.download_source(source, folder)
    progress(Progress(name, "download", source.size, source.size))
    progress(Progress(name, "unpack"))
    tree = folder / "tree"
    tree.mkdir()
    await run(["tar", "-xf", str(tarball), "--strip-components=1", "--no-same-owner"], cwd=tree)
    await anyio.to_thread.run_sync(correct, tree, source.version)
    progress(Progress(name, "build"))
    try:
        with anyio.fail_after(LIMIT_S):
            await _make(tree, name, progress)
    except TimeoutError:
        raise ImageError(
            f"Bochs was not built within {LIMIT_S:.0f} s: try again on a quiet machine"
        ) from None
    program = tree / "bochs"
    try:
        program.chmod(0o755)
    except FileNotFoundError:
        raise ImageError(f"building Bochs {source.version} has left no program") from None
    return program


def correct(tree: Path, version: str) -> None:
    """Apply `CORRECTIONS` to the unpacked source; ``ImageError`` if it is another than they are for."""
    for path, old, new in CORRECTIONS:
        file = tree / path
        # Whatever the encoding of names in comments, every byte survives this one.
        text = file.read_text("latin-1") if file.is_file() else ""
        if text.count(old) != 1:
            raise ImageError(
                f"Bochs {version} is not what the corrections are for: {path} lacks {old.strip()!r}"
            )
        file.write_text(text.replace(old, new), "latin-1")


async def _make(tree: Path, name: str, progress: Callable[[Progress], None]) -> None:
    await run(["sh", "./configure", *OPTIONS], cwd=tree, env=_ENV)
    total = len(_COMPILES.findall(await run(["make", "-n"], cwd=tree)))
    done = 0

    def line(text: bytes) -> None:
        nonlocal done
        if _COMPILES.match(text):
            done = min(done + 1, total)
            progress(Progress(name, "build", done_files=done, total_files=total))

    await run(["make", f"-j{len(os.sched_getaffinity(0))}"], cwd=tree, line=line)
