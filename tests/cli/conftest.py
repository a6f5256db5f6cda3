"""Kernels of a few instructions, and the command line in a process of its own."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Kernel = Callable[[str], Path]
Aiokvm = Callable[..., "subprocess.CompletedProcess[bytes]"]

LOAD = 0x100_0000


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """Make an ELF file that `boot.Linux` enters in 64-bit mode, of machine code in hexadecimal."""

    def make(code: str) -> Path:
        text = bytes.fromhex(code)
        ident = b"\x7fELF\x02\x01\x01" + bytes(9)
        header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        segment = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, LOAD, LOAD, len(text), len(text), 0x1000)
        path = tmp_path / "kernel"
        path.write_bytes((ident + header + segment).ljust(0x1000, b"\0") + text)
        return path

    return make


@pytest.fixture
def aiokvm() -> Aiokvm:
    """Run the command line to its end."""

    def run(*args: object, stdin: bytes = b"", timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-P", "-m", "aiokvm", *map(str, args)]
        return subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, check=False)

    return run
